#include "convert/names.h"

#include <unordered_set>

#include "ggml-lite/base/check.h"

namespace qn {

namespace {

QnTensor described(const std::string& name, DType dtype, int group, std::vector<int64_t> shape) {
  QnTensor t;
  t.name = name, t.dtype = dtype, t.group = static_cast<uint16_t>(group), t.shape = std::move(shape);
  return t;
}

std::vector<RowRun> all_rows(int64_t n) { return {{0, 0, n}}; }

// in_proj_qkvz: one block per key head, [q: DK | k: DK | v: R*DV | z: R*DV] with R value heads of it -> [q | k | v | z].
std::vector<RowRun> qkvz_rows(const ModelConfig& c) {
  const int64_t dk = c.key_dim, dv = c.value_heads / c.key_heads * c.value_dim, block = 2 * dk + 2 * dv;
  const int64_t begin[] = {0, dk, 2 * dk, 2 * dk + dv}, count[] = {dk, dk, dv, dv};
  std::vector<RowRun> runs;
  for (int part = 0; part < 4; part++) {
    for (int64_t h = 0; h < c.key_heads; h++) runs.push_back({0, h * block + begin[part], count[part]});
  }
  return runs;
}

// in_proj_ba: one block per key head, [b: R | a: R] -> [b | a].
std::vector<RowRun> ba_rows(const ModelConfig& c) {
  const int64_t r = c.value_heads / c.key_heads;
  std::vector<RowRun> runs;
  for (int part = 0; part < 2; part++) {
    for (int64_t h = 0; h < c.key_heads; h++) runs.push_back({0, h * 2 * r + part * r, r});
  }
  return runs;
}

// q_proj: per head [query: DH | gate: DH]; then k_proj and v_proj -> [query | gate | k | v].
std::vector<RowRun> qgkv_rows(const ModelConfig& c) {
  std::vector<RowRun> runs;
  for (int part = 0; part < 2; part++) {
    for (int64_t h = 0; h < c.heads; h++) runs.push_back({0, (2 * h + part) * c.head_dim, c.head_dim});
  }
  runs.push_back({1, 0, c.kv_heads * c.head_dim});
  runs.push_back({2, 0, c.kv_heads * c.head_dim});
  return runs;
}

struct Builder {
  const ModelConfig& c;
  const LayoutOptions& options;
  std::vector<Target> dense, experts;

  void vector(const std::string& name, int64_t n, Fold fold, const std::string& source) {
    Target t;
    t.tensor = described(name, DType::F32, 0, {n});
    t.matrix = {name, DType::F32, 0, 1, n, fold, false, {{source, {n}}}, all_rows(1)};
    dense.push_back(std::move(t));
  }
  void matrix(const std::string& name, DType dtype, int64_t rows, int64_t cols, std::vector<SourceTensor> from, std::vector<RowRun> order,
              bool gate_up = false) {
    const int group = is_t16(dtype) ? largest_group(cols, name) : 0;
    Target t;
    t.tensor = described(name, dtype, group, {rows, cols});
    t.matrix = {name, dtype, group, rows, cols, Fold::None, gate_up && is_t16(dtype), std::move(from), std::move(order)};
    dense.push_back(std::move(t));
  }
  void plain(const std::string& name, DType dtype, int64_t rows, int64_t cols, const std::string& source) {
    matrix(name, dtype, rows, cols, {{source, {rows, cols}}}, all_rows(rows));
  }

