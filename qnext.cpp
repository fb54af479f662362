// Qwen3-Next, read top to bottom:
//   1. options        one table for all programs
//   2. the file       configuration, read and bounded; weights, found and checked against it
//   3. the machine    device, memory plan
//   4. the model      forward(): embedding, layers, head; and the multi-token-prediction layer
//   5. the session    prefill, decode, going back, generation
#include "qnext.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "cuda/cuda.h"                        // make_cuda_device, list_cuda_devices
#include "ggml-lite/base/file.h"              // available_ram
#include "ggml-lite/base/term.h"              // parse_count, human_gib
#include "ggml-lite/base/threads.h"           // default_threads
#include "ggml-lite/core/limits.h"            // kMaxWidth, ...
#include "ggml-lite/core/measure.h"           // time_pass
#include "ggml-lite/core/plan.h"              // plan_memory
#include "ggml-lite/core/qn.h"                // QnFile
#include "ggml-lite/cpu/cpu.h"                // make_cpu_device
#include "ggml-lite/nn/chooser.h"             // Chooser
#include "ggml-lite/nn/gated_attention.h"     // gated_attention
#include "ggml-lite/nn/gated_delta_net.h"     // gated_delta_net
#include "ggml-lite/nn/hybrid_state.h"        // HybridState
#include "ggml-lite/nn/rope.h"                // rope_frequencies
#include "ggml-lite/nn/sparse_moe.h"          // sparse_moe
#include "ggml-lite/ref/ref.h"                // make_ref_device
#include "ggml-lite/text/stream.h"            // TextStream
#include "ggml-lite/text/tokenizer.h"         // Tokenizer
#include "ggml-lite/base/hash.h"              // crc32c

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

// "cuda" or "cuda:0,1": numbers may repeat
static std::string parse_device(const std::string& text) {
  bool ok = text == "auto" || text == "ref" || text == "cpu" || text == "cuda";
  if (text.rfind("cuda:", 0) == 0) {
    ok = true;
    bool digit = false;  // the list ends with one, and a comma follows only one
    for (char c : text.substr(5)) {
      const bool is_digit = c >= '0' && c <= '9';
      ok = ok && (is_digit || (c == ',' && digit));
      digit = is_digit;
    }
    ok = ok && digit;
  }
  if (!ok) fail("--device: expected auto, ref, cpu, cuda or cuda:0,1, got \"%s\"", text.c_str());
  return text;
}

