// Contracts of the operations, written once for all devices: every message prints the shapes that do not fit.
#include "ggml-lite/core/device.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "ggml-lite/base/check.h"

namespace qn {

Buffer& Buffer::operator=(Buffer&& o) noexcept {
  std::swap(device_, o.device_);
  std::swap(data_, o.data_);
  std::swap(bytes_, o.bytes_);
  return *this;
}
Buffer::~Buffer() {
  if (data_) device_->do_free(data_, bytes_);
}

Buffer Device::alloc(size_t bytes, const char* what) { return Buffer(this, do_alloc(bytes, what), bytes); }

namespace {

std::string shape(const Tensor& t) {
  std::string s = std::string(name(t.dtype)) + " (";
  for (int i = 0; i < t.ndim; i++) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + ")";
}

// F32 activations (rows, cols); a column slice when `slice`
void check_act(const char* op, const char* what, const Tensor& t, int64_t rows, int64_t cols, bool slice = false) {
  QN_CHECK(t && t.dtype == DType::F32 && t.rows() == rows && t.cols() == cols, "%s: %s: expected f32 (%lld, %lld), got %s", op, what,
           static_cast<long long>(rows), static_cast<long long>(cols), shape(t).c_str());
  QN_CHECK(slice ? t.row_stride >= cols : t.row_stride == cols || rows == 1, "%s: %s: rows are %lld apart, %lld wide", op, what,
           static_cast<long long>(t.row_stride), static_cast<long long>(cols));
}
void check_vec(const char* op, const char* what, const Tensor& t, int64_t n) {
  QN_CHECK(t && t.dtype == DType::F32 && t.ndim == 1 && t.shape[0] == n, "%s: %s: expected f32 (%lld), got %s", op, what,
           static_cast<long long>(n), shape(t).c_str());
}
// A stored weight matrix (n, k); n < 0: any
void check_weight(const char* op, const char* what, const Tensor& w, int64_t n, int64_t k) {
  QN_CHECK(w && w.ndim == 2 && (n < 0 || w.rows() == n) && w.cols() == k, "%s: %s: expected (%lld, %lld), got %s", op, what,
           static_cast<long long>(n), static_cast<long long>(k), shape(w).c_str());
  const bool t16 = is_t16(w.dtype);
  QN_CHECK(t16 || w.dtype == DType::F32 || w.dtype == DType::BF16, "%s: %s: %s is no weight format", op, what, shape(w).c_str());
  QN_CHECK(k % 32 == 0, "%s: %s: %s: K must be a multiple of 32", op, what, shape(w).c_str());
  if (t16)
    QN_CHECK((w.group == 32 || w.group == 64 || w.group == 128) && k % w.group == 0, "%s: %s: %s: group %d", op, what, shape(w).c_str(), w.group);
}
// A weight that sees unrounded activations: row-major only
void check_exact(const char* op, const char* what, const Tensor& w, int64_t n, int64_t k) {
  check_weight(op, what, w, n, k);
  QN_CHECK(!is_t16(w.dtype), "%s: %s: %s must be bf16 or f32", op, what, shape(w).c_str());
}
void check_experts(const char* op, const Experts& e, int64_t d, int64_t f) {
  QN_CHECK(e && e.count > 0 && e.d == d && e.f == f, "%s: experts: expected d %lld f %lld, got d %lld f %lld", op, static_cast<long long>(d),
           static_cast<long long>(f), static_cast<long long>(e.d), static_cast<long long>(e.f));
  check_weight(op, "expert gate_up", e.gate_up(0), 2 * f, d);
  check_weight(op, "expert down", e.down(0), d, f);
}

// Outputs share bytes with no other output and with no input. A column slice leaves gaps in its rows, in which other slices of
// the same buffer may lie.
struct Named {
  const char* name;
  const Tensor& t;
};
bool overlap(const Tensor& a, const Tensor& b) {
  if (!a || !b) return false;
  auto values = [](const Tensor& t) {  // from the first to behind the last
    int64_t row = 1;
    for (int i = 1; i < t.ndim; i++) row *= t.shape[i];
    return std::pair((t.rows() - 1) * t.row_stride + row, row);
  };
  const auto [all_a, row_a] = values(a);
  const auto [all_b, row_b] = values(b);
  const int64_t to_a = item_bytes(a.dtype), to_b = item_bytes(b.dtype), apart = a.row_stride * to_a;
  const auto at_a = reinterpret_cast<intptr_t>(a.data), at_b = reinterpret_cast<intptr_t>(b.data);
  if (at_a + all_a * to_a <= at_b || at_b + all_b * to_b <= at_a || a.rows() < 1 || b.rows() < 1) return false;
  if (apart <= 0 || apart != b.row_stride * to_b) return true;
  const int64_t column = ((at_b - at_a) % apart + apart) % apart;  // where rows of b begin within those of a
  return column < row_a * to_a || column + row_b * to_b > apart;
}
void check_disjoint(const char* op, std::initializer_list<Named> outs, std::initializer_list<Named> ins) {
  for (const Named* out = outs.begin(); out != outs.end(); out++) {
    for (const Named* other = out + 1; other != outs.end(); other++)
      QN_CHECK(!overlap(out->t, other->t), "%s: outputs %s and %s overlap", op, out->name, other->name);
    for (const Named& in : ins) QN_CHECK(!overlap(out->t, in.t), "%s: output %s overlaps input %s", op, out->name, in.name);
  }
}

}  // namespace

static uint64_t stored(const Tensor& w) {
  return w ? static_cast<uint64_t>(weight_bytes(w.dtype, w.rows(), w.cols(), w.group)) : 0;
}

// How many experts an operation has to read: those among `ids` (T, K), or as many as there could be (see count_experts)
int64_t Device::experts_read(const Tensor& ids, const Experts& experts) {
  if (!count_experts_ || ids.rows() == 1) return std::min<int64_t>(ids.rows() * ids.cols(), experts.count);
  QN_CHECK(ids.row_stride == ids.cols(), "counting experts: rows of ids are %lld apart, %lld wide", static_cast<long long>(ids.row_stride),
           static_cast<long long>(ids.cols()));
  std::vector<int32_t> host(static_cast<size_t>(ids.rows() * ids.cols()));
  download(host.data(), ids.data, host.size() * sizeof(int32_t));
  std::ranges::sort(host);
  return std::ranges::unique(host).begin() - host.begin();
}

const char* name(Op op) {
  static const char* const names[kOps] = {"embed",      "norm_matmul", "delta_net",   "gated_norm_matmul", "attention", "gate_matmul",
                                          "moe_router", "moe_gate_up", "moe_down",    "concat_matmul",     "sample",    "place_experts",
                                          "join_experts", "expert_pairs"};
  return names[static_cast<int>(op)];
}

bool Device::begin(Op op, uint64_t bytes) {
  traffic_[static_cast<int>(op)].calls++;
  traffic_[static_cast<int>(op)].bytes += bytes;
  if (!(selected_ & bit(op))) return false;
  make_current();
  return true;
}

void Device::embed(const EmbedArgs& a) {
  const int64_t t = a.h.rows(), d = a.h.cols();
  QN_CHECK(a.ids && a.ids.dtype == DType::I32 && a.ids.rows() == t, "embed: ids: expected i32 (%lld), got %s", static_cast<long long>(t), shape(a.ids).c_str());
  check_act("embed", "h", a.h, t, d);
  check_exact("embed", "table", a.table, -1, d);
  check_disjoint("embed", {{"h", a.h}}, {{"ids", a.ids}});
  if (begin(Op::Embed, static_cast<uint64_t>(t * d * item_bytes(a.table.dtype)))) do_embed(a);
}

void Device::norm_matmul(const NormMatmulArgs& a) {
  const char* op = "norm_matmul";
  const int64_t t = a.h.rows(), d = a.h.cols();
  check_act(op, "h", a.h, t, d, true);
  if (a.norm) check_vec(op, "norm", a.norm, d);
  QN_CHECK(a.w || a.w_exact || a.normed, "%s: nothing to compute", op);
  QN_CHECK(!a.w == !a.y && !a.w_exact == !a.y_exact, "%s: a weight without an output, or the reverse", op);
  if (a.w) {
    check_weight(op, "w", a.w, -1, d);
    check_act(op, "y", a.y, t, a.w.rows(), true);
  }
  if (a.w_exact) {
    check_exact(op, "w_exact", a.w_exact, -1, d);
    check_act(op, "y_exact", a.y_exact, t, a.w_exact.rows(), true);
  }
  if (a.normed) check_act(op, "normed", a.normed, t, d);
  check_disjoint(op, {{"y", a.y}, {"y_exact", a.y_exact}, {"normed", a.normed}}, {{"h", a.h}, {"norm", a.norm}});
  if (begin(Op::NormMatmul, stored(a.w) + stored(a.w_exact))) do_norm_matmul(a);
}

void Device::delta_net(const DeltaNetArgs& a) {
  const char* op = "delta_net";
  const int64_t t = a.qkv.rows(), gk = a.key_heads, gv = a.value_heads;
  QN_CHECK(a.step, "%s: no step parameters", op);
  QN_CHECK(gk > 0 && gv > 0 && gv % gk == 0, "%s: %lld value heads on %lld key heads", op, static_cast<long long>(gv), static_cast<long long>(gk));
  QN_CHECK(a.state && a.state.dtype == DType::F32 && a.state.ndim == 3 && a.state.shape[0] == gv, "%s: state: expected f32 (%lld, DK, DV), got %s", op,
           static_cast<long long>(gv), shape(a.state).c_str());
  const int64_t dk = a.state.shape[1], dv = a.state.shape[2], ch = 2 * gk * dk + gv * dv;
  QN_CHECK(dk % 32 == 0 && dv % 32 == 0, "%s: head widths %lld and %lld must be multiples of 32", op, static_cast<long long>(dk), static_cast<long long>(dv));
  check_act(op, "qkv", a.qkv, t, ch, true);
  check_act(op, "ba", a.ba, t, 2 * gv);
  QN_CHECK(a.conv && a.conv.rows() == ch && a.conv.cols() == 4 && (a.conv.dtype == DType::F32 || a.conv.dtype == DType::BF16),
           "%s: conv: expected (%lld, 4), got %s", op, static_cast<long long>(ch), shape(a.conv).c_str());
  check_vec(op, "neg_a", a.neg_a, gv);
  check_vec(op, "dt_bias", a.dt_bias, gv);
  const int64_t slots = a.conv_ring.rows();
  QN_CHECK(slots >= 4 && (slots & (slots - 1)) == 0, "%s: %lld slots in the ring", op, static_cast<long long>(slots));
  check_act(op, "conv_ring", a.conv_ring, slots, ch);
  check_act(op, "o", a.o, t, gv * dv);
  if (a.log) {
    check_act(op, "log", a.log, kDeltaLogRows, delta_log_width(gk, gv, dk, dv));
    QN_CHECK(t <= kDeltaLogTokens && slots >= t + 3, "%s: %lld tokens in a log of %d and a ring of %lld", op, static_cast<long long>(t), kDeltaLogTokens,
             static_cast<long long>(slots));
  }
  check_disjoint(op, {{"o", a.o}, {"state", a.state}, {"log", a.log}, {"conv_ring", a.conv_ring}}, {{"qkv", a.qkv}, {"ba", a.ba}});
  const int64_t logged = a.log && t > 1 ? t * a.log.cols() : 0;
  if (begin(Op::DeltaNet, static_cast<uint64_t>(2 * gv * dk * dv + (slots + 4) * ch + logged) * 4)) do_delta_net(a);
}

void Device::delta_replay(const DeltaReplayArgs& a) {
  const char* op = "delta_replay";
  const int64_t gk = a.key_heads, gv = a.state.rows(), dk = a.state.shape[1], dv = a.state.shape[2];
  QN_CHECK(a.state && a.state.dtype == DType::F32 && a.state.ndim == 3 && gk > 0 && gv % gk == 0 && dk % 32 == 0 && dv % 32 == 0,
           "%s: state: expected f32 (GV, DK, DV), got %s with %lld key heads", op, shape(a.state).c_str(), static_cast<long long>(gk));
  check_act(op, "log", a.log, kDeltaLogRows, delta_log_width(gk, gv, dk, dv));
  QN_CHECK(a.count >= 0 && a.count <= kDeltaLogTokens && a.pos >= a.count, "%s: %d tokens before position %d", op, a.count, a.pos);
  check_disjoint(op, {{"state", a.state}}, {{"log", a.log}});
  make_current();
  if (a.count) do_delta_replay(a);
}

void Device::gated_norm_matmul(const GatedNormMatmulArgs& a) {
  const char* op = "gated_norm_matmul";
  const int64_t t = a.o.rows(), n = a.o.cols(), dv = a.norm.rows();
  check_vec(op, "norm", a.norm, dv);
  QN_CHECK(dv > 0 && n % dv == 0, "%s: %lld values in heads of %lld", op, static_cast<long long>(n), static_cast<long long>(dv));
  check_act(op, "o", a.o, t, n);
  check_act(op, "z", a.z, t, n, true);
  check_weight(op, "w", a.w, a.h.cols(), n);
  check_act(op, "h", a.h, t, a.w.rows());
  check_disjoint(op, {{"h", a.h}}, {{"o", a.o}, {"z", a.z}, {"norm", a.norm}});
  if (begin(Op::GatedNormMatmul, stored(a.w))) do_gated_norm_matmul(a);
}

void Device::attention(const AttentionArgs& a) {
  const char* op = "attention";
  const int64_t t = a.qgkv.rows(), dh = a.q_norm.rows(), h = a.heads, hk = a.kv_heads;
  QN_CHECK(a.step, "%s: no step parameters", op);
  QN_CHECK(h > 0 && hk > 0 && h % hk == 0 && dh % 32 == 0 && dh > 0, "%s: %lld heads on %lld of width %lld", op, static_cast<long long>(h),
           static_cast<long long>(hk), static_cast<long long>(dh));
  check_act(op, "qgkv", a.qgkv, t, 2 * h * dh + 2 * hk * dh, true);
  check_vec(op, "q_norm", a.q_norm, dh);
  check_vec(op, "k_norm", a.k_norm, dh);
  check_vec(op, "inv_freq", a.inv_freq, a.inv_freq.rows());
  QN_CHECK(2 * a.inv_freq.rows() <= dh, "%s: %lld rotated dims of %lld", op, static_cast<long long>(2 * a.inv_freq.rows()), static_cast<long long>(dh));
  for (const Tensor* c : {&a.k_cache, &a.v_cache})
    QN_CHECK(*c && c->ndim == 3 && c->shape[0] == hk && c->shape[2] == dh && c->shape[1] == a.k_cache.shape[1] && c->dtype == a.k_cache.dtype &&
                 (c->dtype == DType::F32 || c->dtype == DType::BF16 || c->dtype == DType::I8),
             "%s: cache: expected f32, bf16 or int8 (%lld, C, %lld), got %s", op, static_cast<long long>(hk), static_cast<long long>(dh), shape(*c).c_str());
  for (const Tensor* s : {&a.k_scales, &a.v_scales})
    if (a.k_cache.dtype == DType::I8)
      QN_CHECK(*s && s->dtype == DType::F16 && s->ndim == 3 && s->shape[0] == hk && s->shape[1] == a.k_cache.shape[1] && s->shape[2] == kv_groups(dh),
               "%s: scales: expected f16 (%lld, %lld, %lld), got %s", op, static_cast<long long>(hk), static_cast<long long>(a.k_cache.shape[1]),
               static_cast<long long>(kv_groups(dh)), shape(*s).c_str());
    else
      QN_CHECK(!*s, "%s: scales of a cache of %s: expected none, got %s", op, qn::name(a.k_cache.dtype), shape(*s).c_str());
  check_act(op, "o", a.o, t, h * dh);
  check_disjoint(op, {{"o", a.o}, {"k_cache", a.k_cache}, {"v_cache", a.v_cache}, {"k_scales", a.k_scales}, {"v_scales", a.v_scales}}, {{"qgkv", a.qgkv}});
  if (begin(Op::Attention, 0)) do_attention(a);
}

void Device::gate_matmul(const GateMatmulArgs& a) {
  const char* op = "gate_matmul";
  const int64_t t = a.o.rows(), n = a.o.cols();
  check_act(op, "o", a.o, t, n);
  check_act(op, "gate", a.gate, t, n, true);
  check_weight(op, "w", a.w, a.h.cols(), n);
  check_act(op, "h", a.h, t, a.w.rows());
  check_disjoint(op, {{"h", a.h}}, {{"o", a.o}, {"gate", a.gate}});
  if (begin(Op::GateMatmul, stored(a.w))) do_gate_matmul(a);
}

void Device::moe_router(const MoeRouterArgs& a) {
  const char* op = "moe_router";
  const int64_t t = a.h.rows(), d = a.h.cols(), e = a.router.rows(), fs = a.shared.cols();
  check_act(op, "h", a.h, t, d);
  check_vec(op, "norm", a.norm, d);
  check_exact(op, "router", a.router, e, d);
  check_exact(op, "shared_gate", a.shared_gate, 1, d);
  check_weight(op, "shared_gate_up", a.shared_gate_up, 2 * fs, d);
  QN_CHECK(fs % 8 == 0, "%s: shared width %lld must be a multiple of 8", op, static_cast<long long>(fs));
  check_act(op, "x", a.x, t, d);
  check_act(op, "logits", a.logits, t, e);
  check_act(op, "shared", a.shared, t, fs);
  check_vec(op, "shared_scale", a.shared_scale, t);
  check_disjoint(op, {{"x", a.x}, {"logits", a.logits}, {"shared", a.shared}, {"shared_scale", a.shared_scale}},
                 {{"h", a.h}, {"norm", a.norm}});
  if (begin(Op::MoeRouter, stored(a.router) + stored(a.shared_gate) + stored(a.shared_gate_up))) do_moe_router(a);
}

void Device::moe_gate_up(const MoeGateUpArgs& a) {
  const char* op = "moe_gate_up";
  const int64_t t = a.x.rows(), d = a.x.cols(), k = a.ids.cols(), f = a.inner.cols();
  check_act(op, "x", a.x, t, d);
  check_experts(op, a.experts, d, f);
  check_act(op, "logits", a.logits, t, a.experts.count);
  QN_CHECK(k > 0 && k <= a.experts.count, "%s: choose %lld of %d", op, static_cast<long long>(k), a.experts.count);
  QN_CHECK(a.ids.dtype == DType::I32 && a.ids.rows() == t, "%s: ids: got %s", op, shape(a.ids).c_str());
  check_act(op, "weights", a.weights, t, k);
  check_act(op, "inner", a.inner, t * k, f);
  QN_CHECK(f % 8 == 0, "%s: expert width %lld must be a multiple of 8", op, static_cast<long long>(f));
  check_disjoint(op, {{"ids", a.ids}, {"weights", a.weights}, {"inner", a.inner}}, {{"x", a.x}, {"logits", a.logits}});
  if (begin(Op::MoeGateUp, 0)) do_moe_gate_up(a);
  traffic_[static_cast<int>(Op::MoeGateUp)].bytes += stored(a.experts.gate_up(0)) * static_cast<uint64_t>(experts_read(a.ids, a.experts));
}

void Device::moe_down(const MoeDownArgs& a) {
  const char* op = "moe_down";
  const int64_t t = a.h.rows(), d = a.h.cols(), k = a.ids.cols(), f = a.inner.cols(), fs = a.shared.cols();
  check_act(op, "h", a.h, t, d);
  check_experts(op, a.experts, d, f);
  QN_CHECK(a.ids.dtype == DType::I32 && a.ids.rows() == t && k > 0 && k <= a.experts.count, "%s: ids: got %s", op, shape(a.ids).c_str());
  check_act(op, "weights", a.weights, t, k);
  if (a.logits) check_act(op, "logits", a.logits, t, a.experts.count);
  check_act(op, "inner", a.inner, t * k, f);
  check_act(op, "shared", a.shared, t, fs);
  check_vec(op, "shared_scale", a.shared_scale, t);
  check_weight(op, "shared_down", a.shared_down, d, fs);
  check_disjoint(op, {{"h", a.h}},
                 {{"ids", a.ids}, {"weights", a.weights}, {"inner", a.inner}, {"shared", a.shared}, {"shared_scale", a.shared_scale}});
  if (begin(Op::MoeDown, stored(a.shared_down) + stored(a.experts.down(0)) * static_cast<uint64_t>(experts_read(a.ids, a.experts)))) do_moe_down(a);
}

void Device::concat_matmul(const ConcatMatmulArgs& a) {
  const char* op = "concat_matmul";
  const int64_t t = a.a.rows(), d = a.a.cols();
  check_act(op, "a", a.a, t, d);
  check_act(op, "b", a.b, t, d);
  check_vec(op, "norm_a", a.norm_a, d);
  check_vec(op, "norm_b", a.norm_b, d);
  check_weight(op, "w", a.w, -1, 2 * d);
  check_act(op, "y", a.y, t, a.w.rows());
  check_disjoint(op, {{"y", a.y}}, {{"a", a.a}, {"b", a.b}, {"norm_a", a.norm_a}, {"norm_b", a.norm_b}});
  if (begin(Op::ConcatMatmul, stored(a.w))) do_concat_matmul(a);
}

void Device::place_experts(const PlaceExpertsArgs& a) {
  const char* op = "place_experts";
  const int64_t t = a.x.rows(), d = a.x.cols(), k = a.ids.cols();
  QN_CHECK(a.experts.home && a.experts.home->count > 0 && a.box.request && a.box.pending, "%s: experts without a home, or no box", op);
  QN_CHECK(t >= 1 && t <= kPlacedTokens, "%s: %lld tokens of at most %d", op, static_cast<long long>(t), kPlacedTokens);
  check_act(op, "x", a.x, t, d);
  check_experts(op, a.experts, d, a.experts.f);
  check_act(op, "logits", a.logits, t, a.experts.count);
  QN_CHECK(k > 0 && k <= a.experts.count && a.ids.dtype == DType::I32 && a.ids.rows() == t, "%s: ids: got %s", op, shape(a.ids).c_str());
  check_act(op, "weights", a.weights, t, k);
  check_disjoint(op, {{"ids", a.ids}, {"weights", a.weights}}, {{"x", a.x}, {"logits", a.logits}});
  if (a.next_router) {
    check_act(op, "h", a.h, t, d);
    check_vec(op, "next_norm", a.next_norm, d);
    check_weight(op, "next_router", a.next_router, a.next.count, d);
    QN_CHECK(a.next.home && !is_t16(a.next_router.dtype) && k <= a.next.count && d % 8 == 0, "%s: the next layer's experts have no home, or are fewer than %lld", op,
             static_cast<long long>(k));
  }
  if (begin(Op::PlaceExperts, 0)) do_place_experts(a);
}

void Device::join_experts(const JoinExpertsArgs& a) {
  QN_CHECK(a.box.request && a.box.pending && a.h.rows() <= kPlacedTokens, "join_experts: no box, or h is %s", shape(a.h).c_str());
  check_act("join_experts", "h", a.h, a.h.rows(), a.h.cols());
  if (begin(Op::JoinExperts, 0)) do_join_experts(a);
}

void Device::expert_pairs(const ExpertPairsArgs& a) {
  const char* op = "expert_pairs";
  const int64_t t = a.x.rows(), d = a.x.cols(), n = a.token.rows();
  check_act(op, "x", a.x, t, d);
  check_act(op, "y", a.y, t, d);
  check_experts(op, a.experts, d, a.experts.f);
  QN_CHECK(a.token && a.expert && a.token.dtype == DType::I32 && a.expert.dtype == DType::I32 && a.expert.rows() == n, "%s: pairs: got %s, %s", op,
           shape(a.token).c_str(), shape(a.expert).c_str());
  check_vec(op, "weight", a.weight, n);
  check_disjoint(op, {{"y", a.y}}, {{"x", a.x}});
  for (int64_t i = 0; i < n; i++)  // memory of the host, on every device that has the operation
    QN_CHECK(a.token.i32()[i] >= 0 && a.token.i32()[i] < t && a.expert.i32()[i] >= 0 && a.expert.i32()[i] < a.experts.count, "%s: pair %lld is token %d, expert %d",
             op, static_cast<long long>(i), a.token.i32()[i], a.expert.i32()[i]);
  if (begin(Op::ExpertPairs, stored(a.experts.gate_up(0)) + stored(a.experts.down(0)))) do_expert_pairs(a);
}

void Device::sample(const SampleArgs& a) {
  const char* op = "sample";
  QN_CHECK(samples(), "%s: %s leaves it to the host", op, name().c_str());
  const int64_t v = a.logits.cols();
  QN_CHECK(a.logits.rows() >= 1 && a.logits.rows() <= 8 && a.ahead >= 0, "%s: %lld rows, %d ahead", op, static_cast<long long>(a.logits.rows()), a.ahead);
  check_act(op, "logits", a.logits, a.logits.rows(), v);
  QN_CHECK(!a.allowed || (a.allowed.dtype == DType::U8 && a.allowed.rows() == v), "%s: allowed: got %s", op, shape(a.allowed).c_str());
  QN_CHECK(a.history && a.history.dtype == DType::I32 && a.history.ndim == 1, "%s: history: got %s", op, shape(a.history).c_str());
  QN_CHECK(a.ids && a.ids.dtype == DType::I32 && a.ids.rows() >= 1, "%s: ids: got %s", op, shape(a.ids).c_str());
  QN_CHECK(a.params && a.step, "%s: no parameters or step", op);
  if (begin(Op::Sample, static_cast<uint64_t>(a.logits.rows() * v) * 4)) do_sample(a);
}

}  // namespace qn
