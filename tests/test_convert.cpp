// The converter against a second derivation of every tensor, written from the specification and sharing nothing with convert/names.
#include <doctest/doctest.h>
#include <sys/stat.h>  // mkfifo

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "convert/convert.h"
#include "convert/source.h"
#include "convert/synthetic.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/base/safetensors.h"
#include "ggml-lite/core/codec.h"
#include "tests/temp_dir.h"

namespace qn {
namespace {

namespace fs = std::filesystem;
using Values = std::vector<float>;

const std::string kTiny = std::string(QN_TEST_DATA) + "/tiny", kFp8 = std::string(QN_TEST_DATA) + "/tiny-fp8";

// ---- checkpoints made here ------------------------------------------------------------------------------------------

struct Raw {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};
using Tensors = std::map<std::string, Raw>;

Tensors load(const std::string& folder) {
  const SafeTensors s = SafeTensors::open_folder(folder);
  Tensors all;
  for (const auto& [name, t] : s.tensors()) {
    Raw& r = all[name] = {t.dtype, t.shape, std::vector<uint8_t>(t.bytes)};
    s.read(t, 0, r.bytes);
  }
  return all;
}

void save_file(const std::string& path, const Tensors& tensors) {
  Json header = Json::object();
  int64_t end = 0;
  for (const auto& [name, r] : tensors) {
    Json shape = Json::array(), offsets = Json::array(), entry = Json::object();
    for (const int64_t n : r.shape) shape.push(Json::number(n));
    offsets.push(Json::number(end));
    offsets.push(Json::number(end += static_cast<int64_t>(r.bytes.size())));
    entry.set("dtype", Json::string(r.dtype)).set("shape", shape).set("data_offsets", offsets);
    header.set(name, entry);
  }
  const std::string text = header.dump();
  std::vector<uint8_t> all(8);
  const uint64_t size = text.size();
  std::memcpy(all.data(), &size, 8);
  all.insert(all.end(), text.begin(), text.end());
  for (const auto& [name, r] : tensors) all.insert(all.end(), r.bytes.begin(), r.bytes.end());
  put_file(path, all);
}

void save_text(const std::string& path, const std::string& text) { put_file(path, {text.begin(), text.end()}); }

// One folder with the given tensors and config; shards > 0: split, with an index.
std::string save(const std::string& folder, const Tensors& tensors, const Json& config, int shards = 0) {
  fs::create_directories(folder);
  save_text(folder + "/config.json", config.dump());
  if (!shards) {
    save_file(folder + "/model.safetensors", tensors);
    return folder;
  }
  std::vector<Tensors> parts(shards);
  Json map = Json::object(), index = Json::object();
  size_t i = 0;
  for (const auto& [name, r] : tensors) {
    const size_t part = i++ * 7 % shards;
    parts[part][name] = r;
    map.set(name, Json::string("model-" + std::to_string(part) + ".safetensors"));
  }
  for (int p = 0; p < shards; p++) save_file(folder + "/model-" + std::to_string(p) + ".safetensors", parts[p]);
  save_text(folder + "/model.safetensors.index.json", index.set("weight_map", map).dump());
  return folder;
}

Json config_of(const std::string& folder) { return Json::parse(read_text(folder + "/config.json", 1 << 20), "config"); }

// Shapes where nothing is equal by chance: three value heads per key head, all widths different, attention in every second layer.
const char* const kOddConfig = R"({"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 96,
  "num_hidden_layers": 3, "full_attention_interval": 2, "vocab_size": 37, "max_position_embeddings": 128, "rope_theta": 5e6,
  "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5, "linear_num_key_heads": 2,
  "linear_num_value_heads": 6, "linear_key_head_dim": 64, "linear_value_head_dim": 32, "num_experts": 5, "num_experts_per_tok": 2,
  "moe_intermediate_size": 32, "shared_expert_intermediate_size": 160, "tie_word_embeddings": true, "eos_token_id": [3, 4]})";

// F32 values that BF16 cannot hold, so that rounding shows.
Tensors random_checkpoint(const ModelConfig& c) {
  Tensors all;
  uint64_t state = 7;
  for_each_source(model_layout(c, {}), [&](const SourceTensor& s) {
    int64_t n = 1;
    for (const int64_t d : s.shape) n *= d;
    Raw r{"F32", s.shape, std::vector<uint8_t>(static_cast<size_t>(4 * n))};
    for (int64_t i = 0; i < n; i++) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      const float v = static_cast<float>(static_cast<double>(state >> 33) / 4294967296.0 - 0.25);
      std::memcpy(r.bytes.data() + 4 * i, &v, 4);
    }
    all[s.name] = r;
  });
  return all;
}

// ---- what must come out, from the formulas of model-spec 3.2, 3.8, 6, 10 ---------------------------------------------

float naive_e4m3(uint8_t b) {
  const double sign = b & 128 ? -1 : 1, m = b & 7;
  const int e = b >> 3 & 15;
  return static_cast<float>(sign * (e ? std::pow(2.0, e - 7) * (1 + m / 8) : std::pow(2.0, -6) * (m / 8)));
}

struct Naive {
  const Tensors& t;
  const ModelConfig& c;

  float at(const Raw& r, size_t i) const {
    uint16_t h = 0;
    float f = 0;
    if (r.dtype == "F32") return std::memcpy(&f, &r.bytes[4 * i], 4), f;
    return std::memcpy(&h, &r.bytes[2 * i], 2), r.dtype == "F16" ? half_to_float(h) : bf16_to_float(h);
  }
  Values all(const std::string& name) const {
    const Raw& r = t.at(name);
    size_t n = 1;
    for (const int64_t d : r.shape) n *= static_cast<size_t>(d);
    Values v(n);
    for (size_t i = 0; i < n; i++) {
      if (r.dtype == "F8_E4M3") {
        const Raw& s = t.at(name + "_scale_inv");
        const size_t cols = static_cast<size_t>(r.shape[1]);
        v[i] = round_bf16(naive_e4m3(r.bytes[i]) * at(s, i / cols / 128 * static_cast<size_t>(s.shape[1]) + i % cols / 128));
      } else {
        v[i] = at(r, i);
      }
    }
    return v;
  }
  Values plus_one(const std::string& name) const {
    Values v = all(name);
    for (float& x : v) x = 1.0f + x;
    return v;
  }
  static void append(Values& to, const Values& from, int64_t row, int64_t cols) {
    to.insert(to.end(), from.begin() + row * cols, from.begin() + (row + 1) * cols);
  }

