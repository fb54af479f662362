// Qwen3-Next, read top to bottom:
//   1. options        one table for all programs
//   2. the file       configuration, read and bounded; weights, found and checked against it
//   3. the machine    devices, memory plan: which layers and what else goes to which device
//   4. the model      forward(): embedding, layers, head; and the multi-token-prediction layer
//   5. the session    prefill, decode, going back, generation
#include "qnext.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <deque>
#include <utility>

#include "cuda/cuda.h"                        // make_cuda_device, list_cuda_devices
#include "ggml-lite/base/file.h"              // available_ram
#include "ggml-lite/base/term.h"              // parse_count, human_gib
#include "ggml-lite/base/threads.h"           // default_threads
#include "ggml-lite/core/limits.h"            // kMaxWidth, ...
#include "ggml-lite/core/device_list.h"       // parse_devices
#include "ggml-lite/core/forecast.h"          // forecast
#include "ggml-lite/core/loader.h"            // Loader
#include "ggml-lite/core/measure.h"           // time_pass
#include "ggml-lite/core/plan.h"              // plan_devices, split_layers
#include "ggml-lite/core/qn.h"                // QnFile
#include "ggml-lite/cpu/cpu.h"                // make_cpu_device
#include "ggml-lite/nn/chooser.h"             // Chooser
#include "ggml-lite/nn/decoder.h"             // Decoder
#include "ggml-lite/nn/draft.h"               // parse_draft
#include "ggml-lite/nn/expert_offload.h"      // ExpertOffload
#include "ggml-lite/nn/gated_attention.h"     // gated_attention
#include "ggml-lite/nn/gated_delta_net.h"     // gated_delta_net
#include "ggml-lite/nn/hybrid_state.h"        // StateShape
#include "ggml-lite/nn/layer_scratch.h"       // LayerDims, LayerScratch
#include "ggml-lite/nn/pipeline.h"            // Pipeline
#include "ggml-lite/nn/rope.h"                // rope_frequencies
#include "ggml-lite/nn/sparse_moe.h"          // sparse_moe
#include "ggml-lite/ref/ref.h"                // make_ref_device
#include "ggml-lite/text/stream.h"            // AnswerText
#include "ggml-lite/text/tokenizer.h"         // Tokenizer

namespace qnext {

using qn::Act;
using qn::Buffer;
using qn::ChatStyle;
using qn::Device;
using qn::DType;
using qn::fail;
using qn::parse_choice;
using qn::parse_count;
using qn::QnFile;
using qn::StepParams;
using qn::Tensor;
using qn::view;

// ---- 1. options -------------------------------------------------------------------------------------------------------

std::span<const OptionRow> options_table() {
  static const OptionRow rows[] = {
      {"--device", "WHERE", "auto, ref, cpu, cuda, cuda:0,1: several hold a part of the layers each (default auto: a GPU if there is one)",
       [](Options& o, const std::string& v) { qn::parse_devices(v), o.device = v; }},
      {"--split", "N,N", "layers of each of several devices (default: equally many bytes)", [](Options& o, const std::string& v) { o.split = qn::parse_counts(v, "--split N,N", 1, qn::kMaxLayers); }},
      {"--act", "FORMAT", "round activations of matrix products: f32, bf16, int8 (default int8 on the CPU, bf16 on a GPU)", [](Options& o, const std::string& v) { o.act = parse_choice(v, "--act", {"f32", "bf16", "int8"}); }},
      {"--kv-type", "FORMAT", "KV cache: f32, bf16, int8 (default bf16; f32 with --act f32)",
       [](Options& o, const std::string& v) { o.kv_type = parse_choice(v, "--kv-type", {"f32", "bf16", "int8"}); }},
      {"--ctx,-c", "N", "positions of the context (default: what the model allows, or what fits)", [](Options& o, const std::string& v) { o.ctx = parse_count(v, "--ctx", 1, 1 << 24); }},
      {"--rope-yarn", "FACTOR", "YaRN: stretch the context of the model by this, e.g. 4", [](Options& o, const std::string& v) { o.rope_yarn = qn::parse_number(v, "--rope-yarn", 1, qn::kMaxYarnFactor); }},
      {"--ubatch", "N", "tokens per pass in prefill", [](Options& o, const std::string& v) { o.ubatch = parse_count(v, "--ubatch", 1, 16384); }},
      {"--threads,-t", "N", "CPU threads (default: physical cores, or what reads memory faster)", [](Options& o, const std::string& v) { o.threads = parse_count(v, "--threads", 1, 1024); }},
      {"--isa", "LEVEL", "CPU kernels: auto, scalar, avx2, avx512", [](Options& o, const std::string& v) { o.isa = parse_choice(v, "--isa", {"auto", "scalar", "avx2", "avx512"}); }},
      {"--ram", "SIZE", "memory this process may use, e.g. 24G (GiB)", [](Options& o, const std::string& v) { o.ram = qn::parse_size(v, "--ram"); }},
      {"--vram", "SIZE", "memory of the GPU to use, e.g. 24G (GiB), of several 24G,16G; experts that do not fit stay in memory of the host",
       [](Options& o, const std::string& v) { o.vram = qn::parse_sizes(v, "--vram"); }},
      {"--slots", "N", "experts of every layer on the GPU (default: what fits)", [](Options& o, const std::string& v) { o.slots = parse_count(v, "--slots", 1, qn::kMaxExperts); }},
      {"--fetch", "PERCENT", "of a token's experts that are not on the GPU: how many it fetches; the CPU computes the others (default 20)",
       [](Options& o, const std::string& v) { o.fetch = parse_count(v, "--fetch", 0, 100); }},
      {"--draft", "N", "guess N tokens ahead and check them in one pass: 0 to 7, or auto: as many as pay (default)", [](Options& o, const std::string& v) { o.draft = qn::parse_draft(v); }},
      {"--no-draft", "", "guess nothing", [](Options& o, const std::string&) { o.draft = 0; }},
      {"--no-graph", "", "GPU: launch and wait for every operation by itself (to find a failing one)", [](Options& o, const std::string&) { o.graph = false; }},
      {"--verify", "", "check all checksums of the file at start (default for files under 1 GiB, and for weights on their way to a GPU)",
       [](Options& o, const std::string&) { o.verify = Verify::Yes; }},
      {"--no-verify", "", "do not check them", [](Options& o, const std::string&) { o.verify = Verify::No; }},
      {"--no-mmap", "", "CPU: read the file into memory, in huge pages (default with --device cpu where there is room)", [](Options& o, const std::string&) { o.mapped = false; }},
      {"--mmap", "", "CPU: weights stay pages of the file", [](Options& o, const std::string&) { o.mapped = true; }},
  };
  return rows;
}

// ---- 2. the file --------------------------------------------------------------------------------------------------------

struct Layer {
  bool attention = false;
  qn::DeltaNetWeights delta;
  qn::AttentionWeights attn;
  qn::MoeWeights moe;
};

struct Model {
  ModelInfo info;
  float eps = 1e-6f;
  bool renormalise = true;
  std::vector<bool> attention;     // per layer
  std::vector<float> inv_freq;     // (R/2)
  float rope_scale = 1;

  Tensor embed, norm, head;
  std::vector<Layer> layers;
  qn::MultiTokenWeights mtp;
  Layer mtp_layer;