std::span<const OptionRow> options_table() {
  static const OptionRow rows[] = {
      {"--device", "WHERE", "auto, ref, cpu, cuda, cuda:0,1 (default auto: a GPU if there is one)",
       [](Options& o, const std::string& v) { o.device = parse_device(v); }},
      {"--act", "FORMAT", "round activations of matrix products: f32, bf16, int8 (default int8 on the CPU, bf16 on a GPU)",
       [](Options& o, const std::string& v) { o.act = parse_choice(v, "--act", {"f32", "bf16", "int8"}); }},
      {"--kv-type", "FORMAT", "KV cache: f32, bf16, int8 (default bf16; f32 with --act f32)",
       [](Options& o, const std::string& v) { o.kv_type = parse_choice(v, "--kv-type", {"f32", "bf16", "int8"}); }},
      {"--ctx,-c", "N", "positions of the context (default: what the model allows, or what fits)",
       [](Options& o, const std::string& v) { o.ctx = parse_count(v, "--ctx", 1, 1 << 24); }},
      {"--rope-yarn", "FACTOR", "YaRN: stretch the context of the model by this, e.g. 4",
       [](Options& o, const std::string& v) { o.rope_yarn = qn::parse_number(v, "--rope-yarn", 1, qn::kMaxYarnFactor); }},
      {"--ubatch", "N", "tokens per pass in prefill", [](Options& o, const std::string& v) { o.ubatch = parse_count(v, "--ubatch", 1, 16384); }},
      {"--threads,-t", "N", "CPU threads (default: physical cores)", [](Options& o, const std::string& v) { o.threads = parse_count(v, "--threads", 1, 1024); }},
      {"--isa", "LEVEL", "CPU kernels: auto, scalar, avx2, avx512",
       [](Options& o, const std::string& v) { o.isa = parse_choice(v, "--isa", {"auto", "scalar", "avx2", "avx512"}); }},
      {"--ram", "SIZE", "memory this process may use, e.g. 24G (GiB)", [](Options& o, const std::string& v) { o.ram = qn::parse_size(v, "--ram"); }},
      {"--no-graph", "", "GPU: launch and wait for every operation by itself (to find a failing one)", [](Options& o, const std::string&) { o.graph = false; }},
      {"--verify", "", "check all checksums of the file at start (default for files under 1 GiB, and for weights on their way to a GPU)",
       [](Options& o, const std::string&) { o.verify = Verify::Yes; }},
      {"--no-verify", "", "do not check them", [](Options& o, const std::string&) { o.verify = Verify::No; }},
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
  struct {
    Tensor norm_embed, norm_hidden, fc, norm;
    Layer layer;
  } mtp;

  int channels() const { return 2 * info.key_heads * info.key_dim + info.value_heads * info.value_dim; }
  int qkvz_rows() const { return channels() + info.value_heads * info.value_dim; }
  int qgkv_rows() const { return 2 * (info.heads + info.kv_heads) * info.head_dim; }
};

// The file's own scaling, or that of --rope-yarn, which stretches the context too
static void read_rope(const QnFile& f, Model& model, double yarn) {
  ModelInfo& m = model.info;
  qn::RopeScaling r;
  r.theta = m.rope_theta, r.dim = m.rotary_dim, r.factor = m.yarn_factor, r.original = m.context;
  model.rope_scale = static_cast<float>(f.real("rope.attention_factor", 1e-3, 1e3));
  if (m.yarn_factor != 1) {
    r.original = static_cast<double>(f.integer("rope.yarn_original_context", 1, qn::kMaxYarnContext));
    r.beta_fast = f.real("rope.yarn_beta_fast", 1e-3, 1e6), r.beta_slow = f.real("rope.yarn_beta_slow", 1e-3, 1e6);
    r.truncate = f.integer("rope.yarn_truncate", 0, 1);
  }
  if (yarn != 0) {
    r.factor = m.yarn_factor = yarn, model.rope_scale = static_cast<float>(qn::yarn_attention_factor(yarn));
    m.context = static_cast<int>(std::min(r.original * yarn, static_cast<double>(qn::kMaxContext)));
  }
  model.inv_freq = qn::rope_frequencies(r);
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
  auto get = [&](const char* key, int64_t min, int64_t max) { return static_cast<int>(f.integer(key, min, max)); };
  m.layers = get("model.layers", 1, qn::kMaxLayers);
  m.width = get("model.width", qn::kMinWidth, qn::kMaxWidth);
  m.vocab = get("model.vocab", 1, qn::kMaxVocab);
  m.context = get("model.context", 1, qn::kMaxContext);
  model.eps = static_cast<float>(f.real("model.rms_eps", 0, 1));
  m.heads = get("attention.heads", 1, qn::kMaxHeads);
  m.kv_heads = get("attention.kv_heads", 1, qn::kMaxHeads);
  m.head_dim = get("attention.head_dim", qn::kMinHeadDim, qn::kMaxHeadDim);
  m.rotary_dim = get("attention.rotary_dim", qn::kMinRotaryDim, qn::kMaxHeadDim);
  m.rope_theta = f.real("rope.theta", qn::kMinRopeTheta, qn::kMaxRopeTheta);
  m.yarn_factor = f.real("rope.yarn_factor", 1, qn::kMaxYarnFactor);
  m.key_heads = get("delta.key_heads", 1, qn::kMaxHeads);
  m.value_heads = get("delta.value_heads", 1, qn::kMaxHeads);
  m.key_dim = get("delta.key_dim", qn::kMinHeadDim, qn::kMaxHeadDim);
  m.value_dim = get("delta.value_dim", qn::kMinHeadDim, qn::kMaxHeadDim);
  m.conv = get("delta.conv", qn::kConv, qn::kConv);
  m.experts = get("moe.experts", 1, qn::kMaxExperts);
  m.chosen = get("moe.chosen", 1, qn::kMaxChosen);
  m.expert_width = get("moe.expert_width", qn::kMinWidth, qn::kMaxWidth);
  m.shared_width = get("moe.shared_width", qn::kMinWidth, qn::kMaxWidth);
  model.renormalise = get("moe.renormalise", 0, 1) == 1;
  m.mtp = get("model.mtp", 0, 1) == 1;

  const char* path = f.path().c_str();
  auto multiple = [&](const char* what, int64_t v, int64_t of) {
    if (v % of) fail("%s: %s: expected a multiple of %d, got %d", path, what, static_cast<int>(of), static_cast<int>(v));
  };
  multiple("model.width", m.width, qn::kWidthMultiple);
  multiple("attention.head_dim", m.head_dim, qn::kHeadDimMultiple);
  multiple("attention.rotary_dim", m.rotary_dim, qn::kRotaryDimMultiple);
  multiple("delta.key_dim", m.key_dim, qn::kHeadDimMultiple);
  multiple("delta.value_dim", m.value_dim, qn::kHeadDimMultiple);
  multiple("moe.expert_width", m.expert_width, qn::kWidthMultiple);
  multiple("moe.shared_width", m.shared_width, qn::kWidthMultiple);
  multiple("attention.heads", m.heads, m.kv_heads);
  multiple("delta.value_heads", m.value_heads, m.key_heads);
  if (m.rotary_dim > m.head_dim) fail("%s: attention.rotary_dim: expected at most head_dim %d, got %d", path, m.head_dim, m.rotary_dim);
  if (m.chosen > m.experts) fail("%s: moe.chosen: expected at most %d experts, got %d", path, m.experts, m.chosen);
  if (static_cast<int64_t>(m.experts) * m.layers > qn::kMaxExpertRecords) fail("%s: %d experts in %d layers are more than this program handles", path, m.experts, m.layers);
  if (model.qkvz_rows() > qn::kMaxProjectionRows || model.qgkv_rows() > qn::kMaxProjectionRows) fail("%s: head counts and widths give projections of over a million rows", path);

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

// Binds names to views on the mapping, or on the device's copy of it; every shape follows from the configuration.
class Binder {
 public:
  Binder(const QnFile& file, Device& device, Model& model, bool mtp) : f_(file), device_(device), m_(model), i_(model.info), mtp_(mtp) {}
  // What a device with memory of its own has to be given: a piece per checksum, and the tensor and record it is.
  std::vector<qn::LoadPiece> pieces;
  std::vector<std::pair<const qn::QnTensor*, size_t>> sources;

  void bind() {
    m_.embed = weight("embed", i_.vocab, i_.width, kExact);
    per_token_ = 0;  // one row of the embedding is nothing
    m_.norm = vec("norm", i_.width);
    m_.head = f_.find("head") ? weight("head", i_.vocab, i_.width, kRest) : m_.embed;
    if (!f_.find("head")) per_token_ += f_.find("embed")->bytes;
    i_.rest_format = format_of(m_.head.dtype, m_.head.group);
    for (int n = 0; n < i_.layers; n++) m_.layers.push_back(layer("layers." + std::to_string(n) + ".", m_.attention[static_cast<size_t>(n)]));
    i_.experts_format = format_of(m_.layers[0].moe.experts.dtype, m_.layers[0].moe.experts.group);
    i_.bytes_per_token = per_token_;
    if (!i_.mtp) return;
    unused_ = !mtp_;  // checked all the same
    m_.mtp.norm_embed = vec("mtp.norm_embed", i_.width);
    m_.mtp.norm_hidden = vec("mtp.norm_hidden", i_.width);
    m_.mtp.fc = weight("mtp.fc", i_.width, 2 * i_.width, kRest);
    m_.mtp.layer = layer("mtp.layer.", true);
    m_.mtp.norm = vec("mtp.norm", i_.width);
  }

 private:
  static constexpr DType kExact[] = {DType::BF16, DType::F32};
  static constexpr DType kRest[] = {DType::BF16, DType::INT8, DType::F32};
  static constexpr DType kF32[] = {DType::F32};

  void* place(const std::string& name, const void* mapped) {
    const qn::QnTensor& t = *f_.find(name);
    if (unused_) return nullptr;
    void* to = const_cast<void*>(device_.place(mapped, t.bytes));
    if (to == mapped) return to;
    const uint64_t each = t.bytes / t.crc.size();  // experts: a checksum per record, all of one size
    for (size_t r = 0; r < t.crc.size(); r++) {
      pieces.push_back({t.offset + r * each, each, static_cast<uint8_t*>(to) + r * each, t.crc[r]});
      sources.emplace_back(&t, r);
    }
    return to;
  }
  Tensor placed(const std::string& name, Tensor t) {  // t: what the file has under that name
    t.data = place(name, t.data);
    per_token_ += f_.find(name)->bytes;
    return t;
  }
  Tensor weight(const std::string& name, int64_t n, int64_t k, std::span<const DType> types) {
    const Tensor t = f_.dense(name, types, {n, k});  // throws when missing or of another shape
    return placed(name, t);
  }
  Tensor vec(const std::string& name, int64_t n) {
    const Tensor t = f_.dense(name, kF32, {n});
    return placed(name, t);
  }

  Layer layer(const std::string& p, bool attention) {
    Layer l;
    l.attention = attention;
    const int d = i_.width;
    if (attention) {
      l.attn.norm = vec(p + "norm1", d);
      l.attn.qgkv = weight(p + "attn.qgkv", m_.qgkv_rows(), d, kRest);
      l.attn.q_norm = vec(p + "attn.q_norm", i_.head_dim);
      l.attn.k_norm = vec(p + "attn.k_norm", i_.head_dim);
      l.attn.out = weight(p + "attn.out", d, i_.heads * i_.head_dim, kRest);
      l.attn.heads = i_.heads, l.attn.kv_heads = i_.kv_heads;
    } else {
      l.delta.norm = vec(p + "norm1", d);
      l.delta.qkvz = weight(p + "delta.qkvz", m_.qkvz_rows(), d, kRest);
      l.delta.ba = weight(p + "delta.ba", 2 * i_.value_heads, d, kExact);
      l.delta.conv = weight(p + "delta.conv", m_.channels(), i_.conv, kExact);
      l.delta.neg_a = vec(p + "delta.neg_a", i_.value_heads);
      l.delta.dt_bias = vec(p + "delta.dt_bias", i_.value_heads);
      l.delta.out_norm = vec(p + "delta.norm", i_.value_dim);
      l.delta.out = weight(p + "delta.out", d, i_.value_heads * i_.value_dim, kRest);
      l.delta.key_heads = i_.key_heads, l.delta.value_heads = i_.value_heads;
    }
    l.moe.norm = vec(p + "norm2", d);
    l.moe.router = weight(p + "moe.router", i_.experts, d, kExact);
    l.moe.shared_gate = weight(p + "moe.shared_gate", 1, d, kExact);
    l.moe.shared_gate_up = weight(p + "moe.shared_gate_up", 2 * i_.shared_width, d, kRest);
    l.moe.shared_down = weight(p + "moe.shared_down", d, i_.shared_width, kRest);
    l.moe.experts = f_.experts(p + "moe.experts", i_.experts, d, i_.expert_width);
    const int64_t one = l.moe.experts.layout().bytes;
    l.moe.experts.data = static_cast<const uint8_t*>(place(p + "moe.experts", l.moe.experts.data));
    per_token_ += static_cast<uint64_t>(i_.chosen) * static_cast<uint64_t>(one);
    l.moe.chosen = i_.chosen, l.moe.renormalise = m_.renormalise;
    return l;
  }

  const QnFile& f_;
  Device& device_;
  Model& m_;
  ModelInfo& i_;
  const bool mtp_;
  bool unused_ = false;
  uint64_t per_token_ = 0;
};

// Bytes that place() will be asked for
static uint64_t placed_bytes(const QnFile& f, bool mtp) {
  uint64_t sum = 0;
  for (const qn::QnTensor& t : f.tensors())
    if (t.dtype != DType::U8 && (mtp || !t.name.starts_with("mtp."))) sum += static_cast<uint64_t>(qn::round_up(static_cast<int64_t>(t.bytes), Device::kPlaceAlign));
  return sum;
}

// ---- 3. the machine -----------------------------------------------------------------------------------------------------

// The number of the GPU that --device names or auto finds; -1: none
static int gpu_of(const Options& o) {
  if (o.device == "auto") {
    for (const qn::CudaDeviceInfo& d : qn::list_cuda_devices())
      if (d.capability >= 80) return d.index;
    return -1;
  }
  if (parse_device(o.device).rfind("cuda", 0) != 0) return -1;
  if (o.device.find(',') != o.device.npos) fail("--device %s: expected one GPU, got several: the model runs on one, name it, as in cuda:0", o.device.c_str());
  return o.device == "cuda" ? 0 : parse_count(o.device.substr(5), "--device cuda:N", 0, 1023);
}

static std::unique_ptr<Device> make_device(const Options& o) {
  if (o.device == "ref") return qn::make_ref_device();
  if (const int gpu = gpu_of(o); gpu >= 0) return qn::make_cuda_device(gpu, o.graph);
  const qn::Isa isa = o.isa == "scalar" ? qn::Isa::Scalar : o.isa == "avx2" ? qn::Isa::Avx2 : o.isa == "avx512" ? qn::Isa::Avx512 : qn::Isa::Auto;
  return qn::make_cpu_device(o.threads, isa);
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

static Act parse_act(const Options& o) {
  if (!o.act) return gpu_of(o) >= 0 ? Act::BF16 : Act::INT8;
  return *o.act == "f32" ? Act::F32 : *o.act == "bf16" ? Act::BF16 : Act::INT8;
}

constexpr int kRecorded = 8;                          // steps of up to this many tokens are recorded, one recording for each number
constexpr int kLogitRows = 16;                        // rows of logits computed at once when all are wanted
constexpr uint64_t kCheckpointBytes = 1ull << 30;     // memory for checkpoints of the recurrent state

static qn::StateShape state_shape(const Model& m, int ctx, DType kv_type, bool mtp) {
  qn::StateShape s;
  s.attention = m.attention;
  if (mtp) s.attention.push_back(true);
  s.key_heads = m.info.key_heads, s.value_heads = m.info.value_heads, s.key_dim = m.info.key_dim, s.value_dim = m.info.value_dim;
  s.kv_heads = m.info.kv_heads, s.head_dim = m.info.head_dim, s.context = ctx, s.kv_type = kv_type;
  s.lagging = mtp;
  s.tail = m.info.width + m.info.vocab;  // final norm of the last position, its logits
  return s;
}

static uint64_t scratch_bytes(const Model& m, int t) {
  const ModelInfo& i = m.info;
  const int64_t row = std::max(m.qkvz_rows(), m.qgkv_rows()) + 2 * i.value_heads + std::max(i.heads * i.head_dim, i.value_heads * i.value_dim) +
                      6 * i.width + i.experts + i.shared_width + 1 + 2 * i.chosen + static_cast<int64_t>(i.chosen) * i.expert_width + 16;
  return static_cast<uint64_t>(t * row + kLogitRows * static_cast<int64_t>(i.vocab)) * sizeof(float);
}

static qn::OpLimits op_limits(const Model& m, int ubatch, int ctx, DType kv_type) {
  const ModelInfo& i = m.info;
  qn::OpLimits l;
  l.tokens = ubatch;
  l.width = std::max<int64_t>({m.qkvz_rows(), m.qgkv_rows(), 2 * i.width, i.heads * i.head_dim, i.value_heads * i.value_dim, 2 * i.shared_width, 2 * i.expert_width});
  l.vocab = i.vocab;
  l.experts = i.experts, l.chosen = i.chosen, l.expert_width = i.expert_width, l.model_width = i.width;
  l.heads = i.heads, l.context = ctx, l.kv_codes = kv_type == DType::I8 ? i.kv_heads * i.head_dim : 0;
  l.value_heads = i.value_heads, l.key_heads = i.key_heads, l.key_dim = i.key_dim, l.value_dim = i.value_dim;
  return l;
}

static Plan make_plan(const QnFile& file, const Model& m, const Options& o, DType kv_type, bool mtp, const Device& device) {
  const qn::StateShape one = state_shape(m, 1, kv_type, mtp);
  qn::PlanRequest r;
  r.file = file.path(), r.device = device.name(), r.own_memory = device.memory() > 0;
  r.budget = r.own_memory ? device.memory_free() : o.ram ? std::min(o.ram, qn::available_ram()) : qn::available_ram();
  r.weights = r.own_memory ? placed_bytes(file, mtp) : m.info.file_bytes;
  r.state = one.recurrent_bytes() * (1 + qn::HybridState::checkpoints_kept(one, kCheckpointBytes));
  r.per_position = std::max<uint64_t>(one.kv_bytes(), 1);
  r.model_context = m.info.context, r.ctx = o.ctx, r.ubatch = o.ubatch;
  r.scratch = [&](int ubatch, int ctx) {
    const int t = std::min(ubatch, ctx);
    return scratch_bytes(m, t) + device.scratch_bytes(op_limits(m, t, ctx, kv_type));
  };
  const qn::MemoryPlan p = qn::plan_memory(r);
  return {{}, {}, {}, p.ctx, p.ubatch, p.weights, p.kv, p.state, p.scratch, r.budget};
}

struct Engine::Impl {
  QnFile file;
  std::optional<qn::Tokenizer> tokenizer;
  std::unique_ptr<Device> device;  // outlives what is placed on it
  Model model;
  Plan plan;
  Act act = Act::F32;
  DType kv_type = DType::BF16;
  bool mtp = false;
  Buffer inv_freq, allowed;  // allowed (V) U8: ids that have a token; empty without a tokenizer
  Buffer reserved;           // what the plan keeps for a session, until there is one: the plan of the next engine must not count on it
  qn::LoadReport loaded;
  TraceHook hook;

  explicit Impl(QnFile f) : file(std::move(f)) {}

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

Engine Engine::open(const std::string& path, const Options& options, const Progress& progress) {
  auto e = std::make_unique<Impl>(QnFile::open(path));
  e->model = read_config(e->file, options.rope_yarn);
  e->act = parse_act(options);
  e->kv_type = options.kv_type == "int8" ? DType::I8 : options.kv_type == "f32" || (options.kv_type.empty() && e->act == Act::F32) ? DType::F32 : DType::BF16;
  e->mtp = options.mtp && e->model.info.mtp;
  e->device = make_device(options);
  e->plan = make_plan(e->file, e->model, options, e->kv_type, e->mtp, *e->device);
  e->plan.device = e->device->name();
  e->plan.act = qn::name(e->act), e->plan.kv_type = qn::name(e->kv_type);
  const int threads = options.threads > 0 ? options.threads : qn::default_threads();
  auto report = [&](const char* what) {
    return [&progress, what](uint64_t done, uint64_t total) {
      if (progress) progress(what, done, total);
    };
  };
  if (e->device->memory()) e->device->reserve_weights(e->plan.weights);
  Binder binder(e->file, *e->device, e->model, e->mtp);
  binder.bind();
  if (options.verify == Verify::Yes || (options.verify == Verify::Auto && e->file.size() < 1ull << 30)) {
    std::set<const qn::QnTensor*> copied;  // checked on the way
    for (const auto& [tensor, record] : binder.sources) copied.insert(tensor);
    e->file.verify(threads, report("verifying"), [&](const qn::QnTensor& t) { return !copied.contains(&t); });
  }
  if (!binder.pieces.empty())
    e->loaded = e->device->load(e->file.file(), binder.pieces, std::min(threads, 16), options.verify != Verify::No,
                                [&](size_t i) { e->file.damaged(*binder.sources[i].first, binder.sources[i].second); }, report("loading"));
  e->read_tokenizer();
  const size_t bytes = e->model.inv_freq.size() * sizeof(float);
  e->inv_freq = e->device->alloc(bytes, "rotary frequencies");
  e->device->upload(e->inv_freq.data(), e->model.inv_freq.data(), bytes);
  if (e->tokenizer) {
    std::vector<uint8_t> has(static_cast<size_t>(e->model.info.vocab));
    for (size_t i = 0; i < has.size(); i++) has[i] = e->tokenizer->has(static_cast<int32_t>(i));
    e->allowed = e->device->alloc(has.size(), "ids that have a token");
    e->device->upload(e->allowed.data(), has.data(), has.size());
  }
  if (e->device->memory()) e->reserved = e->device->alloc(e->plan.kv + e->plan.state + e->plan.scratch, "cache, state and scratch");
  return Engine(std::move(e));
}

Engine Engine::open_tokenizer(const std::string& path) {
  auto e = std::make_unique<Impl>(QnFile::open(path));
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
const qn::LoadReport& Engine::load_report() const { return impl_->loaded; }
double Engine::read_bandwidth() const {
  const Plan& p = impl_->plan;
  return impl_->device->read_bandwidth(impl_->device->memory() ? 0 : p.budget - p.kv - p.state - p.scratch);
}
MemoryUse Engine::memory_use() const { return {impl_->device->memory_used(), impl_->device->memory()}; }
std::string Engine::device_name() const { return impl_->device ? impl_->device->name() : "none"; }
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

struct Session::Impl {
  Engine::Impl& e;
  const Model& m;
  Device& device;
  const int ubatch;
  qn::HybridState state;
  std::vector<int32_t> tokens;     // the timeline: exactly what the state has seen
  std::vector<float> logits;       // host copy for the next token, when not stale
  bool stale = false;
  Timings timings;

  // Scratch, all rows sized for `ubatch`. The residual stream h and the ids have a fixed place, so a step can be recorded.
  Buffer memory, step_memory;
  qn::Chooser chooser;
  size_t used = 0;
  Tensor ids, h, normed, hidden, embedded, logit_rows;  // hidden (T+1, D): final norms, row 0 of the position before
  qn::DeltaNetScratch delta;
  qn::AttentionScratch attn;
  qn::MoeScratch moe;
  StepParams* step = nullptr;      // device memory; [1] is that of the multi-token-prediction layer

  explicit Impl(Engine::Impl& engine)
      : e(engine), m(engine.model), device(*engine.device), ubatch(std::min(engine.plan.ubatch, engine.plan.ctx)),
        state(device, state_shape(m, engine.plan.ctx, engine.kv_type, engine.mtp), kCheckpointBytes), logits(static_cast<size_t>(m.info.vocab)),
        chooser(device, e.allowed.data() ? view(e.allowed.data(), DType::U8, m.info.vocab) : Tensor(), e.plan.ctx) {
    const ModelInfo& i = m.info;
    const int64_t t = ubatch;
    memory = device.alloc(scratch_bytes(m, ubatch) + 64 * 32, "scratch");
    ids = take(t + 1, 0, DType::I32);
    h = take(t, i.width), normed = take(t, i.width), hidden = take(t + 1, i.width), embedded = take(t, i.width);
    logit_rows = take(kLogitRows, i.vocab);
    const Tensor projected = take(t, std::max(m.qkvz_rows(), m.qgkv_rows())), mixed = take(t, std::max(i.heads * i.head_dim, i.value_heads * i.value_dim));
    delta.qkvz = view(projected.data, DType::F32, t, m.qkvz_rows());
    delta.o = view(mixed.data, DType::F32, t, i.value_heads * i.value_dim);
    delta.ba = take(t, 2 * i.value_heads);
    attn.qgkv = view(projected.data, DType::F32, t, m.qgkv_rows());
    attn.o = view(mixed.data, DType::F32, t, i.heads * i.head_dim);
    moe.x = take(t, i.width), moe.logits = take(t, i.experts), moe.shared = take(t, i.shared_width), moe.shared_scale = take(t);
    moe.ids = take(t, i.chosen, DType::I32), moe.weights = take(t, i.chosen), moe.inner = take(t * i.chosen, i.expert_width);
    step_memory = device.alloc(2 * sizeof(StepParams), "step parameters");
    step = static_cast<StepParams*>(step_memory.data());
    device.reserve(op_limits(m, ubatch, e.plan.ctx, e.kv_type));
  }
  ~Impl() { device.forget(this); }

  Tensor take(int64_t rows, int64_t cols = 0, DType type = DType::F32) {
    const Tensor t = view(static_cast<uint8_t*>(memory.data()) + used, type, rows, cols);
    used += static_cast<size_t>(qn::round_up(rows * std::max<int64_t>(cols, 1) * 4, 64));
    QN_CHECK(used <= memory.bytes(), "scratch: planned %zu bytes, need %zu", memory.bytes(), used);
    return t;
  }

  void trace(int layer, const char* name, const Tensor& t) {
    if (!e.hook) return;
    std::vector<float> host(static_cast<size_t>(t.rows() * t.cols()));
    device.download(host.data(), t.data, host.size() * sizeof(float));
    e.hook(layer, name, host, static_cast<int>(t.rows()), static_cast<int>(t.cols()));
  }

  void trace_experts(int layer, int64_t rows) {  // chosen ids as numbers (T, K)
    if (!e.hook) return;
    std::vector<int32_t> host(static_cast<size_t>(rows * m.info.chosen));
    device.download(host.data(), moe.ids.data, host.size() * sizeof(int32_t));
    e.hook(layer, "experts", std::vector<float>(host.begin(), host.end()), static_cast<int>(rows), m.info.chosen);
  }

  qn::Rope rope() const { return {view(e.inv_freq.data(), DType::F32, m.info.rotary_dim / 2), m.rope_scale}; }

  // One decoder layer on x (T, D); `index` is its place in the state.
  void run_layer(const Layer& l, int index, const Tensor& x, const StepParams* at) {
    if (l.attention)
      qn::gated_attention(device, l.attn, attn, x, state.cache(index), rope(), at, m.eps, e.act);
    else
      qn::gated_delta_net(device, l.delta, delta, x, state.conv_ring(index), state.delta(index), at, m.eps, e.act);
    qn::sparse_moe(device, l.moe, moe, x, m.eps, e.act, e.act);
    trace_experts(index, x.rows());
  }

  void head(const Tensor& x, const Tensor& norm, const Tensor& y, const Tensor& normed_out) {
    qn::NormMatmulArgs a;
    a.h = x, a.norm = norm, a.eps = m.eps, a.act = e.act, a.normed = normed_out;
    if (y) a.w = m.head, a.y = y;
    device.norm_matmul(a);
  }

  float* last_hidden() const { return state.tail(); }               // (D): final norm of the last position
  float* last_logits() const { return state.tail() + m.info.width; }  // (V)

  void prepare(int from, int n) {
    const StepParams at[2] = {{from, n}, {std::max(from - 1, 0), from ? n : n - 1}};
    device.upload(step, at, sizeof at);
    device.upload(ids.data, tokens.data() + from, static_cast<size_t>(n) * sizeof(int32_t));
  }

  // The tokens [from, from+n) of the timeline through the model, n <= ubatch. Leaves the logits of the last one in last_logits(),
  // and calls `each` with those of every one when given.
  void forward(int from, int n, const std::function<void(int, std::span<const float>)>* each) {
    prepare(from, n);
    const bool all_rows = e.hook || each || e.mtp;  // final norms of every row are wanted
    auto body = [&] { layers_and_head(n, all_rows); };
    if (all_rows || n > kRecorded) body();
    else device.recorded(this, recording(n), body);
    if (each) all_logits(from, n, *each);
    if (e.mtp) mtp(from, n);
    if (all_rows) device.copy(last_hidden(), hidden.slice(n, 1).data, static_cast<size_t>(m.info.width) * sizeof(float));
    stale = true;
  }

  // The key of the recording of a pass over n tokens; those that choose the next token and those of some operations only have others.
  uint64_t recording(int n) const { return uint64_t{device.selected()} << 8 | static_cast<uint64_t>(n); }

  void layers_and_head(int n, bool all_rows) {
    const Tensor x = h.slice(0, n);
    qn::EmbedArgs em;
    em.ids = ids.slice(0, n), em.table = m.embed, em.h = x;
    device.embed(em);
    trace(-1, "embed", x);
    for (int i = 0; i < m.info.layers; i++) {
      run_layer(m.layers[static_cast<size_t>(i)], i, x, &step[0]);
      trace(i, "layer", x);
    }
    if (n > 1 && all_rows) head(x.slice(0, n - 1), m.norm, {}, hidden.slice(1, n - 1));
    head(x.slice(n - 1, 1), m.norm, view(last_logits(), DType::F32, 1, m.info.vocab),
         all_rows ? hidden.slice(n, 1) : view(last_hidden(), DType::F32, 1, m.info.width));
    if (all_rows) trace(-1, "final_norm", hidden.slice(1, n));
  }

  // ---- a device that chooses tokens: one recording takes the token it chose through the model and chooses the next

  void choose() { chooser.choose(view(last_logits(), DType::F32, 1, m.info.vocab), ids.slice(0, 1), step); }

  void begin_choosing(const SamplerParams& p) {
    chooser.begin({p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty, p.top_k, p.penalty_window,
                   position(), 0, p.seed}, tokens);
    prepare(position() - 1, 1);
    choose();
  }

  // Takes the token that was chosen into the timeline, and starts the choice of the next.
  void advance(int32_t id) {
    if (e.mtp || e.hook) {
      take_token(id);
      choose();
      return;
    }
    tokens.push_back(id);
    device.recorded(this, kRecorded + 1, [&] {
      layers_and_head(1, false);
      choose();
    });
    stale = true;
  }

  // ---- for benchmarks

  void pretend(int to, uint64_t seed) {
    if (to < 1 || to > e.plan.ctx) fail("position %d is outside of the context of %d", to, e.plan.ctx);
    state.randomise(to, seed);
    tokens.resize(static_cast<size_t>(to));
    for (int i = 0; i < to; i++) tokens[static_cast<size_t>(i)] = static_cast<int32_t>((seed + static_cast<uint64_t>(i) * 2654435761u) % static_cast<uint64_t>(m.info.vocab));
    stale = true, state.checkpoint(to);
  }

  uint64_t cache_bytes(int rows) const {  // of the KV cache that `rows` more tokens read, each position once
    return state_shape(m, position() + rows, e.kv_type, false).kv_bytes();
  }

  // A pass over tokens after the timeline, which stays as it is; go_back(position()) afterwards.
  qn::Pass pass_over(std::span<const int32_t> more) {
    const int n = static_cast<int>(more.size()), at = position(), most = std::min(ubatch, e.plan.ctx - at);
    if (n < 1 || n > most) fail("measuring a pass at position %d: expected 1 to %d tokens, got %d", at, most, n);
    for (int32_t id : more) check_token(id);
    state.checkpoint(at);
    auto prepare_again = [this, more, n, at] {
      state.restore(at);
      tokens.insert(tokens.end(), more.begin(), more.end());
      prepare(at, n);
      tokens.resize(static_cast<size_t>(at));
    };
    return {prepare_again, [this, n](bool record) {
      auto body = [&] { layers_and_head(n, false); };
      if (record && n <= kRecorded && !e.hook) device.recorded(this, recording(n), body);
      else body();
    }};
  }

  PassTime pass(std::span<const int32_t> more) {
    PassTime r = qn::time_pass(device, pass_over(more));
    go_back(position());
    r.bytes += cache_bytes(static_cast<int>(more.size()));
    return r;
  }

  std::vector<OpTime> profile(std::span<const int32_t> more) {
    std::vector<OpTime> out = qn::time_operations(device, pass_over(more));
    go_back(position());
    for (OpTime& op : out)
      if (op.name == qn::name(qn::Op::Attention)) op.bytes += cache_bytes(static_cast<int>(more.size()));
    return out;
  }

  uint64_t bytes_per_token() {
    return qn::bytes_asked(device, {{}, [this](bool) { layers_and_head(1, false); }}) + cache_bytes(1);
  }

  // Logits of rows of `x`, normed already when `norm` is empty, in groups small enough for the scratch.
  void head_rows(const Tensor& x, const std::function<void(int64_t row, std::span<const float>)>& row) {
    std::vector<float> host(static_cast<size_t>(kLogitRows) * logits.size());
    for (int64_t r = 0; r < x.rows(); r += kLogitRows) {
      const int64_t k = std::min<int64_t>(kLogitRows, x.rows() - r);
      qn::NormMatmulArgs a;
      a.h = x.slice(r, k), a.act = e.act, a.w = m.head, a.y = logit_rows.slice(0, k);
      device.norm_matmul(a);
      device.download(host.data(), logit_rows.data, static_cast<size_t>(k) * logits.size() * sizeof(float));
      for (int64_t j = 0; j < k; j++) row(r + j, std::span(host).subspan(static_cast<size_t>(j) * logits.size(), logits.size()));
    }
  }

  void all_logits(int from, int n, const std::function<void(int, std::span<const float>)>& each) {
    head_rows(hidden.slice(1, n), [&](int64_t row, std::span<const float> l) { each(from + static_cast<int>(row), l); });
  }

  // Slot i joins the final norm of position i with the embedding of token i+1 and predicts token i+2 (model-spec 5.1). The call's
  // last position waits for the next call, which finds its final norm in last_hidden().
  void mtp(int from, int n) {
    const int first = from ? 0 : 1, slots = n - first;  // token ids[first..n) meet hidden rows [first, n)
    if (slots < 1) return;
    device.copy(hidden.data, last_hidden(), static_cast<size_t>(m.info.width) * sizeof(float));
    const Tensor em = embedded.slice(0, slots), x = h.slice(0, slots);  // the main stream is done with h
    qn::EmbedArgs args;
    args.ids = ids.slice(first, slots), args.table = m.embed, args.h = em;
    device.embed(args);
    qn::ConcatMatmulArgs c;
    c.a = em, c.b = hidden.slice(first, slots), c.norm_a = m.mtp.norm_embed, c.norm_b = m.mtp.norm_hidden;
    c.eps = m.eps, c.act = e.act, c.w = m.mtp.fc, c.y = x;
    device.concat_matmul(c);
    run_layer(m.mtp.layer, m.info.layers, x, &step[1]);
    if (!e.hook) return;
    const Tensor out = normed.slice(0, slots);
    head(x, m.mtp.norm, {}, out);
    trace(-1, "mtp_norm", out);
    head_rows(out, [&](int64_t, std::span<const float> l) { e.hook(-1, "mtp_logits", l, 1, m.info.vocab); });
  }

  // ---- 5. the session ---------------------------------------------------------------------------------------------------

  int position() const { return static_cast<int>(tokens.size()); }

  void check_token(int32_t id) const {
    if (id < 0 || id >= m.info.vocab) fail("token id: expected 0 to %d, got %d", m.info.vocab - 1, id);
  }

  const std::vector<float>& host_logits() {
    if (stale) device.download(logits.data(), last_logits(), logits.size() * sizeof(float));
    stale = false;
    return logits;
  }

  void go_back(int to) {
    tokens.resize(static_cast<size_t>(state.restore(to))), stale = true;
  }

  // Positions worth a checkpoint in tokens[from, end): where the last turn begins, for a next prompt that rewrites the answer
  // after it (a thinking model's thoughts are dropped from history), and the end.
  std::vector<int> checkpoint_positions(std::span<const int32_t> all, int from) const {
    std::vector<int> p;
    const int32_t start = e.tokenizer ? e.tokenizer->find_added("<|im_start|>") : -1;
    if (start >= 0)
      for (int i = static_cast<int>(all.size()) - 1; i > from; i--)
        if (all[static_cast<size_t>(i)] == start) {
          p.push_back(i);
          break;
        }
    p.push_back(static_cast<int>(all.size()));
    return p;
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
    else if (common < static_cast<int>(all.size())) state.checkpoint(common);  // where an answer ended: what an undo goes back to
    r.reused = position();
    const double start = now();
    const std::vector<int> marks = checkpoint_positions(all, position());
    const int total = static_cast<int>(all.size()) - position();
    while (position() < static_cast<int>(all.size())) {
      if (interrupt && *interrupt) {
        r.interrupted = true;
        break;
      }
      const int from = position();
      int end = std::min<int>(from + ubatch, static_cast<int>(all.size()));
      for (int mark : marks)
        if (mark > from) end = std::min(end, mark);
      tokens.insert(tokens.end(), all.begin() + from, all.begin() + end);
      forward(from, end - from, each);
      device.sync();  // progress and time are those of work done
      if (std::ranges::find(marks, end) != marks.end() && !each) state.checkpoint(end);
      r.prefilled += end - from;
      if (progress) progress("prompt", static_cast<uint64_t>(r.prefilled), static_cast<uint64_t>(total));
    }
    timings.prefill_tokens += static_cast<uint64_t>(r.prefilled);
    timings.prefill_seconds += now() - start;
    return r;
  }

  void take_token(int32_t id) {
    check_token(id);
    if (position() >= e.plan.ctx) fail("the context of %d positions is full; start over with a larger --ctx", e.plan.ctx);
    tokens.push_back(id);
    forward(position() - 1, 1, nullptr);
  }

  void decoded(double since) { timings.decode_tokens++, timings.decode_seconds += now() - since; }

  void step_one(int32_t id) {
    const double start = now();
    take_token(id);
    device.sync();
    decoded(start);
  }

  GenerateResult generate(const GenerateParams& p, const std::function<bool(const Delivery&)>& deliver) {
    if (tokens.empty()) fail("nothing to continue: the prompt has no tokens");
    std::vector<uint8_t> allowed;
    if (e.tokenizer && !chooser) {
      allowed.resize(logits.size());
      for (size_t i = 0; i < allowed.size(); i++) allowed[i] = e.tokenizer->has(static_cast<int32_t>(i));
    }
    qn::Sampler sampler(p.sampling, std::move(allowed));
    qn::TextStream stream(p.stop);
    GenerateResult r{{}, {}, Finish::Length, 0};
    const double start = now();
    const int begin = position();
    std::vector<size_t> ends;  // bytes of text after each token
    size_t text_bytes = 0;
    bool go = true;
    auto give = [&](int32_t id, const std::string& text) {
      r.text += text;
      return !deliver || deliver({id, text});
    };
    double started = 0;  // when the pass began that is still under way on a device that chooses
    if (chooser) begin_choosing(p.sampling);
    while (true) {
      if (p.max_tokens >= 0 && static_cast<int>(r.ids.size()) >= p.max_tokens) break;
      if (position() >= e.plan.ctx) {
        r.finish = Finish::ContextFull;
        break;
      }
      if (!go || (p.interrupt && *p.interrupt)) {
        r.finish = Finish::Interrupted;
        break;
      }
      const int32_t id = chooser ? chooser.wait(position()) : sampler.next(host_logits(), tokens, r.ids.size(), static_cast<uint64_t>(position()));
      if (started > 0) decoded(std::exchange(started, 0));
      if (p.stop_at_end_tokens && std::ranges::find(m.info.end_tokens, id) != m.info.end_tokens.end()) {
        r.finish = Finish::EndToken;
        break;
      }
      const bool had_all = stream.taken() == stream.given();
      std::string bytes;
      if (e.tokenizer && !e.tokenizer->special(id)) bytes = e.tokenizer->bytes(id);
      const std::string text = stream.add(bytes);
      text_bytes += bytes.size();
      if (stream.stopped()) {
        r.finish = Finish::StopString;
        if (!text.empty()) give(-1, text);
        break;
      }
      // If this token opens what may become a stop string, the state before it is where a roll-back would go.
      if (!p.stop.empty() && had_all && stream.taken() != stream.given()) state.checkpoint(position(), true);
      r.ids.push_back(id);
      ends.push_back(text_bytes);
      if (chooser) started = now(), advance(id);  // the GPU computes while the text is shown
      go = give(id, text);
      if (!chooser) step_one(id);
    }
    if (started > 0) device.sync(), decoded(started);  // as many passes as tokens are in the time of both
    if (r.finish == Finish::StopString) {
      // Keep the tokens whose text was delivered whole; at a boundary also those without any text that follow.
      size_t keep = 0;
      while (keep < ends.size() && ends[keep] <= stream.given()) keep++;
      if (keep < r.ids.size()) {
        r.ids.resize(keep);
        const std::vector<int32_t> want(tokens.begin(), tokens.begin() + begin + static_cast<std::ptrdiff_t>(keep));
        go_back(static_cast<int>(want.size()));
        if (position() < static_cast<int>(want.size())) replay(want);
      }
    } else if (const std::string rest = stream.finish(); !rest.empty()) {
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
  engine.impl_->reserved = {};
  impl_ = std::make_unique<Impl>(*engine.impl_);
}
Session::Session(Session&&) noexcept = default;
Session::~Session() = default;

SyncResult Session::sync(std::span<const int32_t> tokens, const Progress& progress, const std::atomic<bool>* interrupt) {
  return impl_->sync(tokens, progress, interrupt, nullptr);
}
SyncResult Session::sync_all(std::span<const int32_t> tokens, const std::function<void(int, std::span<const float>)>& each) {
  return impl_->sync(tokens, {}, nullptr, &each);
}
void Session::step(int32_t token) { impl_->step_one(token); }
std::span<const float> Session::logits() const { return impl_->host_logits(); }
const std::vector<int32_t>& Session::tokens() const { return impl_->tokens; }
int Session::position() const { return impl_->position(); }
int Session::context() const { return impl_->e.plan.ctx; }
int Session::rewind(int position) {
  if (position < impl_->position()) impl_->go_back(std::max(position, 0));
  return impl_->position();
}
void Session::clear() {
  impl_->tokens.clear();
  impl_->state.reset();
  impl_->stale = true;
}
GenerateResult Session::generate(const GenerateParams& params, const std::function<bool(const Delivery&)>& deliver) {
  return impl_->generate(params, deliver);
}
Timings Session::timings() const { return impl_->timings; }
void Session::pretend(int position, uint64_t seed) { impl_->pretend(position, seed); }
std::vector<OpTime> Session::profile(std::span<const int32_t> tokens) { return impl_->profile(tokens); }
PassTime Session::pass(std::span<const int32_t> tokens) { return impl_->pass(tokens); }
uint64_t Session::bytes_per_token() const { return impl_->bytes_per_token(); }
uint64_t Session::state_hash() const { return impl_->state.hash(impl_->position()); }

}  // namespace qnext