  // Rows as the file holds them before the interleaving of gate and up.
  Values dense(const std::string& name) const {
    if (name == "embed") return all("model.embed_tokens.weight");
    if (name == "head" || name == "mtp.head") return all(c.tied ? "model.embed_tokens.weight" : "lm_head.weight");
    if (name == "norm") return plus_one("model.norm.weight");
    if (name == "mtp.norm_embed") return plus_one("mtp.pre_fc_norm_embedding.weight");
    if (name == "mtp.norm_hidden") return plus_one("mtp.pre_fc_norm_hidden.weight");
    if (name == "mtp.norm") return plus_one("mtp.norm.weight");
    if (name == "mtp.fc") return all("mtp.fc.weight");
    const bool mtp = name.rfind("mtp.layer.", 0) == 0;
    const size_t cut = mtp ? 10 : name.find('.', 7) + 1;
    const std::string p = mtp ? "mtp.layers.0." : "model.layers." + name.substr(7, cut - 7), part = name.substr(cut);
    const int64_t d = c.width, dk = c.key_dim, dv = c.value_dim, r = c.value_heads / c.key_heads, dh = c.head_dim;
    Values out;
    if (part == "norm1") return plus_one(p + "input_layernorm.weight");
    if (part == "norm2") return plus_one(p + "post_attention_layernorm.weight");
    if (part == "delta.qkvz") {
      const Values w = all(p + "linear_attn.in_proj_qkvz.weight");
      const int64_t block = 2 * dk + 2 * r * dv;
      for (int64_t h = 0; h < c.key_heads; h++)
        for (int64_t i = 0; i < dk; i++) append(out, w, block * h + i, d);
      for (int64_t h = 0; h < c.key_heads; h++)
        for (int64_t i = 0; i < dk; i++) append(out, w, block * h + dk + i, d);
      for (int64_t h = 0; h < c.value_heads; h++)
        for (int64_t i = 0; i < dv; i++) append(out, w, block * (h / r) + 2 * dk + dv * (h % r) + i, d);
      for (int64_t h = 0; h < c.value_heads; h++)
        for (int64_t i = 0; i < dv; i++) append(out, w, block * (h / r) + 2 * dk + r * dv + dv * (h % r) + i, d);
    } else if (part == "delta.ba") {
      const Values w = all(p + "linear_attn.in_proj_ba.weight");
      for (int64_t h = 0; h < c.value_heads; h++) append(out, w, 2 * r * (h / r) + h % r, d);
      for (int64_t h = 0; h < c.value_heads; h++) append(out, w, 2 * r * (h / r) + r + h % r, d);
    } else if (part == "delta.conv") {
      return all(p + "linear_attn.conv1d.weight");
    } else if (part == "delta.neg_a") {
      out = all(p + "linear_attn.A_log");
      for (float& x : out) x = -std::exp(x);
    } else if (part == "delta.dt_bias") {
      return all(p + "linear_attn.dt_bias");
    } else if (part == "delta.norm") {
      return all(p + "linear_attn.norm.weight");
    } else if (part == "delta.out") {
      return all(p + "linear_attn.out_proj.weight");
    } else if (part == "attn.qgkv") {
      const Values q = all(p + "self_attn.q_proj.weight"), k = all(p + "self_attn.k_proj.weight"), v = all(p + "self_attn.v_proj.weight");
      for (int64_t h = 0; h < c.heads; h++)
        for (int64_t i = 0; i < dh; i++) append(out, q, 2 * dh * h + i, d);
      for (int64_t h = 0; h < c.heads; h++)
        for (int64_t i = 0; i < dh; i++) append(out, q, 2 * dh * h + dh + i, d);
      out.insert(out.end(), k.begin(), k.end());
      out.insert(out.end(), v.begin(), v.end());
    } else if (part == "attn.q_norm" || part == "attn.k_norm") {
      return plus_one(p + "self_attn." + part.substr(5) + ".weight");
    } else if (part == "attn.out") {
      return all(p + "self_attn.o_proj.weight");
    } else if (part == "moe.router") {
      return all(p + "mlp.gate.weight");
    } else if (part == "moe.shared_gate") {
      return all(p + "mlp.shared_expert_gate.weight");
    } else if (part == "moe.shared_gate_up") {
      out = all(p + "mlp.shared_expert.gate_proj.weight");
      const Values up = all(p + "mlp.shared_expert.up_proj.weight");
      out.insert(out.end(), up.begin(), up.end());
    } else if (part == "moe.shared_down") {
      return all(p + "mlp.shared_expert.down_proj.weight");
    }
    return out;
  }

  std::vector<uint8_t> stored(const QnTensor& q, ScaleSearch search) const {
    if (!q.experts) {
      Values v = dense(q.name);
      if (q.name.ends_with("shared_gate_up")) {
        const int64_t f = q.shape[0] / 2, d = q.shape[1];
        std::vector<uint8_t> out(q.bytes);
        encode_gate_up(q.dtype, d, f, q.group, v.data(), v.data() + f * d, search, out, nullptr);
        return out;
      }
      const int64_t n = q.shape.size() == 1 ? 1 : q.shape[0], k = q.shape.back();
      REQUIRE(static_cast<int64_t>(v.size()) == n * k);
      std::vector<uint8_t> out(q.bytes);
      encode_rows(q.dtype, n, k, q.group, v.data(), search, out, nullptr);
      return out;
    }
    const bool mtp = q.name == "mtp.layer.moe.experts";
    const std::string layer = mtp ? "mtp.layers.0" : "model." + q.name.substr(0, q.name.find('.', 7));
    const ExpertLayout l = expert_layout(q.dtype, q.shape[1], q.shape[2], q.group);
    std::vector<uint8_t> out(q.bytes);
    for (int64_t e = 0; e < q.shape[0]; e++) {
      const std::string p = layer + ".mlp.experts." + std::to_string(e) + ".";
      encode_expert(q.dtype, q.shape[1], q.shape[2], q.group, all(p + "gate_proj.weight").data(), all(p + "up_proj.weight").data(),
                    all(p + "down_proj.weight").data(), search,
                    std::span(out).subspan(static_cast<size_t>(e * l.stride), static_cast<size_t>(l.stride)), nullptr);
    }
    return out;
  }
};

std::set<std::string> wanted_names(const ModelConfig& c, bool mtp, bool head, bool draft) {
  std::set<std::string> names = {"embed", "norm"};
  if (head) names.insert("head");
  auto layer = [&](const std::string& p, bool attends) {
    for (const char* n : {"norm1", "norm2", "moe.router", "moe.shared_gate", "moe.shared_gate_up", "moe.shared_down", "moe.experts"})
      names.insert(p + n);
    for (const char* n : {"attn.qgkv", "attn.q_norm", "attn.k_norm", "attn.out"})
      if (attends) names.insert(p + n);
    for (const char* n : {"delta.qkvz", "delta.ba", "delta.conv", "delta.neg_a", "delta.dt_bias", "delta.norm", "delta.out"})
      if (!attends) names.insert(p + n);
  };
  for (int64_t i = 0; i < c.layers; i++) layer("layers." + std::to_string(i) + ".", c.kinds[static_cast<size_t>(i)]);
  if (mtp) {
    if (draft) names.insert("mtp.head");
    for (const char* n : {"mtp.norm_embed", "mtp.norm_hidden", "mtp.fc", "mtp.norm"}) names.insert(n);
    layer("mtp.layer.", true);
  }
  return names;
}