  qn::LayerDims dims() const {
    const ModelInfo& i = info;
    return {i.width, i.vocab, i.heads, i.kv_heads, i.head_dim, i.key_heads, i.value_heads, i.key_dim, i.value_dim, i.experts, i.chosen, i.expert_width, i.shared_width};
  }
};

// The file's own scaling, or that of --rope-yarn, which stretches the context too
static void read_rope(const QnFile& f, Model& model, double yarn) {
  ModelInfo& m = model.info;
  qn::RopeScaling r = qn::read_rope(f, m.rotary_dim, m.context);
  if (yarn != 0) {
    r.factor = yarn, r.attention_factor = qn::yarn_attention_factor(yarn);
    m.context = static_cast<int>(std::min(r.original * yarn, static_cast<double>(qn::kMaxContext)));
  }
  m.rope_theta = r.theta, m.yarn_factor = r.factor;
  model.rope_scale = static_cast<float>(r.attention_factor), model.inv_freq = qn::rope_frequencies(r);
}

static ChatStyle chat_style(const QnFile& f) {
  const std::string s = f.has("general.chat") ? f.text("general.chat") : "none";
  for (auto [name, style] : {std::pair{"none", ChatStyle::None}, {"instruct", ChatStyle::Instruct}, {"thinking", ChatStyle::Thinking}, {"coder", ChatStyle::Coder}})
    if (s == name) return style;
  fail("%s: general.chat: expected none, instruct, thinking or coder, got \"%s\"", f.path().c_str(), s.c_str());
}

// What the file recommends; else what the model cards say (model-spec 7.3).
static SamplerParams sampling_defaults(const QnFile& f, ChatStyle style) {
  SamplerParams p;
  if (style == ChatStyle::Instruct) p.temperature = 0.7f, p.top_p = 0.8f, p.top_k = 20;
  if (style == ChatStyle::Thinking) p.temperature = 0.6f, p.top_p = 0.95f, p.top_k = 20;
  if (style == ChatStyle::Coder) p.temperature = 1.0f, p.top_p = 0.95f, p.top_k = 40;
  auto take = [&](const char* key, float& v, double min, double max) {
    if (f.has(key)) v = static_cast<float>(f.real(key, min, max));
  };
  take("sampling.temperature", p.temperature, 0, 100);
  take("sampling.top_p", p.top_p, 1e-6, 1);
  take("sampling.min_p", p.min_p, 0, 1);
  take("sampling.repetition_penalty", p.repetition_penalty, 1e-3, 1e3);
  if (f.has("sampling.top_k")) p.top_k = static_cast<int>(f.integer("sampling.top_k", 0, 1 << 24));
  return p;
}

static void read_general(const QnFile& f, ModelInfo& m) {
  const std::string family = f.has("general.family") ? f.text("general.family") : "";
  if (family != "qwen3_next") fail("%s: general.family: expected qwen3_next, got \"%s\": convert the model with this version's qnext-convert", f.path().c_str(), family.c_str());
  m.name = f.has("general.name") ? f.text("general.name") : "";
  m.source = f.has("general.source") ? f.text("general.source") : "";
  m.chat = chat_style(f);
  m.sampling = sampling_defaults(f, m.chat);
  m.file_bytes = f.size();
  if (f.has("token.end"))
    for (int64_t id : f.integers("token.end", qn::kMaxEndTokens, 0, qn::kMaxVocab)) m.end_tokens.push_back(static_cast<int32_t>(id));
}

// Every number of the configuration, bounded by core/limits.h so that no product of two below overflows.
static Model read_config(const QnFile& f, double yarn) {
  Model model;
  ModelInfo& m = model.info;
  read_general(f, m);
  if (!f.has("model.layers") && f.find("tokenizer")) fail("%s: this file holds only a tokenizer; use it with --tokenize or --detokenize", f.path().c_str());
  static constexpr struct {
    const char* key;
    int ModelInfo::*value;
    int64_t min, max, multiple;
  } numbers[] = {
      {"model.layers", &ModelInfo::layers, 1, qn::kMaxLayers, 1}, {"model.width", &ModelInfo::width, qn::kMinWidth, qn::kMaxWidth, qn::kWidthMultiple},
      {"model.vocab", &ModelInfo::vocab, 1, qn::kMaxVocab, 1}, {"model.context", &ModelInfo::context, 1, qn::kMaxContext, 1},
      {"attention.heads", &ModelInfo::heads, 1, qn::kMaxHeads, 1}, {"attention.kv_heads", &ModelInfo::kv_heads, 1, qn::kMaxHeads, 1},
      {"attention.head_dim", &ModelInfo::head_dim, qn::kMinHeadDim, qn::kMaxHeadDim, qn::kHeadDimMultiple},
      {"attention.rotary_dim", &ModelInfo::rotary_dim, qn::kMinRotaryDim, qn::kMaxHeadDim, qn::kRotaryDimMultiple},
      {"delta.key_heads", &ModelInfo::key_heads, 1, qn::kMaxHeads, 1}, {"delta.value_heads", &ModelInfo::value_heads, 1, qn::kMaxHeads, 1},
      {"delta.key_dim", &ModelInfo::key_dim, qn::kMinHeadDim, qn::kMaxHeadDim, qn::kHeadDimMultiple},
      {"delta.value_dim", &ModelInfo::value_dim, qn::kMinHeadDim, qn::kMaxHeadDim, qn::kHeadDimMultiple},
      {"delta.conv", &ModelInfo::conv, qn::kConv, qn::kConv, 1}, {"moe.experts", &ModelInfo::experts, 1, qn::kMaxExperts, 1},
      {"moe.chosen", &ModelInfo::chosen, 1, qn::kMaxChosen, 1}, {"moe.expert_width", &ModelInfo::expert_width, qn::kMinWidth, qn::kMaxWidth, qn::kWidthMultiple},
      {"moe.shared_width", &ModelInfo::shared_width, qn::kMinWidth, qn::kMaxWidth, qn::kWidthMultiple},
  };
  const char* path = f.path().c_str();
  auto multiple = [&](const char* what, int64_t v, int64_t of) {
    if (v % of) fail("%s: %s: expected a multiple of %d, got %d", path, what, static_cast<int>(of), static_cast<int>(v));
  };
  for (const auto& n : numbers) m.*n.value = static_cast<int>(f.integer(n.key, n.min, n.max)), multiple(n.key, m.*n.value, n.multiple);
  model.eps = static_cast<float>(f.real("model.rms_eps", 0, 1));
  model.renormalise = f.integer("moe.renormalise", 0, 1) == 1;
  m.mtp = f.integer("model.mtp", 0, 1) == 1;
  multiple("attention.heads", m.heads, m.kv_heads);
  multiple("delta.value_heads", m.value_heads, m.key_heads);
  if (m.rotary_dim > m.head_dim) fail("%s: attention.rotary_dim: expected at most head_dim %d, got %d", path, m.head_dim, m.rotary_dim);
  if (m.chosen > m.experts) fail("%s: moe.chosen: expected at most %d experts, got %d", path, m.experts, m.chosen);
  if (static_cast<int64_t>(m.experts) * m.layers > qn::kMaxExpertRecords) fail("%s: %d experts in %d layers are more than this program handles", path, m.experts, m.layers);
  if (model.dims().qkvz_rows() > qn::kMaxProjectionRows || model.dims().qgkv_rows() > qn::kMaxProjectionRows) fail("%s: head counts and widths give projections of over a million rows", path);

  const std::vector<int64_t> kinds = f.integers("model.layer_kinds", qn::kMaxLayers, 0, 1);
  if (kinds.size() != static_cast<size_t>(m.layers)) fail("%s: model.layer_kinds: expected %d entries, got %zu", path, m.layers, kinds.size());
  for (int64_t k : kinds) model.attention.push_back(k == 1);
  read_rope(f, model, yarn);
  for (int32_t id : m.end_tokens)
    if (id >= m.vocab) fail("%s: token.end: expected ids below %d, got %d", path, m.vocab, id);
  return model;
}

static std::string format_of(DType t, int group) {
  return group ? std::string(qn::name(t)) + " g" + std::to_string(group) : qn::name(t);
}

// A device and the layers it holds. The first also has the embedding; the last what comes behind the layers.
struct Part {
  std::unique_ptr<Device> device;  // outlives what is placed on it
  int begin = 0, end = 0;
  bool first = false, last = false;
  uint64_t placed = 0, read = 0;   // bytes of its weights that are always there; read for a token, beside routed experts
  int slots = 0;                   // experts of every layer that are there; 0: all
  std::unique_ptr<qn::ExpertOffload> offload;  // for the others
  Buffer inv_freq;                 // (R/2)
  Buffer reserved;                 // what the plan keeps for a session, until there is one: the plan of the next engine must not count on it
};

// Binds names to views on the mapping, or on a device's copy of it; every shape follows from the configuration.
class Binder {
 public:
  Binder(const QnFile& file, qn::Loader& loader, std::span<Part> parts, Model& model, bool mtp)
      : f_(file), loader_(loader), parts_(parts), m_(model), i_(model.info), mtp_(mtp) {}