  void delta_net(const std::string& to, const std::string& from) {
    const DType rest = options.recipe.rest;
    const int64_t d = c.width, gv = c.value_heads, ch = c.conv_channels();
    matrix(to + "delta.qkvz", rest, c.qkvz_rows(), d, {{from + "in_proj_qkvz.weight", {c.qkvz_rows(), d}}}, qkvz_rows(c));
    matrix(to + "delta.ba", DType::BF16, 2 * gv, d, {{from + "in_proj_ba.weight", {2 * gv, d}}}, ba_rows(c));
    matrix(to + "delta.conv", DType::BF16, ch, c.conv, {{from + "conv1d.weight", {ch, 1, c.conv}}}, all_rows(ch));
    vector(to + "delta.neg_a", gv, Fold::NegExp, from + "A_log");
    vector(to + "delta.dt_bias", gv, Fold::None, from + "dt_bias");
    vector(to + "delta.norm", c.value_dim, Fold::None, from + "norm.weight");
    plain(to + "delta.out", rest, d, c.delta_width(), from + "out_proj.weight");
  }
  void attention(const std::string& to, const std::string& from) {
    const DType rest = options.recipe.rest;
    const int64_t d = c.width, q = 2 * c.attention_width(), kv = c.kv_heads * c.head_dim;
    matrix(to + "attn.qgkv", rest, q + 2 * kv, d,
           {{from + "q_proj.weight", {q, d}}, {from + "k_proj.weight", {kv, d}}, {from + "v_proj.weight", {kv, d}}}, qgkv_rows(c));
    vector(to + "attn.q_norm", c.head_dim, Fold::OnePlus, from + "q_norm.weight");
    vector(to + "attn.k_norm", c.head_dim, Fold::OnePlus, from + "k_norm.weight");
    plain(to + "attn.out", rest, d, c.attention_width(), from + "o_proj.weight");
  }
  void mlp(const std::string& to, const std::string& from) {
    const DType rest = options.recipe.rest;
    const int64_t d = c.width, fs = c.shared_width;
    plain(to + "moe.router", DType::BF16, c.experts, d, from + "gate.weight");
    plain(to + "moe.shared_gate", DType::BF16, 1, d, from + "shared_expert_gate.weight");
    const std::string shared = from + "shared_expert.";
    matrix(to + "moe.shared_gate_up", rest, 2 * fs, d, {{shared + "gate_proj.weight", {fs, d}}, {shared + "up_proj.weight", {fs, d}}},
           {{0, 0, fs}, {1, 0, fs}}, true);
    plain(to + "moe.shared_down", rest, d, fs, shared + "down_proj.weight");

    Target t;
    t.tensor = described(to + "moe.experts", options.recipe.experts, expert_group(options.recipe, d, c.expert_width),
                         {c.experts, d, c.expert_width});
    t.tensor.experts = true;
    t.section = true;
    t.expert_prefix = from + "experts";
    t.fused = options.in_checkpoint && options.in_checkpoint(t.expert_prefix + ".gate_up_proj");
    experts.push_back(std::move(t));
  }
  void layer(const std::string& to, const std::string& from, bool attends) {
    vector(to + "norm1", c.width, Fold::OnePlus, from + "input_layernorm.weight");
    if (attends) {
      attention(to, from + "self_attn.");
    } else {
      delta_net(to, from + "linear_attn.");
    }
    vector(to + "norm2", c.width, Fold::OnePlus, from + "post_attention_layernorm.weight");
    mlp(to, from + "mlp.");
  }
};

}  // namespace

std::vector<Target> model_layout(const ModelConfig& c, const LayoutOptions& options) {
  Builder b{c, options, {}, {}};
  const std::string embed = "model.embed_tokens.weight";
  b.plain("embed", DType::BF16, c.vocab, c.width, embed);
  for (int64_t i = 0; i < c.layers; i++) {
    const std::string n = std::to_string(i) + ".";
    b.layer("layers." + n, "model.layers." + n, c.kinds[i] == 1);
  }
  b.vector("norm", c.width, Fold::OnePlus, "model.norm.weight");
  const std::string head = c.tied ? embed : "lm_head.weight";
  const bool own_head = !c.tied || options.recipe.rest != DType::BF16;
  if (own_head) b.plain("head", options.recipe.rest, c.vocab, c.width, head);
  const uint64_t head_bytes = stored_bytes((own_head ? b.dense.back() : b.dense.front()).tensor);
  if (options.mtp) {
    b.vector("mtp.norm_embed", c.width, Fold::OnePlus, "mtp.pre_fc_norm_embedding.weight");
    b.vector("mtp.norm_hidden", c.width, Fold::OnePlus, "mtp.pre_fc_norm_hidden.weight");
    b.plain("mtp.fc", DType::BF16, c.width, 2 * c.width, "mtp.fc.weight");
    b.layer("mtp.layer.", "mtp.layers.0.", true);
    b.vector("mtp.norm", c.width, Fold::OnePlus, "mtp.norm.weight");
    if (has_draft_head(options.recipe, c.vocab, c.width, head_bytes)) b.plain("mtp.head", draft_format(options.recipe, c.vocab, c.width), c.vocab, c.width, head);
  }
  std::vector<Target> all = std::move(b.dense);
  for (Target& t : b.experts) all.push_back(std::move(t));
  return all;
}

ExpertMatrices expert_matrices(const Target& t, int64_t e) {
  QN_CHECK(t.tensor.experts && e >= 0 && e < t.tensor.shape[0], "%s has no expert %lld", t.tensor.name.c_str(), (long long)e);
  const int64_t n = t.tensor.shape[0], d = t.tensor.shape[1], f = t.tensor.shape[2];
  const DType dtype = t.tensor.dtype;
  const int group = t.tensor.group;
  ExpertMatrices m;
  m.gate_up = {t.tensor.name, dtype, group, 2 * f, d, Fold::None, is_t16(dtype), {}, {}};
  m.down = {t.tensor.name, dtype, group, d, f, Fold::None, false, {}, {}};
  if (t.fused) {  // (E, 2F, D): gate rows, up rows; (E, D, F)
    m.gate_up.from = {{t.expert_prefix + ".gate_up_proj", {n, 2 * f, d}}};
    m.gate_up.order = {{0, e * 2 * f, f}, {0, e * 2 * f + f, f}};
    m.down.from = {{t.expert_prefix + ".down_proj", {n, d, f}}};
    m.down.order = {{0, e * d, d}};
  } else {
    const std::string p = t.expert_prefix + "." + std::to_string(e) + ".";
    m.gate_up.from = {{p + "gate_proj.weight", {f, d}}, {p + "up_proj.weight", {f, d}}};
    m.gate_up.order = {{0, 0, f}, {1, 0, f}};
    m.down.from = {{p + "down_proj.weight", {d, f}}};
    m.down.order = all_rows(d);
  }
  return m;
}

void for_each_source(const std::vector<Target>& layout, const std::function<void(const SourceTensor&)>& f) {
  std::unordered_set<std::string> dense;  // the head and its copy for guesses come from one tensor, which may be the embedding
  for (const Target& t : layout) {
    for (const SourceTensor& s : t.matrix.from)
      if (dense.insert(s.name).second) f(s);
    if (!t.tensor.experts) continue;
    for (int64_t e = 0; e < (t.fused ? 1 : t.tensor.shape[0]); e++) {
      const ExpertMatrices m = expert_matrices(t, e);
      for (const SourceTensor& s : m.gate_up.from) f(s);
      for (const SourceTensor& s : m.down.from) f(s);
    }
  }
}

}  // namespace qn