void check_file(const std::string& qn, const std::string& folder, const ConvertOptions& o, bool mtp = true) {
  const Tensors source = load(folder);
  const ModelConfig c = read_config(folder);
  const QnFile file = QnFile::open(qn);
  const Naive naive{source, c};
  std::set<std::string> names;
  for (const QnTensor& t : file.tensors()) {
    CAPTURE(t.name);
    names.insert(t.name);
    const std::vector<uint8_t> want = naive.stored(t, o.scale);
    const auto got = file.data(t);
    CHECK(std::equal(want.begin(), want.end(), got.begin(), got.end()));
    const bool rest = t.name == "head" || t.name.ends_with("qkvz") || t.name.ends_with("qgkv") || t.name.ends_with(".out") ||
                      t.name.ends_with("shared_gate_up") || t.name.ends_with("shared_down");
    CHECK(t.dtype == (t.experts ? o.recipe.experts : t.name == "mtp.head" ? draft_format(o.recipe, c.vocab, c.width) : rest ? o.recipe.rest : t.shape.size() == 1 ? DType::F32 : DType::BF16));
  }
  CHECK(names == wanted_names(c, mtp, !c.tied || o.recipe.rest != DType::BF16, o.recipe.rest != draft_format(o.recipe, c.vocab, c.width)));
  file.verify(1);
}

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

size_t files_in(const std::string& folder) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

}  // namespace

// ---- tests ----------------------------------------------------------------------------------------------------------

TEST_CASE("convert: row maps of the real model are those of the specification") {
  const std::vector<Target> layout = model_layout(synthetic_config("qwen3-next-80b-a3b", 4), {});
  auto source_row = [&](const std::string& name, int64_t row) -> std::pair<std::string, int64_t> {
    for (const Target& t : layout) {
      if (t.tensor.name != name) continue;
      for (const RowRun& r : t.matrix.order) {
        if (row < r.count) return {t.matrix.from[static_cast<size_t>(r.from)].name, r.begin + row};
        row -= r.count;
      }
    }
    return {"", -1};
  };
  auto qkvz = [&](int64_t row) { return source_row("layers.0.delta.qkvz", row).second; };
  CHECK(qkvz(0) == 0);              // q[0][0]
  CHECK(qkvz(127) == 127);          // q[0][127]
  CHECK(qkvz(128) == 768);          // q[1][0]
  CHECK(qkvz(2048) == 128);         // k[0][0]
  CHECK(qkvz(4096) == 256);         // v[0][0]
  CHECK(qkvz(4096 + 128) == 384);   // v[1][0]
  CHECK(qkvz(4096 + 256) == 1024);  // v[2][0]
  CHECK(qkvz(8192) == 512);         // z[0][0]
  CHECK(qkvz(8192 + 128) == 640);   // z[1][0]
  CHECK(qkvz(12287) == 12287);      // z[31][127]
  for (int64_t h = 0; h < 32; h++) {
    CHECK(source_row("layers.1.delta.ba", h).second == 4 * (h / 2) + h % 2);
    CHECK(source_row("layers.1.delta.ba", 32 + h).second == 4 * (h / 2) + 2 + h % 2);
  }
  const std::string attention = "model.layers.3.self_attn.";
  for (int64_t h = 0; h < 16; h++) {
    CHECK(source_row("layers.3.attn.qgkv", 256 * h + 5) == std::pair(attention + "q_proj.weight", 512 * h + 5));
    CHECK(source_row("layers.3.attn.qgkv", 4096 + 256 * h + 5) == std::pair(attention + "q_proj.weight", 512 * h + 261));
  }
  CHECK(source_row("layers.3.attn.qgkv", 8192 + 300) == std::pair(attention + "k_proj.weight", int64_t{300}));
  CHECK(source_row("layers.3.attn.qgkv", 8704 + 300) == std::pair(attention + "v_proj.weight", int64_t{300}));
}

TEST_CASE("convert: the tensors of the published models, by number and size") {
  auto count = [](bool mtp) {
    LayoutOptions o;
    o.mtp = mtp;
    int64_t n = 0, values = 0;
    for_each_source(model_layout(synthetic_config("qwen3-next-80b-a3b", 0), o), [&](const SourceTensor& s) {
      n++;
      values += std::accumulate(s.shape.begin(), s.shape.end(), int64_t{1}, std::multiplies<>());
    });
    return std::pair(n, values);
  };
  CHECK(count(false) == std::pair(int64_t{74391}, int64_t{79674391296}));
  CHECK(count(true) == std::pair(int64_t{75944}, int64_t{81324862720}));
}

TEST_CASE("convert: every byte, all formats") {
  TempDir dir;
  const std::string odd =
      save(dir / "odd", random_checkpoint(parse_config(Json::parse(kOddConfig, "odd"), "odd")), Json::parse(kOddConfig, "odd"));
  for (const std::string& folder : {kTiny, odd}) {
    for (const DType experts : {DType::INT4, DType::INT8, DType::BF16}) {
      for (const DType rest : {DType::BF16, DType::INT8}) {
        for (const int group : {0, 32}) {
          if (group && experts != DType::INT4) continue;
          ConvertOptions o;
          o.recipe = {experts, rest, group, group || rest != DType::BF16 ? DType::INT4 : DType::INT8};
          o.scale = group ? ScaleSearch::Max : ScaleSearch::LeastSquares;
          o.threads = group ? 1 : 3;
          CAPTURE(folder);
          CAPTURE(name(experts));
          CAPTURE(name(rest));
          const ConvertReport r = convert_folder(folder, dir / "m.qn", o);
          check_file(dir / "m.qn", folder, o);
          CHECK(r.file_bytes == fs::file_size(dir / "m.qn"));
          CHECK(r.mtp);
          uint64_t bytes = 0;
          for (const auto& line : r.lines) {
            bytes += line.bytes;
            if (line.format.rfind("int4", 0) == 0) CHECK((line.error.relative() > 0.03 && line.error.relative() < 0.2));
            if (line.format.rfind("int8", 0) == 0) CHECK((line.error.relative() > 0.0005 && line.error.relative() < 0.01));
            if (line.format == "bf16") CHECK((line.error.relative() < 0.003 && (line.error.squared > 0) == (folder == odd)));
          }
          const QnFile f = QnFile::open(dir / "m.qn");
          uint64_t want = 0;
          for (const QnTensor& t : f.tensors()) want += t.bytes;
          CHECK(bytes == want);
          CHECK(f.text("quant.experts") == name(experts));
          CHECK(f.text("quant.rest") == name(rest));
          const int64_t largest = folder == odd ? 32 : 64;
          CHECK(f.integer("quant.group", 0, 128) == (experts == DType::BF16 ? 0 : group ? group : largest));
        }
      }
    }
  }
  ConvertOptions o;
  o.recipe.group = 128;
  CHECK(has(error_of([&] { convert_folder(kTiny, dir / "m.qn", o); }), "--group 128"));
}

