#include "quantize/recipe.h"

#include <algorithm>

#include "ggml-lite/base/check.h"
#include "ggml-lite/core/blocks.h"

namespace qn {
namespace {

struct Entry {
  std::string_view name;
  Kind kind;
  const char* label;
};

constexpr Entry kModel[] = {
    {"tokenizer", Kind::Table, "tokenizer"}, {"embed", Kind::Exact, "embedding"},
    {"norm", Kind::Norm, "norms"},           {"head", Kind::Rest, "head"},
    {"mtp.norm_embed", Kind::Norm, "norms"}, {"mtp.norm_hidden", Kind::Norm, "norms"},
    {"mtp.norm", Kind::Norm, "norms"},       {"mtp.fc", Kind::Exact, "mtp entry"},
    {"mtp.head", Kind::Draft, "draft head"},
};

// After "layers.N." or "mtp.layer.".
constexpr Entry kLayer[] = {
    {"norm1", Kind::Norm, "norms"},
    {"norm2", Kind::Norm, "norms"},
    {"delta.qkvz", Kind::Rest, "delta qkvz"},
    {"delta.ba", Kind::Exact, "delta gates"},
    {"delta.conv", Kind::Exact, "delta conv"},
    {"delta.neg_a", Kind::Vector, "delta gates"},
    {"delta.dt_bias", Kind::Vector, "delta gates"},
    {"delta.norm", Kind::Norm, "norms"},
    {"delta.out", Kind::Rest, "delta out"},
    {"attn.qgkv", Kind::Rest, "attention qgkv"},
    {"attn.q_norm", Kind::Norm, "norms"},
    {"attn.k_norm", Kind::Norm, "norms"},
    {"attn.out", Kind::Rest, "attention out"},
    {"moe.router", Kind::Exact, "router"},
    {"moe.shared_gate", Kind::Exact, "router"},
    {"moe.shared_gate_up", Kind::Rest, "shared expert"},
    {"moe.shared_down", Kind::Rest, "shared expert"},
    {"moe.experts", Kind::Experts, "experts"},
};

const Entry& entry(std::string_view full) {
  std::string_view n = full;
  bool layer = false;
  if (n.starts_with("mtp.layer.")) {
    n.remove_prefix(10);
    layer = true;
  } else if (n.starts_with("layers.")) {
    const size_t digits = n.find_first_not_of("0123456789", 7);
    if (digits != n.npos && digits > 7 && n[digits] == '.') {
      n.remove_prefix(digits + 1);
      layer = true;
    }
  }
  const Entry* const begin = layer ? std::begin(kLayer) : std::begin(kModel);
  const Entry* const end = layer ? std::end(kLayer) : std::end(kModel);
  const Entry* const e = std::find_if(begin, end, [&](const Entry& x) { return x.name == n; });
  if (e == end) fail("tensor %.*s: not one this program knows", static_cast<int>(full.size()), full.data());
  return *e;
}

bool divides(int group, int64_t d, int64_t f) { return d % group == 0 && f % group == 0; }

}  // namespace

Kind kind_of(std::string_view qn_name) { return entry(qn_name).kind; }
const char* kind_label(std::string_view qn_name) { return entry(qn_name).label; }

int largest_group(int64_t k, const std::string& what) {
  for (const int group : {128, 64, 32})
    if (k > 0 && k % group == 0) return group;
  fail("%s: %lld columns are no multiple of 32, so int8 and int4 cannot store it; use bf16", what.c_str(), static_cast<long long>(k));
}

DType draft_format(const Recipe& r, int64_t v, int64_t d) { return r.draft ? *r.draft : v * d >= 1 << 25 ? DType::INT4 : DType::INT8; }

bool has_draft_head(const Recipe& r, int64_t v, int64_t d, uint64_t bytes) {
  return d > 0 && d % 32 == 0 && static_cast<uint64_t>(weight_bytes(draft_format(r, v, d), v, d, largest_group(d, "mtp.head"))) < bytes;
}

int expert_group(const Recipe& r, int64_t d, int64_t f) {
  if (!is_t16(r.experts)) return 0;
  if (r.group != 0 && r.experts == DType::INT4) {
    if (r.group != 32 && r.group != 64 && r.group != 128) fail("--group %d: expected 32, 64 or 128", r.group);
    if (d <= 0 || f <= 0 || !divides(r.group, d, f))
      fail("--group %d does not divide the experts' widths %lld and %lld; try a smaller one", r.group, static_cast<long long>(d),
           static_cast<long long>(f));
    return r.group;
  }
  for (const int group : {128, 64, 32})
    if (d > 0 && f > 0 && divides(group, d, f)) return group;
  fail("experts of widths %lld and %lld are no multiples of 32, so %s cannot store them; use --experts bf16", static_cast<long long>(d),
       static_cast<long long>(f), name(r.experts));
}

DType parse_dtype(const std::string& text, const std::string& option, bool experts) {
  if (text == "bf16") return DType::BF16;
  if (text == "int8") return DType::INT8;
  if (text == "int4" && experts) return DType::INT4;
  fail("%s %s: expected %s", option.c_str(), text.c_str(), experts ? "int4, int8 or bf16" : "bf16 or int8");
}

}  // namespace qn