  void bind() {
    const bool tied = !f_.find("head");
    at(parts_.front());
    m_.embed = m_.mtp.embed = weight("embed", i_.vocab, i_.width, kExact);
    at(parts_.back());
    if (parts_.size() > 1 && (tied || mtp_)) m_.mtp.embed = weight("embed", i_.vocab, i_.width, kExact);
    per_token_ = tied ? f_.find("embed")->bytes : 0;  // one row of the embedding is nothing
    m_.norm = vec("norm", i_.width);
    m_.head = tied ? m_.mtp.embed : weight("head", i_.vocab, i_.width, kRest);
    i_.rest_format = format_of(m_.head.dtype, m_.head.group);
    for (const Part& part : parts_)
      for (int n = part.begin; n < part.end; n++) {
        at(part);
        m_.layers.push_back(layer("layers." + std::to_string(n) + ".", m_.attention[static_cast<size_t>(n)]));
      }
    i_.experts_format = format_of(m_.layers[0].moe.experts.dtype, m_.layers[0].moe.experts.group);
    i_.bytes_per_token = per_token_;
    if (!i_.mtp) return;
    unused_ = !mtp_;  // checked all the same
    m_.mtp.norm_embed = vec("mtp.norm_embed", i_.width), m_.mtp.norm_hidden = vec("mtp.norm_hidden", i_.width);
    m_.mtp.fc = weight("mtp.fc", i_.width, 2 * i_.width, kRest);
    m_.mtp_layer = layer("mtp.layer.", true);
    m_.mtp.norm = vec("mtp.norm", i_.width);
    m_.mtp.head = f_.find("mtp.head") ? weight("mtp.head", i_.vocab, i_.width, kDraft) : m_.head;
  }

 private:
  static constexpr DType kExact[] = {DType::BF16, DType::F32};
  static constexpr DType kRest[] = {DType::BF16, DType::INT8, DType::F32};
  static constexpr DType kF32[] = {DType::F32}, kDraft[] = {DType::INT8, DType::INT4};

  void at(const Part& part) { device_ = part.device.get(), slots_ = part.slots; }
  void* place(const std::string& name, const void* mapped) { return unused_ ? nullptr : loader_.place(*device_, *f_.find(name), mapped); }
  Tensor placed(const std::string& name, Tensor t) {  // t: what the file has under that name
    t.data = place(name, t.data);
    per_token_ += f_.find(name)->bytes;
    return t;
  }
  // Throw when missing or of another shape
  Tensor weight(const std::string& name, int64_t n, int64_t k, std::span<const DType> types) { return placed(name, f_.dense(name, types, {n, k})); }
  Tensor vec(const std::string& name, int64_t n) { return placed(name, f_.dense(name, kF32, {n})); }

  Layer layer(const std::string& p, bool attention) {
    Layer l;
    l.attention = attention;
    const int d = i_.width;
    if (attention) {
      l.attn.norm = vec(p + "norm1", d);
      l.attn.qgkv = weight(p + "attn.qgkv", m_.dims().qgkv_rows(), d, kRest);
      l.attn.q_norm = vec(p + "attn.q_norm", i_.head_dim), l.attn.k_norm = vec(p + "attn.k_norm", i_.head_dim);
      l.attn.out = weight(p + "attn.out", d, i_.heads * i_.head_dim, kRest);
      l.attn.heads = i_.heads, l.attn.kv_heads = i_.kv_heads;
    } else {
      l.delta.norm = vec(p + "norm1", d);
      l.delta.qkvz = weight(p + "delta.qkvz", m_.dims().qkvz_rows(), d, kRest);
      l.delta.ba = weight(p + "delta.ba", 2 * i_.value_heads, d, kExact);
      l.delta.conv = weight(p + "delta.conv", m_.dims().channels(), i_.conv, kExact);
      l.delta.neg_a = vec(p + "delta.neg_a", i_.value_heads), l.delta.dt_bias = vec(p + "delta.dt_bias", i_.value_heads);
      l.delta.out_norm = vec(p + "delta.norm", i_.value_dim);
      l.delta.out = weight(p + "delta.out", d, i_.value_heads * i_.value_dim, kRest);
      l.delta.key_heads = i_.key_heads, l.delta.value_heads = i_.value_heads;
    }
    l.moe.norm = vec(p + "norm2", d);
    l.moe.router = weight(p + "moe.router", i_.experts, d, kExact), l.moe.shared_gate = weight(p + "moe.shared_gate", 1, d, kExact);
    l.moe.shared_gate_up = weight(p + "moe.shared_gate_up", 2 * i_.shared_width, d, kRest);
    l.moe.shared_down = weight(p + "moe.shared_down", d, i_.shared_width, kRest);
    l.moe.experts = f_.experts(p + "moe.experts", i_.experts, d, i_.expert_width);
    if (!slots_) l.moe.experts.data = static_cast<const uint8_t*>(place(p + "moe.experts", l.moe.experts.data));
    per_token_ += static_cast<uint64_t>(i_.chosen) * static_cast<uint64_t>(l.moe.experts.layout().bytes);
    l.moe.chosen = i_.chosen, l.moe.renormalise = m_.renormalise;
    return l;
  }