TEST_CASE("convert: large matrices are cut into blocks without a seam") {
  // 1 MiB of values and more in embed, head, fused and single experts; blocks are kBlockValues.
  TempDir dir;
  Json config = Json::parse(kOddConfig, "c");
  config.set("hidden_size", Json::number(int64_t{1056}))
      .set("vocab_size", Json::number(int64_t{1501}))
      .set("num_hidden_layers", Json::number(int64_t{1}));
  config.set("moe_intermediate_size", Json::number(int64_t{512})).set("num_experts", Json::number(int64_t{2}));
  const ModelConfig c = parse_config(config, "c");
  REQUIRE(c.vocab * c.width > 2 * kBlockValues);
  REQUIRE(2 * c.expert_width * c.width > 2 * kBlockValues);
  LayoutOptions no_mtp;
  no_mtp.mtp = false;
  Tensors t = random_checkpoint(c);
  std::erase_if(t, [](const auto& entry) { return entry.first.rfind("mtp.", 0) == 0; });
  const std::string folder = save(dir / "c", t, config);
  ConvertOptions o;
  o.recipe.rest = DType::INT8, o.scale = ScaleSearch::Max, o.threads = 2;
  const ConvertReport r = convert_folder(folder, dir / "m.qn", o);
  CHECK_FALSE(r.mtp);
  check_file(dir / "m.qn", folder, o, false);
}

TEST_CASE("convert: FP8 blocks are dequantised in float32 and rounded once to BF16") {
  TempDir dir;
  ConvertOptions o;
  Tensors t = load(kFp8);
  REQUIRE(t.count("model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"));
  for (const DType experts : {DType::INT8, DType::BF16}) {
    o.recipe.experts = experts;
    convert_folder(kFp8, dir / "m.qn", o);
    check_file(dir / "m.qn", kFp8, o);
  }
  for (int code = 0; code < 256; code++) {
    if ((code & 127) == 127)
      CHECK(std::isnan(e4m3_to_float(static_cast<uint8_t>(code))));
    else
      CHECK(e4m3_to_float(static_cast<uint8_t>(code)) == naive_e4m3(static_cast<uint8_t>(code)));
  }
  CHECK(e4m3_to_float(0x7e) == 448);

  // Scales that differ from block to block and BF16 as their type.
  int i = 0;
  for (auto& [name, r] : t) {
    if (!name.ends_with("_scale_inv")) continue;
    const size_t n = r.bytes.size() / 4;
    r.dtype = "BF16", r.bytes.resize(2 * n);
    for (size_t j = 0; j < n; j++) {
      const uint16_t h = float_to_bf16(0.01f * static_cast<float>(1 + i++ % 29));
      std::memcpy(&r.bytes[2 * j], &h, 2);
    }
  }
  const std::string folder = save(dir / "bf16-scales", t, config_of(kFp8));
  convert_folder(folder, dir / "m.qn", o);
  check_file(dir / "m.qn", folder, o);

  Tensors bad = t;
  bad.erase("model.layers.0.linear_attn.out_proj.weight_scale_inv");
  CHECK(has(error_of([&] { convert_folder(save(dir / "bad1", bad, config_of(kFp8)), dir / "b.qn", o); }),
            "missing model.layers.0.linear_attn.out_proj.weight_scale_inv [1, 4]"));
  bad = t;
  bad.at("model.layers.0.linear_attn.out_proj.weight_scale_inv").shape = {4, 1};
  CHECK(has(error_of([&] { convert_folder(save(dir / "bad2", bad, config_of(kFp8)), dir / "b.qn", o); }),
            "misshapen model.layers.0.linear_attn.out_proj.weight_scale_inv"));
  bad = t;
  bad.at("model.layers.1.linear_attn.out_proj.weight").bytes[700] = 0x7f;
  CHECK(has(error_of([&] { convert_folder(save(dir / "bad3", bad, config_of(kFp8)), dir / "b.qn", o); }),
            "model.layers.1.linear_attn.out_proj.weight: row 1 holds a value that is not finite"));
}

TEST_CASE("convert: fused experts, shards, F16 and F32 give the same file") {
  TempDir dir;
  const Tensors tiny = load(kTiny);
  const Json config = config_of(kTiny);
  ConvertOptions o;
  o.threads = 2;
  for (const DType experts : {DType::INT4, DType::BF16}) {
    o.recipe.experts = experts;
    convert_folder(save(dir / "1/m", tiny, config), dir / "1.qn", o);
    const auto want = file_bytes(dir / "1.qn");
    REQUIRE(want.size() > 1 << 20);

    Tensors fused;
    for (const auto& [name, r] : tiny) {
      const size_t at = name.find(".mlp.experts.");
      if (at == std::string::npos) {
        fused[name] = r;
        continue;
      }
      const std::string prefix = name.substr(0, at + 13);
      const int64_t e = config.find("num_experts")->as_int("E"), d = config.find("hidden_size")->as_int("D"),
                    f = config.find("moe_intermediate_size")->as_int("F");
      Raw &gate_up = fused[prefix + "gate_up_proj"], &down = fused[prefix + "down_proj"];
      if (gate_up.shape.empty()) {
        gate_up = {"BF16", {e, 2 * f, d}, std::vector<uint8_t>(static_cast<size_t>(4 * e * f * d))};
        down = {"BF16", {e, d, f}, std::vector<uint8_t>(static_cast<size_t>(2 * e * f * d))};
      }
      const int64_t expert = std::stoll(name.substr(at + 13)), size = 2 * f * d;
      const int64_t to = name.find("down_proj") != std::string::npos
                             ? expert * size
                             : expert * 2 * size + (name.find("up_proj") != std::string::npos ? size : 0);
      std::memcpy((name.find("down_proj") != std::string::npos ? down : gate_up).bytes.data() + to, r.bytes.data(), r.bytes.size());
    }
    REQUIRE(fused.size() < tiny.size());
    convert_folder(save(dir / "2/m", fused, config), dir / "2.qn", o);
    CHECK(file_bytes(dir / "2.qn") == want);

    convert_folder(save(dir / "3/m", tiny, config, 3), dir / "3.qn", o);
    CHECK(file_bytes(dir / "3.qn") == want);

    Tensors wide = tiny;  // BF16 is a part of F32
    for (auto& [name, r] : wide) {
      std::vector<uint8_t> bytes(2 * r.bytes.size());
      for (size_t i = 0; i < r.bytes.size(); i += 2) std::memcpy(&bytes[2 * i + 2], &r.bytes[i], 2);
      r = {"F32", r.shape, bytes};
    }
    convert_folder(save(dir / "4/m", wide, config), dir / "4.qn", o);
    CHECK(file_bytes(dir / "4.qn") == want);
  }
  Tensors half = tiny;
  Raw& r = half.at("model.layers.0.mlp.gate.weight");
  r.dtype = "F16";
  for (size_t i = 0; i < r.bytes.size(); i += 2) {
    const uint16_t h = float_to_half(static_cast<float>(i) / 1000);
    std::memcpy(&r.bytes[i], &h, 2);
  }
  o.recipe.experts = DType::BF16;
  const std::string folder = save(dir / "5/m", half, config);
  convert_folder(folder, dir / "5.qn", o);
  check_file(dir / "5.qn", folder, o);
}

TEST_CASE("convert: tensors that do not fit are named") {
  TempDir dir;
  const Tensors tiny = load(kTiny);
  const Json config = config_of(kTiny);
  std::vector<std::string> lines;
  ConvertOptions o;
  o.notice = [&](const std::string& line) { lines.push_back(line); };
  auto refuse = [&](const Tensors& t, const Json& c = Json()) {
    lines.clear();
    fs::remove_all(dir / "m");
    const std::string message = error_of([&] { convert_folder(save(dir / "m", t, c.is_null() ? config : c), dir / "m.qn", o); });
    CHECK_FALSE(message.empty());
    CHECK_FALSE(fs::exists(dir / "m.qn"));
    return message;
  };
  auto told = [&](const std::string& part) { return std::any_of(lines.begin(), lines.end(), [&](const auto& l) { return has(l, part); }); };

  Tensors t = tiny;
  t.erase("model.layers.2.mlp.gate.weight");
  CHECK(has(refuse(t), "1 missing, 0 unexpected, 0 misshapen; first: missing model.layers.2.mlp.gate.weight [8, 64]"));
  CHECK(told("missing model.layers.2.mlp.gate.weight"));

  t = tiny;
  t["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"F32", {1}, std::vector<uint8_t>(4)};
  CHECK(has(refuse(t), "0 missing, 1 unexpected, 0 misshapen; first: unexpected model.layers.0.self_attn.rotary_emb.inv_freq"));

  t = tiny;
  std::swap(t.at("model.layers.0.mlp.shared_expert_gate.weight").shape[0], t.at("model.layers.0.mlp.shared_expert_gate.weight").shape[1]);
  CHECK(has(refuse(t), "first: misshapen model.layers.0.mlp.shared_expert_gate.weight: expected [1, 64], got [64, 1]"));

  t = tiny;
  t.at("lm_head.weight").dtype = "I16";
  CHECK(has(refuse(t), "misshapen lm_head.weight: expected BF16"));

  t = tiny;
  t.erase("mtp.fc.weight");
  CHECK(has(refuse(t), "missing mtp.fc.weight [64, 128]"));

  t = tiny;
  std::erase_if(t, [](const auto& e) { return has(e.first, ".mlp.experts."); });
  CHECK(has(refuse(t), "120 missing"));
  CHECK(lines.size() == 15);  // three matrices of five layers
  CHECK(told("missing model.layers.3.mlp.experts.{0..7}.gate_proj.weight [64, 64]"));
  CHECK(told("missing mtp.layers.0.mlp.experts.{0..7}.down_proj.weight [64, 64]"));

  t = tiny;  // experts of other fates, numbers beyond ten, and what only looks like an expert
  const std::string experts = "model.layers.1.mlp.experts.";
  for (const char* e : {"0", "3", "4", "5", "7"}) t.erase(experts + e + ".up_proj.weight");
  t.erase(experts + "6.gate_proj.weight");
  t.at(experts + "2.down_proj.weight").shape = {32, 128};
  for (const char* e : {"8", "9", "10", "11", "007", "99999999999"}) t[experts + e + ".up_proj.weight"] = {"BF16", {1}, {0, 0}};
  CHECK(has(refuse(t), "6 missing, 6 unexpected, "));
  CHECK(told("missing " + experts + "{0,3..5,7}.up_proj.weight [64, 64]"));
  CHECK(told("missing " + experts + "6.gate_proj.weight [64, 64]"));
  CHECK(told("misshapen " + experts + "2.down_proj.weight: expected [64, 64], got [32, 128]"));
  CHECK(told("unexpected " + experts + "{8..11}.up_proj.weight [1]"));
  CHECK(told("unexpected " + experts + "007.up_proj.weight [1]"));
  CHECK(told("unexpected " + experts + "99999999999.up_proj.weight [1]"));

  Json tied = config;
  t = tiny;
  t.erase("model.embed_tokens.weight");
  o.recipe.rest = DType::INT8;  // the embedding is read twice, and missing once
  CHECK(has(refuse(t, tied.set("tie_word_embeddings", Json::boolean(true))), "1 missing, 0 unexpected"));
  o.recipe.rest = DType::BF16;

  t = tiny;
  t["model.layers.0.mlp.switch_mlp.gate_proj.weight"] = {"BF16", {1}, {0, 0}};
  CHECK(has(refuse(t), "MLX"));
  t = tiny;
  t.at("model.layers.0.linear_attn.conv1d.weight").shape = {1024, 4, 1};
  CHECK(has(refuse(t), "MLX"));
  t = tiny;
  t["model.layers.0.linear_attn.in_proj_qkv.weight"] = {"BF16", {1}, {0, 0}};
  CHECK(has(refuse(t), "Qwen3.5"));
  t = tiny;
  t["mtp.layers.0.eh_proj.weight"] = {"BF16", {1}, {0, 0}};
  CHECK(has(refuse(t), "Megatron"));

  t = tiny;
  t.at("model.layers.1.linear_attn.A_log").bytes = {0x80, 0x7f, 0, 0, 0, 0, 0, 0};  // infinite
  CHECK(has(refuse(t), "model.layers.1.linear_attn.A_log"));
  t = tiny;
  t.at("model.layers.1.linear_attn.A_log").bytes = {0xc8, 0x42, 0, 0, 0, 0, 0, 0};  // e^100
  CHECK(has(refuse(t), "model.layers.1.linear_attn.A_log: a value is too large"));

  t = tiny;  // norms that hold 1 + w
  for (int i = 0; i < 4; i++) {
    Raw& r = t.at("model.layers." + std::to_string(i) + ".input_layernorm.weight");
    for (size_t j = 0; j < r.bytes.size(); j += 2) r.bytes[j] = 0x80, r.bytes[j + 1] = 0x3f;
  }
  Raw& r = t.at("mtp.layers.0.input_layernorm.weight");
  for (size_t j = 0; j < r.bytes.size(); j += 2) r.bytes[j] = 0x80, r.bytes[j + 1] = 0x3f;
  lines.clear();
  convert_folder(save(dir / "norms", t, config), dir / "n.qn", o);
  CHECK(told("1 + w already"));
  lines.clear();
  convert_folder(kTiny, dir / "n.qn", o);
  CHECK_FALSE(told("1 + w already"));
  CHECK(told("no tokenizer.json"));
}

TEST_CASE("convert: mtp is kept, left out, or not there") {
  TempDir dir;
  ConvertOptions o;
  o.recipe.experts = DType::BF16;
  o.mtp = false;
  CHECK_FALSE(convert_folder(kTiny, dir / "m.qn", o).mtp);
  check_file(dir / "m.qn", kTiny, o, false);
  CHECK(QnFile::open(dir / "m.qn").integer("model.mtp", 0, 1) == 0);

  Tensors t = load(kTiny);
  std::erase_if(t, [](const auto& e) { return e.first.rfind("mtp.", 0) == 0; });
  o.mtp = true;
  const std::string folder = save(dir / "no-mtp", t, config_of(kTiny));
  CHECK_FALSE(convert_folder(folder, dir / "n.qn", o).mtp);
  check_file(dir / "n.qn", folder, o, false);
  convert_folder(kTiny, dir / "o.qn", o);
  CHECK(QnFile::open(dir / "o.qn").integer("model.mtp", 0, 1) == 1);
}

TEST_CASE("convert: a head for guesses alone, the same weights in fewer bits") {
  TempDir dir;
  for (const DType draft : {DType::INT8, DType::INT4})
    for (const char* folder : {kTiny.c_str(), QN_STORIES}) {
      ConvertOptions o;
      o.recipe.draft = draft;
      const ConvertReport r = convert_folder(folder, dir / "m.qn", o);
      CHECK(std::ranges::any_of(r.lines, [&](const auto& l) { return l.label == "draft head" && has(l.format, name(draft)); }));
      const QnFile f = QnFile::open(dir / "m.qn");
      const QnTensor &head = *f.find("head"), &copy = *f.find("mtp.head");
      const int64_t n = head.shape[0], k = head.shape[1];
      CHECK((copy.shape == head.shape && copy.dtype == draft && copy.group == (k == 64 ? 64 : 128) && 3 * copy.bytes < 2 * head.bytes));
      const Tensor a = weight(f.data(head).data(), head.dtype, n, k), b = weight(f.data(copy).data(), copy.dtype, n, k, copy.group);
      Values x(static_cast<size_t>(k)), y(x);
      double worst = 0;  // in steps of the largest value of a group as the largest code
      for (int64_t row = 0; row < n; row++) {
        decode_row(a, row, x), decode_row(b, row, y);
        for (int64_t g = 0; g < k; g += copy.group) {
          float largest = 0;
          for (int64_t i = g; i < g + copy.group; i++) largest = std::max(largest, std::fabs(x[i]));
          for (int64_t i = g; i < g + copy.group; i++) worst = std::max<double>(worst, std::fabs(x[i] - y[i]) / largest * (draft == DType::INT4 ? 8 : 127));
        }
      }
      CAPTURE(worst);
      CHECK((worst > 0.4 && worst < (draft == DType::INT4 ? 2.5 : 1.5)));
    }
  ConvertOptions o;
  o.recipe.rest = DType::INT8;  // as small itself
  convert_folder(kTiny, dir / "m.qn", o);
  CHECK_FALSE(QnFile::open(dir / "m.qn").find("mtp.head"));
}

TEST_CASE("convert: what fails leaves the target alone") {
  TempDir dir;
  save_text(dir / "out.qn", "precious");
  Tensors t = load(kTiny);
  Raw& last = t.at("mtp.layers.0.mlp.experts.7.down_proj.weight");  // read last: most of the file is written by then
  last.bytes[last.bytes.size() - 1] = 0x7f, last.bytes[last.bytes.size() - 2] = 0x80;
  const std::string folder = save(dir / "bad", t, config_of(kTiny));
  CHECK(has(error_of([&] { convert_folder(folder, dir / "out.qn", {}); }), "mtp.layers.0.mlp.experts.7.down_proj.weight: row 63"));
  CHECK(read_text(dir / "out.qn", 100) == "precious");
  CHECK(files_in(dir.path) == 2);

  CHECK(has(error_of([&] { convert_folder(folder, folder + "/model.safetensors", {}); }), "is a file of the checkpoint"));
  fs::create_symlink(folder + "/model.safetensors", dir / "link.qn");
  CHECK(has(error_of([&] { convert_folder(folder, dir / "link.qn", {}); }), "is a file of the checkpoint"));
  CHECK(has(error_of([&] { convert_folder(dir / "nowhere", dir / "x.qn", {}); }), "nowhere"));
  CHECK(has(error_of([&] { convert_folder(kTiny, dir / "no/such/folder/x.qn", {}); }), "x.qn"));

  uint64_t before = 0, end = 0;
  convert_folder(kTiny, dir / "out.qn", {}, [&](std::string_view, uint64_t done, uint64_t total) {
    CHECK(done >= before);
    CHECK(done <= total);
    before = done, end = total;
  });
  CHECK((end > 0 && before == end));
  CHECK(files_in(dir.path) == 3);
}

TEST_CASE("convert: config.json in both spellings, defaults, refusals") {
  const Json old = config_of(kTiny);
  const auto want = model_meta(parse_config(old, "old"), true);
  CHECK(std::get<int64_t>(want.at("attention.rotary_dim")) == 64);
  CHECK(std::get<double>(want.at("rope.theta")) == 1e7);
  CHECK(std::get<std::vector<int64_t>>(want.at("model.layer_kinds")) == std::vector<int64_t>{0, 0, 0, 1});

  Json modern = Json::object();
  for (const auto& [key, value] : old.members()) {
    if (key != "rope_theta" && key != "partial_rotary_factor" && key != "rope_scaling" && key != "torch_dtype" &&
        key != "full_attention_interval")
      modern.set(key, value);
  }
  modern.set("rope_parameters", Json::parse(R"({"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25})", ""));
  modern.set("layer_types", Json::parse(R"(["linear_attention", "linear_attention", "linear_attention", "full_attention"])", ""));
  CHECK(model_meta(parse_config(modern, "modern"), true) == want);

  auto with = [&](const char* key, const char* value) {
    Json c = old;
    return c.set(key, Json::parse(value, "test"));
  };
  const std::pair<const char*, const char*> refused[] = {
      {"model_type", "\"qwen3_5_moe\""},
      {"model_type", "\"llama\""},
      {"attention_bias", "true"},
      {"layer_scale", "true"},
      {"attn_output_gate", "false"},
      {"hidden_act", "\"gelu\""},
      {"decoder_sparse_step", "2"},
      {"mlp_only_layers", "[1]"},
      {"rope_theta", "null"},
      {"rope_theta", "\"big\""},
      {"rope_scaling", R"({"type": "linear", "factor": 2})"},
      {"rope_scaling", R"({"rope_type": "yarn"})"},
      {"rope_scaling", "3"},
      {"layer_types", R"(["full_attention"])"},
      {"layer_types", R"(["linear_attention", "linear_attention", "linear_attention", "sliding_attention"])"},
      {"hidden_size", "-64"},
      {"hidden_size", "1e30"},
      {"hidden_size", "100"},
      {"hidden_size", "null"},
      {"vocab_size", "99999999999"},
      {"num_experts_per_tok", "9"},
      {"num_key_value_heads", "3"},
      {"num_key_value_heads", "0"},
      {"linear_num_key_heads", "3"},
      {"linear_conv_kernel_dim", "3"},
      {"partial_rotary_factor", "0.001"},
      {"partial_rotary_factor", "2"},
      {"rms_norm_eps", "-1"},
      {"num_hidden_layers", "100000"},
      {"quantization_config", R"({"quant_method": "gptq"})"},
      {"quantization_config", R"({"quant_method": "fp8", "weight_block_size": [64, 64]})"},
      {"moe_intermediate_size", "72"},
      // What the engine would refuse: just outside of core/limits.h.
      {"num_hidden_layers", "513"},
      {"hidden_size", "65568"},
      {"vocab_size", "4194305"},
      {"vocab_size", "0"},
      {"max_position_embeddings", "16777217"},
      {"num_attention_heads", "1025"},
      {"head_dim", "48"},
      {"head_dim", "1056"},
      {"rope_theta", "1.00001"},
      {"rope_theta", "1e13"},
      {"linear_key_head_dim", "24"},
      {"linear_value_head_dim", "16"},
      {"linear_value_head_dim", "100"},
      {"linear_conv_kernel_dim", "5"},
      {"num_experts", "5000"},
      {"num_experts_per_tok", "0"},
      {"shared_expert_intermediate_size", "0"},
      {"rope_scaling", R"({"rope_type": "yarn", "factor": 5000})"},
      {"rope_scaling", R"({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 268435457})"},
      // Kinds that must not pass for an empty list.
      {"mlp_only_layers", R"({"a": 1})"},
      {"mlp_only_layers", "3"},
      {"architectures", R"({"a": 1})"},
      {"layer_types", R"("full_attention")"},
      {"quantization_config", R"({"quant_method": "fp8", "weight_block_size": {"a": 128}})"},
      {"quantization_config", "[1]"},
      {"eos_token_id", R"({"a": 1})"},
  };
  for (const auto& [key, value] : refused) {
    CAPTURE(key);
    CAPTURE(value);
    const std::string message = error_of([&] { parse_config(with(key, value), "config.json"); });
    CHECK(has(message, "config.json: "));
    CHECK((has(message, key) || has(message, "rope_type")));
  }
  // Products of numbers that are legal one by one, at the bound and beyond.
  auto product = [&](std::initializer_list<std::pair<const char*, int64_t>> numbers) {
    Json c = old;
    for (const auto& [key, n] : numbers) c.set(key, Json::number(n));
    return error_of([&] { parse_config(c, "c"); });
  };
  CHECK(product({{"num_hidden_layers", 256}, {"num_experts", 4096}}).empty());
  CHECK(has(product({{"num_hidden_layers", 257}, {"num_experts", 4096}}), "num_experts: expected at most 1048576, got 1052672"));
  CHECK(product({{"linear_num_key_heads", 448}, {"linear_num_value_heads", 448}, {"linear_key_head_dim", 1024}}).empty());
  CHECK(has(product({{"linear_num_key_heads", 512}, {"linear_num_value_heads", 512}, {"linear_key_head_dim", 1024}}),
            "in_proj_qkvz, from linear_num_*_heads and linear_*_head_dim: expected at most 1048576, got 1179648"));
  CHECK(has(product({{"num_key_value_heads", 1024}, {"num_attention_heads", 1024}}), "num_attention_heads * head_dim: expected at most 65536"));
  Json many = Json::array();
  for (int64_t i = 0; i < 65; i++) many.push(Json::number(i));
  Json ends = old;
  CHECK(has(error_of([&] { parse_config(ends.set("eos_token_id", many), "c"); }), "eos_token_id: expected at most 64 ids, got 65"));
  CHECK(has(error_of([&] { parse_config(Json::array(), "c"); }), "c: "));
  CHECK(parse_config(with("num_nextn_predict_layers", "1"), "c").layers == 4);
  CHECK(parse_config(with("head_dim", "null"), "c").head_dim == 256);
}

TEST_CASE("convert: yarn is resolved as the specification says") {
  auto yarn = [](const std::string& scaling, const char* key = "rope_scaling") {
    Json c = config_of(kTiny);
    c.set("max_position_embeddings", Json::number(int64_t{262144}));
    return parse_config(c.set(key, Json::parse(scaling, "test")), "c");
  };
  const ModelConfig four = yarn(R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144})");
  CHECK(four.attention_factor == doctest::Approx(1.138629436111989).epsilon(1e-15));
  CHECK(four.context == 1048576);
  CHECK(four.yarn_original == 262144);
  CHECK(yarn(R"({"rope_type": "yarn", "factor": 100})").context == 1 << 24);  // no further than the engine goes
  CHECK((four.yarn_beta_fast == 32 && four.yarn_beta_slow == 1 && four.yarn_truncate));
  CHECK(yarn(R"({"type": "yarn", "factor": 2.0})").attention_factor == doctest::Approx(1.0693147180559945).epsilon(1e-15));
  CHECK(yarn(R"({"rope_type": "yarn", "factor": 4, "attention_factor": 0.9})").attention_factor == 0.9);
  CHECK(yarn(R"({"rope_type": "yarn", "factor": 4, "mscale": 2, "mscale_all_dim": 0.5})").attention_factor ==
        doctest::Approx((0.2 * std::log(4) + 1) / (0.05 * std::log(4) + 1)).epsilon(1e-15));
  CHECK(yarn(R"({"rope_type": "yarn", "factor": 4, "mscale": 2})").attention_factor == doctest::Approx(1.138629436111989).epsilon(1e-15));
  const ModelConfig modern = yarn(
      R"({"rope_type": "yarn", "rope_theta": 5e6, "factor": 4, "truncate": false, "beta_fast": 16, "beta_slow": 2})", "rope_parameters");
  CHECK((modern.theta == 5e6 && modern.yarn_factor == 4 && !modern.yarn_truncate && modern.yarn_beta_fast == 16 &&
         modern.yarn_beta_slow == 2));
  CHECK(modern.yarn_original == 262144);

  const ModelConfig tiny = read_config(std::string(QN_TEST_DATA) + "/tiny-yarn");
  CHECK((tiny.yarn_factor == 4 && tiny.yarn_original == 64 && tiny.context == 256));
  const ModelConfig none = read_config(kTiny);
  CHECK((none.yarn_factor == 1 && none.attention_factor == 1 && none.context == 4096));
}