  const QnFile& f_;
  qn::Loader& loader_;
  std::span<Part> parts_;
  Device* device_ = nullptr;  // where things are placed now
  int slots_ = 0;             // for how many experts of a layer there is room; 0: all
  Model& m_;
  ModelInfo& i_;
  const bool mtp_;
  bool unused_ = false;
  uint64_t per_token_ = 0;
};

// ---- 3. the machine -----------------------------------------------------------------------------------------------------

// What --device names, or auto finds
static std::vector<qn::DeviceName> device_names(const Options& o) {
  const std::vector<qn::DeviceName> names = qn::parse_devices(o.device);
  if (names[0].kind != "auto") return names;
  for (const qn::CudaDeviceInfo& d : qn::list_cuda_devices())
    if (d.capability >= 80) return {{"cuda", d.index}};
  return {{"cpu", 0}};
}

static std::unique_ptr<Device> make_device(const qn::DeviceName& name, const Options& o) {
  if (name.kind == "ref") return qn::make_ref_device();
  if (name.kind == "cuda") return qn::make_cuda_device(name.index, o.graph);
  return qn::make_cpu_device(o.threads, qn::isa_named(o.isa));
}

std::vector<std::string> list_devices() {
  std::vector<std::string> out;
  for (const qn::CudaDeviceInfo& d : qn::list_cuda_devices())
    out.push_back(qn::format("cuda:%d  %s, %s, compute capability %d.%d%s", d.index, d.name.c_str(), qn::human_gib(d.memory).c_str(), d.capability / 10,
                             d.capability % 10, d.capability < 80 ? " (8.0 is needed)" : ""));
  out.push_back(qn::make_cpu_device(0)->name());
  out.push_back("ref");
  return out;
}

static Act parse_act(const Options& o, bool gpu) {
  if (!o.act) return gpu ? Act::BF16 : Act::INT8;
  return *o.act == "f32" ? Act::F32 : *o.act == "bf16" ? Act::BF16 : Act::INT8;
}

constexpr int kRecorded = 8;                          // steps of up to this many tokens are recorded, one recording for each number
constexpr int kStagingPays = 96;                      // tokens for which it is worth bringing every expert to a GPU, where they do not all fit
constexpr int kFirstPass = 512;                       // tokens of a prompt's first pass on a CPU. Long passes are faster, but Ctrl-C is heard
constexpr double kShortPass = 2;                      // between passes: twice as many after less than so many seconds, half after more than twice
constexpr int kLogitRows = 16;                        // rows of logits computed at once when all are wanted

// Of the layers [begin, end); behind the last layer comes the multi-token-prediction layer
static qn::StateShape state_shape(const Model& m, int begin, int end, int ctx, DType kv_type, bool mtp, int draft = 0) {
  const bool last = end == m.info.layers;
  qn::StateShape s;
  s.attention.assign(m.attention.begin() + begin, m.attention.begin() + end);
  if (mtp && last) s.attention.push_back(true);
  s.key_heads = m.info.key_heads, s.value_heads = m.info.value_heads, s.key_dim = m.info.key_dim, s.value_dim = m.info.value_dim;
  s.kv_heads = m.info.kv_heads, s.head_dim = m.info.head_dim, s.context = ctx, s.kv_type = kv_type;
  s.lagging = mtp && last, s.logs = draft != 0, s.conv_slots = draft ? 16 : 4;  // three that are read, and those of a pass
  s.tail = last ? m.info.width + m.info.vocab : 0;  // final norm of the last position, its logits
  return s;
}

// Of the whole model, in a 64th of the memory: each part keeps as many, of its own layers
static uint64_t checkpoints_kept(const Model& m, DType kv_type, uint64_t memory) {
  return qn::HybridState::checkpoints_kept(state_shape(m, 0, m.info.layers, 1, kv_type, false), std::min<uint64_t>(1ull << 30, memory / 64));
}

static uint64_t scratch_floats(const Model& m, int64_t t, bool last) {
  const auto width = static_cast<uint64_t>(m.info.width), rows = static_cast<uint64_t>(t);
  return qn::LayerScratch::floats(m.dims(), t) + rows * width + (last ? (3 * rows + 1) * width + kLogitRows * static_cast<uint64_t>(m.info.vocab) : 0);
}

// Cuts the layers between the parts, and plans the memory of each.
static Plan make_plan(const QnFile& file, const Model& m, const Options& o, DType kv_type, bool mtp, std::span<Part> parts, std::span<const uint64_t> budgets) {
  Plan plan{};
  const qn::LayerBytes bytes = qn::placed_bytes(file, m.info.layers, mtp, parts.size() > 1);
  if (!o.split.empty()) qn::check_split(o.split, parts.size(), m.info.layers);
  else if (parts.size() > bytes.layers.size()) fail("--device %s: expected at most %zu devices, one per layer, got %zu", o.device.c_str(), bytes.layers.size(), parts.size());
  const std::vector<int> split = o.split.empty() ? qn::split_layers(bytes, budgets) : o.split;
  std::vector<qn::PlanRequest> requests;
  for (size_t i = 0; i < parts.size(); i++) {
    Part& part = parts[i];
    part.begin = i ? parts[i - 1].end : 0, part.end = part.begin + split[i];
    part.first = i == 0, part.last = i + 1 == parts.size();
    const qn::StateShape one = state_shape(m, part.begin, part.end, 1, kv_type, mtp, o.draft);
    qn::PlanRequest r;
    r.file = file.path(), r.device = part.device->name(), r.own_memory = part.device->memory() > 0;
    r.budget = budgets[i];
    r.weights = (part.first ? bytes.front : 0) + (part.last ? bytes.back : 0);
    for (auto n = static_cast<size_t>(part.begin); n < static_cast<size_t>(part.end); n++) r.weights += bytes.layers[n], r.experts += bytes.experts[n];
    part.read = r.weights - r.experts - (part.first ? bytes.front : 0) - (part.last ? bytes.back : 0) + 2 * one.recurrent_bytes();
    if (part.last) r.experts += bytes.back_experts, part.read += file.find(file.find("head") ? "head" : "embed")->bytes;
    if (!r.own_memory) r.experts = 0;
    r.expert_count = m.info.experts, r.slots = o.slots;
    r.expert_memory = [experts = file.experts("layers.0.moe.experts", m.info.experts, m.info.width, m.info.expert_width), layers = part.end - part.begin + (mtp && part.last)](
                          int slots) { return qn::ExpertOffload::device_bytes(layers, experts, slots); };
    r.state = one.recurrent_bytes() * (1 + checkpoints_kept(m, kv_type, *std::ranges::min_element(budgets))) + one.log_bytes() + (part.last ? qn::Decoder::bytes(m.info.width) : 0);
    r.per_position = one.kv_bytes();
    r.model_context = m.info.context, r.ctx = o.ctx, r.ubatch = o.ubatch;
    r.scratch = [&m, &part, kv_type](int ubatch, int ctx) {
      const int t = std::min(ubatch, ctx);
      return scratch_floats(m, t, part.last) * sizeof(float) + part.device->scratch_bytes(m.dims().limits(t, ctx, kv_type));
    };
    requests.push_back(std::move(r));
  }
  const std::vector<qn::MemoryPlan> memory = qn::plan_devices(requests);
  for (size_t i = 0; i < parts.size(); i++) {
    const qn::MemoryPlan& p = memory[i];
    plan.device += (i ? " + " : "") + requests[i].device;
    plan.devices.push_back({requests[i].device, parts[i].begin, parts[i].end, p.weights, p.kv, p.state, p.scratch, p.slots, budgets[i]});
    parts[i].placed = p.placed, parts[i].slots = p.slots;
    plan.ctx = p.ctx, plan.ubatch = p.ubatch;
    plan.weights += p.weights, plan.kv += p.kv, plan.state += p.state, plan.scratch += p.scratch, plan.budget += budgets[i], plan.host += p.host;
  }
  if (!requests[0].own_memory) plan.weights = m.info.file_bytes;
  return plan;
}

struct Engine::Impl {
  QnFile file;
  std::optional<qn::Tokenizer> tokenizer;
  std::vector<qn::DeviceName> names;
  std::vector<Part> parts;         // a device of each name
  Model model;
  Plan plan;
  Act act = Act::F32, placed_act = Act::F32;  // the latter: of experts in steps of few tokens, where the CPU may compute some
  DType kv_type = DType::BF16;
  bool mtp = false;
  uint64_t checkpoints = 0;
  std::unique_ptr<qn::ExpertHost> host;  // of the parts that leave experts to it
  Options options;
  Buffer allowed;  // (V) U8, on the last device: ids that have a token; empty without a tokenizer
  qn::LoadReport loaded;
  TraceHook hook;

  Impl(const std::string& path, const Options& o) : file(QnFile::open(path)), options(o) {}
  void make_parts();
  int threads() const { return options.threads > 0 ? options.threads : qn::default_threads(); }
  Outlook outlook() const;
  bool holds() const {  // the file, in memory of the process
    const bool cpu = parts[0].device->memory() == 0, asked = options.mapped == false, may = cpu || (asked && offloads());
    return may && options.mapped != true && qn::holds_file(file.size(), cpu ? plan.kv + plan.state + plan.scratch : 0, plan.ram, asked);
  }
  bool offloads() const { return std::ranges::any_of(parts, [](const Part& p) { return p.slots > 0; }); }

  std::vector<Device*> devices() const {
    std::vector<Device*> d;
    for (const Part& p : parts) d.push_back(p.device.get());
    return d;
  }
  void place_slots(Part& part, qn::Loader& loader, const qn::OffloadShape& shape) {
    std::vector<std::pair<qn::Experts*, const qn::QnTensor*>> layers;
    for (int i = part.begin; i < part.end; i++)
      layers.emplace_back(&model.layers[static_cast<size_t>(i)].moe.experts, file.find("layers." + std::to_string(i) + ".moe.experts"));
    if (mtp && part.last) layers.emplace_back(&model.mtp_layer.moe.experts, file.find("mtp.layer.moe.experts"));
    part.offload = qn::offload_experts(*part.device, *host, layers, loader, shape);
  }
  void read_tokenizer() {
    const qn::QnTensor* t = file.find("tokenizer");
    if (!t) return;
    if (t->dtype != DType::U8 || t->experts) fail("%s: tensor tokenizer: expected u8, got %s", file.path().c_str(), qn::name(t->dtype));
    tokenizer.emplace(file.data(*t));
  }
  const qn::Tokenizer& text() const {
    if (!tokenizer) fail("%s: the file has no tokenizer; convert a folder that has tokenizer.json", file.path().c_str());
    return *tokenizer;
  }
};

// Devices and the plan for them; nothing is allocated that the model needs.
void Engine::Impl::make_parts() {
  model = read_config(file, options.rope_yarn);
  names = device_names(options);
  act = parse_act(options, names[0].kind == "cuda");
  kv_type = options.kv_type == "int8" ? DType::I8 : options.kv_type == "f32" || (options.kv_type.empty() && act == Act::F32) ? DType::F32 : DType::BF16;
  mtp = (options.mtp || options.draft) && model.info.mtp;
  if (!options.threads && names[0].kind == "cpu" && file.size() >= 1ull << 30) options.threads = qn::probe_threads();
  for (const qn::DeviceName& name : names) parts.emplace_back().device = make_device(name, options);
  const uint64_t ram = options.ram ? std::min(options.ram, qn::available_ram()) : qn::available_ram();
  std::vector<uint64_t> budgets = qn::memory_budgets(devices(), names, ram);
  for (size_t i = 0; i < budgets.size() && !options.vram.empty(); i++) budgets[i] = std::min(budgets[i], options.vram[std::min(i, options.vram.size() - 1)]);
  plan = make_plan(file, model, options, kv_type, mtp, parts, budgets);
  checkpoints = checkpoints_kept(model, kv_type, *std::ranges::min_element(budgets));
  placed_act = offloads() && !options.act ? Act::INT8 : act;
  plan.act = qn::name(act), plan.kv_type = qn::name(kv_type), plan.ram = ram, plan.pinned = qn::pins_experts(plan.host, ram);
}

Outlook Engine::Impl::outlook() const {
  Device& first = *parts[0].device;
  const bool gpu = first.memory() > 0;
  qn::HostPlan host{threads(), plan.pinned};
  const uint64_t held = gpu ? plan.host : file.size(), room = plan.ram - (gpu ? 0 : std::min(plan.ram, plan.kv + plan.state + plan.scratch));
  if (held > room) host.from_disk = 1 - static_cast<double>(room) / static_cast<double>(held);
  Outlook o{plan, {gpu ? first.read_bandwidth(0) : 0, first.bus_bandwidth(), qn::cpu_read_bandwidth(host.threads), held > room ? qn::disk_bandwidth(file.path()) : 0}, {}, {}};
  const qn::Experts one = file.experts("layers.0.moe.experts", model.info.experts, model.info.width, model.info.expert_width);
  std::vector<qn::ForecastPart> of;
  const double work = (model.info.chosen * 1.0 * model.info.expert_width + model.info.shared_width) * model.info.width / qn::kReferenceLayer;
  for (const Part& p : parts)
    of.push_back({p.device->memory() > 0, p.end - p.begin, 6 * (p.end - p.begin) + 2, p.read, static_cast<uint64_t>(one.layout().stride), one.count, model.info.chosen, p.slots, options.fetch, work});
  o.forecast = qn::forecast(of, plan.ubatch, host, o.speeds);
  o.advice = qn::best_change(of, plan.ubatch, host, o.speeds, {plan.kv, plan.ctx, kv_type == DType::BF16, file.find("layers.0.moe.shared_down")->dtype == DType::BF16});
  return o;
}

Engine Engine::open(const std::string& path, const Options& options, const Progress& progress) {
  auto e = std::make_unique<Impl>(path, options);
  e->make_parts();
  const int threads = e->threads();
  auto report = [&](const char* what) {
    return [&progress, what](uint64_t done, uint64_t total) {
      if (progress) progress(what, done, total);
    };
  };
  if (const double s = e->holds() ? e->file.hold(threads, options.mapped.has_value(), report("reading")) : 0; s > 0) e->loaded = {e->file.size(), threads, s, 0, 0, 0};
  for (size_t i = 0; i < e->parts.size(); i++)
    if (Device& d = *e->parts[i].device; d.memory()) d.reserve_weights(e->parts[i].placed);
  qn::Loader loader(e->file);
  Binder(e->file, loader, e->parts, e->model, e->mtp).bind();
  // The host has a thread fewer, for who waits for tokens; they stay awake from layer to layer
  if (e->offloads()) e->host = std::make_unique<qn::ExpertHost>(qn::make_cpu_device(std::max(1, threads - 1), qn::isa_named(options.isa), 1000));
  for (Part& part : e->parts)
    if (part.slots) e->place_slots(part, loader, {part.slots, e->model.info.chosen, options.fetch, e->placed_act, e->plan.pinned});
  if (options.verify == Verify::Yes || (options.verify == Verify::Auto && e->file.size() < 1ull << 30))
    e->file.verify(threads, report("verifying"), [&](const qn::QnTensor& t) { return !loader.copies(t); });
  if (const auto r = loader.load(std::min(threads, 16), options.verify != Verify::No, report("loading")); r.bytes) e->loaded = r;
  e->read_tokenizer();
  if (e->tokenizer) e->allowed = qn::upload_new<uint8_t>(*e->parts.back().device, e->tokenizer->ids(e->model.info.vocab), "ids that have a token");
  for (size_t i = 0; i < e->parts.size(); i++) {
    Part& part = e->parts[i];
    part.inv_freq = qn::upload_new<float>(*part.device, e->model.inv_freq, "rotary frequencies");
    const DevicePlan& p = e->plan.devices[i];
    if (part.device->memory()) part.reserved = part.device->alloc(p.kv + p.state + p.scratch, "cache, state and scratch");
  }
  return Engine(std::move(e));
}

Engine Engine::open_tokenizer(const std::string& path) {
  auto e = std::make_unique<Impl>(path, Options());
  read_general(e->file, e->model.info);
  e->read_tokenizer();
  e->text();
  return Engine(std::move(e));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine::~Engine() = default;

const ModelInfo& Engine::info() const { return impl_->model.info; }
const Plan& Engine::plan() const { return impl_->plan; }
Outlook Engine::outlook() const { return impl_->outlook(); }
Outlook Engine::outlook(const std::string& path, const Options& options) {
  Impl e(path, options);
  e.make_parts();
  return e.outlook();
}
const qn::LoadReport& Engine::load_report() const { return impl_->loaded; }
double Engine::read_bandwidth() const {
  std::vector<uint64_t> weights, spare;
  for (const DevicePlan& p : impl_->plan.devices) weights.push_back(p.weights), spare.push_back(p.budget - p.kv - p.state - p.scratch);
  return qn::read_bandwidth(impl_->devices(), weights, spare);
}
double Engine::int8_peak() const { return impl_->parts[0].device->int8_peak(); }
MemoryUse Engine::memory_use() const {
  const auto [used, total] = qn::memory_in_use(impl_->devices(), impl_->names);
  return {used, total};
}
OffloadUse Engine::offload_use() const {
  if (!impl_->host) return {};
  const qn::ExpertHost::Counts c = impl_->host->counts();
  return {std::ranges::all_of(impl_->parts, [](const Part& p) { return !p.offload || p.offload->pinned(); }), c.requests, c.experts, c.ahead, c.seconds};
}
std::string Engine::device_name() const { return impl_->parts.empty() ? "none" : impl_->plan.device; }
bool Engine::has_tokenizer() const { return impl_->tokenizer.has_value(); }
std::vector<int32_t> Engine::tokenize(std::string_view text, bool control) const { return impl_->text().encode(text, control); }
std::string_view Engine::token_bytes(int32_t id) const { return impl_->tokenizer ? impl_->tokenizer->bytes(id) : std::string_view(); }
std::string Engine::detokenize(std::span<const int32_t> ids) const { return impl_->text().decode(ids); }
bool Engine::shown(int32_t id) const { return !impl_->tokenizer || !impl_->tokenizer->special(id); }
bool Engine::is_end(int32_t id) const { return std::ranges::find(info().end_tokens, id) != info().end_tokens.end(); }
void Engine::trace(TraceHook hook) { impl_->hook = std::move(hook); }

std::vector<int32_t> Engine::chat_tokens(std::span<const Message> messages, const ChatOptions& options) const {
  if (info().chat == ChatStyle::None) fail("%s: a base model has no chat template; use --raw", impl_->file.path().c_str());
  const qn::ChatTemplate t{info().chat, "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."};
  return impl_->text().encode(qn::render_chat(t, messages, options.tools, options.generation_prompt));
}

qn::Answer Engine::parse_answer(std::string_view text, const qn::Json* tools) const { return qn::parse_answer(info().chat, text, tools); }

// ---- 4. the model -------------------------------------------------------------------------------------------------------

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The layers of one device. Scratch: all rows sized for a pass; h and the ids have a fixed place, so a step can be recorded.
struct Session::Stage : qn::PipelineStage {
  Engine::Impl& e;
  const Model& m;
  const Part& part;
  qn::ScratchMemory memory;
  qn::LayerScratch scratch;
  // Of the last stage. hidden (T+1, D): final norms, row 0 of the position before
  Tensor normed, hidden, embedded, logit_rows;
  qn::Chooser chooser;

  Stage(Engine::Impl& engine, const Part& p, int t)
      : qn::PipelineStage(*p.device, state_shape(engine.model, p.begin, p.end, engine.plan.ctx, engine.kv_type, engine.mtp, engine.options.draft),
                          engine.checkpoints, t),
        e(engine), m(engine.model), part(p), memory(device, scratch_floats(m, t, p.last)), scratch(m.dims(), t, memory) {
    const ModelInfo& i = m.info;
    h = memory.take(t, i.width);
    if (part.last) {
      normed = memory.take(t, i.width), hidden = memory.take(t + 1, i.width), embedded = memory.take(t, i.width), logit_rows = memory.take(kLogitRows, i.vocab);
      chooser = qn::Chooser(device, e.allowed.data() ? view(e.allowed.data(), DType::U8, i.vocab) : Tensor(), e.plan.ctx, e.devices());
    }
    if (part.offload) scratch.moe.box = part.offload->box();
    device.reserve(m.dims().limits(t, e.plan.ctx, e.kv_type));
  }
  ~Stage() { forget(); }

  void trace(int layer, const char* name, const Tensor& t) {
    if (e.hook) e.hook(layer, name, qn::download_floats(device, t), static_cast<int>(t.rows()), static_cast<int>(t.cols()));
  }

  qn::Rope rope() const { return {view(part.inv_freq.data(), DType::F32, m.info.rotary_dim / 2), m.rope_scale}; }

  // A decoder layer on (T, D), `index` in the model. log: the tokens, too. wanted: rows at the end that need more than a place in the state.
  void run_layer(const Layer& l, int index, const Tensor& all, const StepParams* at, bool log = false, int64_t wanted = INT64_MAX) {
    const int i = index - part.begin;
    if (l.attention) qn::gated_attention(device, l.attn, scratch.attn, all, state.cache(i), rope(), at, m.eps, e.act);
    else qn::gated_delta_net(device, l.delta, scratch.delta, all, state.conv_ring(i), state.delta(i), log ? state.log(i) : Tensor(), at, m.eps, e.act);
    const Tensor x = wanted < all.rows() ? all.slice(all.rows() - wanted, wanted) : all;
    qn::sparse_moe(device, l.moe, scratch.moe, x, m.eps, e.act, part.offload && x.rows() <= qn::kPlacedTokens ? e.placed_act : e.act,
                   index + 1 < part.end ? &m.layers[static_cast<size_t>(index) + 1].moe : nullptr);
    if (x.rows()) trace(index, "experts", scratch.moe.ids.slice(0, x.rows()));
  }

  void head(const Tensor& x, const Tensor& norm, const Tensor& y, const Tensor& normed_out) {
    qn::NormMatmulArgs a;
    a.h = x, a.norm = norm, a.eps = m.eps, a.act = e.act, a.normed = normed_out;
    if (y) a.w = m.head, a.y = y;
    device.norm_matmul(a);
  }

  float* last_hidden() const { return state.tail(); }               // (D): final norm of the last position
  float* last_logits() const { return state.tail() + m.info.width; }  // (V)

  // The layers of this stage on h, where the stage before has left its result; the first begins with the embedding.
  void layers(int n, bool log = false) {
    const Tensor x = h.slice(0, n);
    if (part.first) {
      qn::EmbedArgs em;
      em.ids = ids.slice(0, n), em.table = m.embed, em.h = x;
      device.embed(em);
      trace(-1, "embed", x);
    }
    for (int i = part.begin; i < part.end; i++) {
      if (part.offload && n > qn::kPlacedTokens)  // a layer's experts come while the one before computes
        for (int next = i == part.begin ? i : i + 1; next < std::min(i + 2, part.end); next++) device.stage_experts(m.layers[static_cast<size_t>(next)].moe.experts);
      run_layer(m.layers[static_cast<size_t>(i)], i, x, &step[0], log);
      trace(i, "layer", x);
    }
  }

  void decode(int n) {  // a pass that the decoder asks for
    layers(n, true);
    if (part.last) head(h.slice(0, n), m.norm, logit_rows.slice(0, n), hidden.slice(1, n));
  }

  void layers_and_head(int n, bool all_rows) {
    layers(n);
    const Tensor x = h.slice(0, n);
    if (!part.last) return;
    if (n > 1 && all_rows) head(x.slice(0, n - 1), m.norm, {}, hidden.slice(1, n - 1));
    head(x.slice(n - 1, 1), m.norm, view(last_logits(), DType::F32, 1, m.info.vocab),
         all_rows ? hidden.slice(n, 1) : view(last_hidden(), DType::F32, 1, m.info.width));
    if (all_rows) trace(-1, "final_norm", hidden.slice(1, n));
  }

  // Logits of rows of `x`, which are normed already
  void head_rows(const Tensor& x, const std::function<void(int64_t row, std::span<const float>)>& row) { qn::each_product(device, x, m.head, e.act, logit_rows, row); }

  // Slot i joins the final norm of position i with the embedding of token i+1 and predicts token i+2 (model-spec 5.1). The call's
  // last position waits for the next call, which finds its final norm in last_hidden().
  void mtp(int from, int n) {
    const int first = from ? 0 : 1, slots = n - first;  // token ids[first..n) meet hidden rows [first, n)
    if (slots < 1) return;
    device.copy(hidden.data, last_hidden(), static_cast<size_t>(m.info.width) * sizeof(float));
    const Tensor x = h.slice(0, slots);  // the main stream is done with h
    qn::multi_token_entry(device, m.mtp, ids.slice(first, slots), hidden.slice(first, slots), embedded.slice(0, slots), x, m.eps, e.act);
    run_layer(m.mtp_layer, m.info.layers, x, &step[1], false, e.hook ? slots : 0);
    if (!e.hook) return;
    const Tensor out = normed.slice(0, slots);
    head(x, m.mtp.norm, {}, out);
    trace(-1, "mtp_norm", out);
    head_rows(out, [&](int64_t, std::span<const float> l) { e.hook(-1, "mtp_logits", l, 1, m.info.vocab); });
  }

  void give_to(qn::DecoderModel& d) {  // what the last stage has
    const int draft = e.options.draft < 0 ? qn::kMaxDraft : e.options.draft, rows = std::min({static_cast<int>(h.rows()), kRecorded, draft + 1});
    d.chooser = chooser ? &chooser : nullptr, d.hidden = hidden.slice(1, rows), d.logits = logit_rows, d.embedded = embedded, d.x = h;
    d.mtp = m.mtp, d.eps = m.eps, d.act = e.act;
    if (e.mtp) d.layer = [this](const Tensor& x, const StepParams* at, int wanted) { run_layer(m.mtp_layer, m.info.layers, x, at, false, wanted); };
  }
};

struct Session::Impl {
  Engine::Impl& e;
  const Model& m;
  const int ubatch, first_pass;    // tokens of a pass: at most; of a prompt: at least
  std::deque<Stage> stages;        // one per device
  qn::Pipeline pipeline;           // all of them
  Stage& last;
  std::unique_ptr<qn::Decoder> decoder;
  std::vector<int32_t> tokens;     // the timeline: exactly what the state has seen
  std::vector<float> logits;       // host copy for the next token, when not stale
  bool stale = false;
  Timings timings;

  explicit Impl(Engine::Impl& engine)
      : e(engine), m(engine.model), ubatch(std::min(e.plan.ubatch, e.plan.ctx)),
        first_pass(e.options.ubatch || e.parts[0].device->memory() ? ubatch : std::min(ubatch, kFirstPass)),
        last(make_stages()), logits(static_cast<size_t>(m.info.vocab)) {
    if (e.host) pipeline.before_pass = [this] { e.host->check(), e.host->expect(); };
    qn::DecoderModel d;
    last.give_to(d);
    d.pipeline = &pipeline, d.pass = [this](size_t i, int n) { stages[i].decode(n); }, d.key = kRecorded;
    decoder = std::make_unique<qn::Decoder>(std::move(d), e.options.draft);
  }
  Stage& make_stages() {
    for (const Part& p : e.parts) pipeline.add(stages.emplace_back(e, p, ubatch));
    return stages.back();
  }

  void prepare(int from, int n) {
    const StepParams at[2] = {{from, n}, {std::max(from - 1, 0), from ? n : n - 1}};
    pipeline.prepare(at, std::span(tokens).subspan(static_cast<size_t>(from), static_cast<size_t>(n)), e.mtp);
  }

  // Tokens [from, from+n) of the timeline through the model, n <= ubatch: leaves the last's logits in last_logits(), calls `each` with all.
  void forward(int from, int n, const std::function<void(int, std::span<const float>)>* each) {
    prepare(from, n);
    const bool all_rows = e.hook || each || e.mtp;  // final norms of every row are wanted
    const auto behind = [&] {  // the last stage's work when it has final norms
      if (each) last.head_rows(last.hidden.slice(1, n), [&](int64_t row, std::span<const float> l) { (*each)(from + static_cast<int>(row), l); });
      if (e.mtp) last.mtp(from, n);
      if (all_rows) last.device.copy(last.last_hidden(), last.hidden.slice(n, 1).data, static_cast<size_t>(m.info.width) * sizeof(float));
    };
    const bool record = n <= kRecorded && !e.hook && !each && (from || !e.mtp);
    pipeline.run(n, record ? recording(n) + (e.mtp ? 64 : 0) : 0, [&](size_t i) {
      stages[i].layers_and_head(n, all_rows);
      if (stages[i].part.last) behind();
    });
    stale = true;
  }

  // The key of the recording of a pass over n tokens; those of the decoder, with the layer behind and of some operations only have others.
  uint64_t recording(int n) const { return uint64_t{last.device.selected()} << 8 | static_cast<uint64_t>(n); }

  // ---- for benchmarks

  void pretend(int to, uint64_t seed) {
    if (to < 1 || to > e.plan.ctx) fail("position %d is outside of the context of %d", to, e.plan.ctx);
    pipeline.randomise(to, seed);
    tokens.resize(static_cast<size_t>(to));
    for (int i = 0; i < to; i++) tokens[static_cast<size_t>(i)] = static_cast<int32_t>((seed + static_cast<uint64_t>(i) * 2654435761u) % static_cast<uint64_t>(m.info.vocab));
    stale = true, pipeline.checkpoint(to);
  }

  uint64_t cache_bytes(int rows) const {  // of the KV cache that `rows` more tokens read, each position once
    return state_shape(m, 0, m.info.layers, position() + rows, e.kv_type, false).kv_bytes();
  }

  // A pass over tokens after the timeline, which stays as it is; go_back(position()) afterwards.
  qn::Pass pass_over(std::span<const int32_t> more) {
    const int n = static_cast<int>(more.size()), at = position(), most = std::min(ubatch, e.plan.ctx - at);
    if (n < 1 || n > most) fail("measuring a pass at position %d: expected 1 to %d tokens, got %d", at, most, n);
    for (int32_t id : more) check_token(id);
    pipeline.checkpoint(at);
    auto prepare_again = [this, more, n, at] {
      pipeline.restore(at);
      tokens.insert(tokens.end(), more.begin(), more.end());
      prepare(at, n);
      tokens.resize(static_cast<size_t>(at));
    };
    return {prepare_again, [this, n](bool record) {
      pipeline.run(n, record && n <= kRecorded && !e.hook ? recording(n) : 0, [this, n](size_t i) { stages[i].layers_and_head(n, false); });
    }};
  }

  PassTime pass(std::span<const int32_t> more) {
    PassTime r = qn::time_pass(e.devices(), pass_over(more));
    go_back(position());
    r.bytes += cache_bytes(static_cast<int>(more.size()));
    return r;
  }

  std::vector<OpTime> profile(std::span<const int32_t> more) {
    std::vector<OpTime> out = qn::time_operations(e.devices(), pass_over(more));
    go_back(position());
    for (OpTime& op : out)
      if (op.name == qn::name(qn::Op::Attention)) op.bytes += cache_bytes(static_cast<int>(more.size()));
    return out;
  }

  DraftCosts draft_costs() {
    pipeline.checkpoint(position());
    const DraftCosts c = decoder->costs(tokens, e.plan.ctx);
    go_back(position());
    return c;
  }

  uint64_t bytes_per_token() {
    return qn::bytes_asked(e.devices(), {{}, [this](bool) { pipeline.run(1, 0, [this](size_t i) { stages[i].layers_and_head(1, false); }); }}) + cache_bytes(1);
  }

  // ---- 5. the session ---------------------------------------------------------------------------------------------------

  int position() const { return static_cast<int>(tokens.size()); }

  void check_token(int32_t id) const {
    if (id < 0 || id >= m.info.vocab) fail("token id: expected 0 to %d, got %d", m.info.vocab - 1, id);
  }

  const std::vector<float>& host_logits() {
    if (stale) last.device.download(logits.data(), last.last_logits(), logits.size() * sizeof(float));
    stale = false;
    return logits;
  }

  void go_back(int to) { tokens.resize(static_cast<size_t>(pipeline.restore(to))), stale = true; }

  // Positions worth a checkpoint in tokens[from, end): where the last turn begins, for a next prompt that rewrites the answer
  // after it (a thinking model's thoughts are dropped from history), and the end.
  std::vector<int> checkpoint_positions(std::span<const int32_t> all, int from) const {
    const int32_t start = e.tokenizer ? e.tokenizer->find_added("<|im_start|>") : -1;
    const int end = static_cast<int>(all.size());
    int turn = end - 1;
    while (turn > from && all[static_cast<size_t>(turn)] != start) turn--;
    return turn > from ? std::vector{turn, end} : std::vector{end};
  }

  SyncResult sync(std::span<const int32_t> all, const Progress& progress, const std::atomic<bool>* interrupt,
                  const std::function<void(int, std::span<const float>)>* each) {
    if (all.empty()) fail("nothing to continue: the prompt has no tokens");
    if (static_cast<int>(all.size()) > e.plan.ctx)
      fail("the prompt has %zu tokens, the context %d positions; use a larger --ctx or a shorter prompt", all.size(), e.plan.ctx);
    for (int32_t id : all) check_token(id);
    const auto common = static_cast<int>(std::ranges::mismatch(tokens, all).in1 - tokens.begin());
    SyncResult r;
    if (common < position()) go_back(common);
    else if (common < static_cast<int>(all.size())) pipeline.checkpoint(common);  // where an answer ended: what an undo goes back to
    r.reused = position();
    const double start = now();
    const std::vector<int> marks = checkpoint_positions(all, position());
    const int total = static_cast<int>(all.size()) - position();
    const size_t behind = pipeline.ahead();  // passes that are under way when the next begins
    std::vector<int> reached;                // tokens after each
    int pass_tokens = first_pass;
    while (position() < static_cast<int>(all.size())) {
      if (interrupt && *interrupt) r.interrupted = true;
      if (r.interrupted) break;
      const int from = position(), left = static_cast<int>(all.size()) - from;
      int end = from + std::min(left, left <= kStagingPays && e.host ? qn::kPlacedTokens : pass_tokens);
      for (int mark : marks)
        if (mark > from) end = std::min(end, mark);
      tokens.insert(tokens.end(), all.begin() + from, all.begin() + end);
      const double began = now();
      forward(from, end - from, each);
      if (const double took = now() - began; end - from == pass_tokens)
        pass_tokens = std::clamp(took < kShortPass ? 2 * pass_tokens : took > 2 * kShortPass ? pass_tokens / 2 : pass_tokens, first_pass, ubatch);
      if (std::ranges::find(marks, end) != marks.end() && !each) pipeline.checkpoint(end);
      reached.push_back(r.prefilled += end - from);
      pipeline.keep_up();  // progress and time are those of work done
      const int done = reached.size() > behind ? reached[reached.size() - 1 - behind] : 0;
      if (progress) progress("prompt", static_cast<uint64_t>(done), static_cast<uint64_t>(total));
    }
    pipeline.wait();
    if (progress && behind) progress("prompt", static_cast<uint64_t>(r.prefilled), static_cast<uint64_t>(total));
    timings.prefill_tokens += static_cast<uint64_t>(r.prefilled);
    timings.prefill_seconds += now() - start;
    return r;
  }

  void step_one(int32_t id) {
    const double start = now();
    check_token(id);
    if (position() >= e.plan.ctx) fail("the context of %d positions is full; start over with a larger --ctx", e.plan.ctx);
    tokens.push_back(id);
    forward(position() - 1, 1, nullptr);
    pipeline.wait();
    timings.decode_tokens++, timings.decode_seconds += now() - start;
  }

  GenerateResult generate(const GenerateParams& p, const std::function<bool(const Delivery&)>& deliver) {
    if (tokens.empty()) fail("nothing to continue: the prompt has no tokens");
    qn::Sampler sampler(p.sampling, e.tokenizer && !last.chooser ? e.tokenizer->ids(m.info.vocab) : std::vector<uint8_t>());
    qn::AnswerText answer(p.stop);
    GenerateResult r{};
    const double start = now();
    const int begin = position();
    bool go = true;
    auto give = [&](int32_t id, const std::string& text) {
      r.text += text;
      return !deliver || deliver({id, text});
    };
    const SamplerParams& s = p.sampling;
    const qn::SampleParams on_device{s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty, s.top_k, s.penalty_window, begin, 0, s.seed};
    const int64_t end = p.max_tokens < 0 ? e.plan.ctx : std::min<int64_t>(e.plan.ctx, int64_t{begin} + p.max_tokens);
    const qn::DecoderScope whole(*decoder);
    stale = true;
    decoder->begin(tokens, static_cast<int>(end), on_device, [&](std::span<const float> l, std::span<const int32_t> all, uint64_t at) {
      return sampler.next(l, all, all.size() - static_cast<size_t>(begin), at);
    }, static_cast<bool>(e.hook));
    const auto until = [&]() -> Finish {
      while (true) {
        if (p.max_tokens >= 0 && static_cast<int>(r.ids.size()) >= p.max_tokens) return Finish::Length;
        if (position() >= e.plan.ctx) return Finish::ContextFull;
        if (!go || (p.interrupt && *p.interrupt)) return Finish::Interrupted;
        const int32_t id = decoder->next();
        if (p.stop_at_end_tokens && std::ranges::find(m.info.end_tokens, id) != m.info.end_tokens.end()) return Finish::EndToken;
        const std::string text = answer.add(e.tokenizer && !e.tokenizer->special(id) ? e.tokenizer->bytes(id) : std::string_view());
        if (answer.stopped()) {
          if (!text.empty()) give(-1, text);
          return Finish::StopString;
        }
        if (answer.opened()) decoder->checkpoint();  // where a roll-back would go
        r.ids.push_back(id), answer.keep();
        if (last.chooser) decoder->take(id);  // the GPU computes while the text is shown
        go = give(id, text);
        if (!last.chooser) decoder->take(id);
      }
    };
    r.finish = until();
    decoder->finish(), stale = true;
    const qn::DecoderStats& d = decoder->stats();
    timings.decode_tokens += d.tokens, timings.decode_seconds += d.seconds;
    r.drafted = d.drafted, r.accepted = d.accepted, r.plain_seconds = d.plain_seconds;
    if (r.finish == Finish::StopString) {
      if (const size_t keep = answer.delivered(); keep < r.ids.size()) {
        r.ids.resize(keep);
        const std::vector<int32_t> want(tokens.begin(), tokens.begin() + begin + static_cast<std::ptrdiff_t>(keep));
        go_back(static_cast<int>(want.size()));
        if (position() < static_cast<int>(want.size())) replay(want);
      }
    } else if (const std::string rest = answer.finish(); !rest.empty()) {
      give(-1, rest);
    }
    r.seconds = now() - start;
    return r;
  }

  // In steps of at most 8 tokens, whose bits are those of decoding one by one on every device.
  void replay(const std::vector<int32_t>& want) {
    while (position() < static_cast<int>(want.size())) {
      const int from = position(), end = std::min<int>(from + std::min(ubatch, 8), static_cast<int>(want.size()));
      tokens.insert(tokens.end(), want.begin() + from, want.begin() + end);
      forward(from, end - from, nullptr);
    }
  }
};

Session::Session(Engine& engine) {
  for (Part& p : engine.impl_->parts) p.reserved = {};
  impl_ = std::make_unique<Impl>(*engine.impl_);
}
Session::Session(Session&&) noexcept = default;
Session::~Session() = default;

SyncResult Session::sync(std::span<const int32_t> all, const Progress& progress, const std::atomic<bool>* stop) { return impl_->sync(all, progress, stop, nullptr); }
SyncResult Session::sync_all(std::span<const int32_t> all, const std::function<void(int, std::span<const float>)>& each) { return impl_->sync(all, {}, nullptr, &each); }
void Session::step(int32_t token) { impl_->step_one(token); }
std::span<const float> Session::logits() const { return impl_->host_logits(); }
const std::vector<int32_t>& Session::tokens() const { return impl_->tokens; }
int Session::position() const { return impl_->position(); }
int Session::context() const { return impl_->e.plan.ctx; }
int Session::rewind(int position) {
  if (position < impl_->position()) impl_->go_back(std::max(position, 0));
  return impl_->position();
}
void Session::clear() { impl_->tokens.clear(), impl_->pipeline.reset(), impl_->stale = true; }
GenerateResult Session::generate(const GenerateParams& p, const std::function<bool(const Delivery&)>& deliver) { return impl_->generate(p, deliver); }
Timings Session::timings() const { return impl_->timings; }
void Session::pretend(int position, uint64_t seed) { impl_->pretend(position, seed); }
std::vector<OpTime> Session::profile(std::span<const int32_t> tokens) { return impl_->profile(tokens); }
PassTime Session::pass(std::span<const int32_t> tokens) { return impl_->pass(tokens); }
uint64_t Session::bytes_per_token() const { return impl_->bytes_per_token(); }
DraftCosts Session::draft_costs() { return impl_->draft_costs(); }
void Session::speculate(int draft, double acceptance) { impl_->decoder->set_draft(draft), impl_->decoder->simulate(acceptance); }
uint64_t Session::state_hash() const { return impl_->pipeline.hash(impl_->position()); }

}  // namespace qnext