TEST_CASE("convert: words, defaults of generation, provenance") {
  TempDir dir;
  std::vector<std::string> lines;
  ConvertOptions o;
  o.notice = [&](const std::string& line) { lines.push_back(line); };
  convert_folder(QN_STORIES, dir / "s.qn", o);
  const QnFile f = QnFile::open(dir / "s.qn");
  CHECK(f.text("general.family") == "qwen3_next");
  CHECK(f.text("general.name") == "stories");
  CHECK(f.text("general.chat") == "instruct");  // no template, but <|im_end|> ends an answer
  CHECK(f.integers("token.end", 8, 0, 2047) == std::vector<int64_t>{1167, 1165});
  CHECK(f.real("sampling.temperature", 0, 10) == 0.7);
  CHECK(f.real("sampling.top_p", 0, 1) == 0.8);
  CHECK(f.integer("sampling.top_k", 0, 100) == 20);
  CHECK_FALSE(f.has("sampling.min_p"));
  CHECK(f.find("tokenizer") == &f.tensors()[0]);
  CHECK(Tokenizer(f.data(f.tensors()[0])).find_added("<|im_end|>") == 1167);
  CHECK(std::none_of(lines.begin(), lines.end(), [](const auto& l) { return has(l, "norm"); }));

  // Every file belongs where decision 7 wants it: dense parts first, then experts by layer, on 2 MiB.
  bool experts = false;
  for (const QnTensor& t : f.tensors()) {
    if (t.experts) CHECK(t.offset % (2 << 20) == 0);
    CHECK((t.experts || !experts));
    experts |= t.experts;
  }
  CHECK(f.tensors().back().name == "mtp.layer.moe.experts");

  convert_tokenizer(QN_STORIES, dir / "t.qn", o);
  const QnFile t = QnFile::open(dir / "t.qn");
  CHECK(t.tensors().size() == 1);
  for (const auto& [key, value] : t.meta()) CHECK((key.rfind("general.", 0) == 0 || key.rfind("token.", 0) == 0));
  CHECK(std::ranges::equal(t.data(t.tensors()[0]), f.data(f.tensors()[0])));
  CHECK(fs::file_size(dir / "t.qn") < 200000);
  convert_tokenizer(QN_TOKENIZER, dir / "q.qn", o);
  CHECK(QnFile::open(dir / "q.qn").integers("token.end", 8, 0, 200000) == std::vector<int64_t>{151645, 151643});
  CHECK(has(error_of([&] { convert_tokenizer(kTiny, dir / "x.qn", o); }), "no tokenizer.json"));

  // A template of its own, a list of templates, other defaults, end tokens out of range, a tokenizer that is too large.
  const std::string folder = dir / "models--Owner--Some-Name/snapshots/0123abc";
  Json config = config_of(kTiny);
  save(folder, load(kTiny), config.set("eos_token_id", Json::parse("[2, 5000]", "")));
  fs::copy_file(std::string(QN_STORIES) + "/tokenizer.json", folder + "/tokenizer.json");
  save_text(folder + "/tokenizer_config.json",
            R"({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "<function= <think>"}]})");
  save_text(folder + "/generation_config.json",
            R"({"do_sample": false, "temperature": 0.6, "top_p": 7, "min_p": 0.05, "repetition_penalty": 1.05, "eos_token_id": 9})");
  lines.clear();
  convert_folder(folder, dir / "o.qn", o);
  const QnFile g = QnFile::open(dir / "o.qn");
  CHECK(g.text("general.name") == "Some-Name");
  CHECK(g.text("general.source") == "Owner/Some-Name@0123abc");
  CHECK(g.text("general.template_fingerprint") ==
        format("%016llx", static_cast<unsigned long long>(template_fingerprint("<function= <think>"))));
  CHECK(g.integers("token.end", 8, 0, 319) == std::vector<int64_t>{9, 2});
  CHECK(g.real("sampling.temperature", 0, 10) == 0);
  CHECK(g.real("sampling.min_p", 0, 1) == 0.05);
  CHECK(g.real("sampling.repetition_penalty", 0, 2) == 1.05);
  CHECK_FALSE(g.has("sampling.top_p"));
  auto told = [&](const std::string& part) { return std::any_of(lines.begin(), lines.end(), [&](const auto& l) { return has(l, part); }); };
  CHECK(told("end token 5000"));
  CHECK(told("top_p: 7"));
  CHECK(told("ids, the model only 320"));

  // Odd values in generation_config.json cost a warning each, and nothing else.
  save_text(folder + "/generation_config.json",
            R"({"do_sample": 1, "temperature": 1e999, "top_p": {"a": 1}, "top_k": "x", "min_p": [1], "eos_token_id": [1e999]})");
  lines.clear();
  convert_folder(folder, dir / "o.qn", o);
  const QnFile odd = QnFile::open(dir / "o.qn");
  for (const char* key : {"temperature", "top_p", "top_k", "min_p"}) {
    CHECK(told(std::string("generation_config.json: ") + key + ": "));
    CHECK_FALSE(odd.has(std::string("sampling.") + key));
  }
  CHECK((told("generation_config.json: do_sample: 1 is ignored") && told("generation_config.json: eos_token_id: ")));
  CHECK(odd.integers("token.end", 8, 0, 319) == std::vector<int64_t>{2});

  // A pipe by the name of a file is not waited for.
  for (const char* file : {"/chat_template.jinja", "/generation_config.json", "/tokenizer_config.json", "/tokenizer.json", "/config.json"}) {
    fs::remove(folder + file);
    REQUIRE(::mkfifo((folder + file).c_str(), 0600) == 0);
    CHECK(has(error_of([&] { convert_folder(folder, dir / "p.qn", o); }), std::string(file) + ": is not a regular file"));
  }
  save(folder, load(kTiny), (fs::remove(folder + "/config.json"), config));
  for (const char* file : {"/chat_template.jinja", "/tokenizer_config.json", "/tokenizer.json"}) fs::remove(folder + file);

  fs::remove(folder + "/generation_config.json");
  save_text(folder + "/chat_template.jinja", "another");
  o.chat = ChatStyle::Thinking;
  convert_folder(folder + "/", dir / "o.qn", o);
  const QnFile h = QnFile::open(dir / "o.qn");
  CHECK(h.text("general.chat") == "thinking");
  CHECK(h.text("general.name") == "Some-Name");
  CHECK(h.text("general.template_fingerprint") == format("%016llx", static_cast<unsigned long long>(template_fingerprint("another"))));
  CHECK(h.real("sampling.temperature", 0, 10) == 0.6);
}

}  // namespace qn
