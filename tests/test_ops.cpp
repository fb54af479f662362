// One table of operations: op x weight format x activation rounding x shape, run on every device and compared with ref.
//
//   A case builds its inputs from a seed, runs one operation on a device and returns its outputs as floats. Every buffer that an
//   operation writes lies between guard words. The outputs of ref, mutated in the ways kernels go wrong (zeroed, negated, shifted
//   by one row, last tile missing, nothing done), must fail the very comparison that the device has to pass.
//
//   Bounds. fp32 sums of K products err by about sqrt(K) * 2^-24 of their scale: nmse 1e-10 is two decades above that for K <= 4096.
//   With rounded activations, inputs computed inside an operation (after its norm) may differ by one fp32 ulp between devices and then
//   fall on the other side of a rounding boundary: that moves single codes by one step (2^-8 or 1/127 of a value), rarely; nmse
//   1e-6, still four decades below what losing one tile of sixteen costs.
//   An INT8 cache stores keys in steps of 1/127 of the largest of 128 values, about 1/40 of their rms. Devices that differ by an ulp
//   before rounding move single codes by one such step, and, where a scale falls on the other side of a boundary of fp16, one code of
//   fifty of a group: (1/40)^2 / 50 = 1.3e-5 of that group, in a cache of at least four rows of two. nmse 1e-5, and 4e-2 rms for the step.
//   Single values of such a case are held against the rms of their own row: rows of attention that see few keys are several times larger
//   than those that see many, and so are their rounding errors.
//   Attention of enough tokens and heads to fill a GPU may round p to BF16, as operand of a product. The error is uniform within 2^-8 of p's
//   binade: (2^-8)^2 / 3 times the mean of (binade / p)^2, 0.54, is 2.75e-6 of sum p^2 v^2, and so of o where the v are independent
//   (measured: 1.05e-6 to 1.8e-6). nmse 4e-6, for such cases alone.
//   The delta rule in chunks rounds operands to BF16 (2^-9 each, several in a row): relative error 1e-2 of the norm, 1e-1 rms for one value.
//   Products with codes are as good as fp32 on every device (a code is exact in BF16, scales meet sums in fp32) and add nothing to that.
#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>

#include "ggml-lite/base/check.h"
#include "ggml-lite/core/codec.h"
#include "ggml-lite/core/device.h"
#include "ggml-lite/cpu/cpu.h"
#include "cuda/cuda.h"
#include "ggml-lite/ref/ref.h"
#include "tests/close.h"

namespace {

using namespace qn;
using Floats = std::vector<float>;

struct Output {
  std::string name;
  Floats before, after;  // before: what lay there when the operation began (in/out tensors), else empty
  int64_t row;           // values per row
};
using Outputs = std::vector<Output>;

// Memory of one run of one case.
class Bench {
 public:
  Bench(Device& device, uint32_t seed) : device_(device), random_(seed) {}
  ~Bench() {
    try {
      device_.sync();
    } catch (const Error&) {  // reported where it happened
    }
  }

  float normal(float sd) { return std::normal_distribution<float>(0, sd)(random_); }
  float uniform(float lo, float hi) { return std::uniform_real_distribution<float>(lo, hi)(random_); }
  Floats normals(int64_t n, float sd) {
    Floats v(static_cast<size_t>(n));
    for (float& x : v) x = normal(sd);
    return v;
  }

  // Input of shape (d0, d1, d2)
  Tensor in(const Floats& v, int64_t d0, int64_t d1 = 0, int64_t d2 = 0) { return put(v.data(), v.size() * 4, DType::F32, d0, d1, d2); }
  Tensor in(const std::vector<int32_t>& v) { return put(v.data(), v.size() * 4, DType::I32, static_cast<int64_t>(v.size()), 0, 0); }
  // (rows, width) as columns [at, at+width) of something wider filled with values that must not matter
  Tensor slice_in(const Floats& v, int64_t rows, int64_t width, int64_t at, int64_t whole) {
    Floats wide = normals(rows * whole, 100);
    for (int64_t r = 0; r < rows; r++) std::copy_n(v.begin() + r * width, width, wide.begin() + r * whole + at);
    return in(wide, rows, whole).columns(at, width);
  }

  // A weight matrix whose values have about the given standard deviation; every byte pattern a file may hold can occur.
  Tensor weights(DType t, int64_t n, int64_t k, int group = 0, float sd = 0.05f) {
    const std::vector<uint8_t> b = weight_bytes_random(t, n, k, group, sd);
    Tensor w = put(b.data(), b.size(), DType::U8, static_cast<int64_t>(b.size()), 0, 0);
    return weight(w.data, t, n, k, group);
  }
  Experts experts(DType t, int e, int64_t d, int64_t f, int group) {
    Experts x;
    x.dtype = t, x.group = static_cast<uint16_t>(group), x.count = e, x.d = d, x.f = f;
    const ExpertLayout l = x.layout();
    std::vector<uint8_t> all(static_cast<size_t>(e * l.stride), 0xee);  // padding is never read
    for (int i = 0; i < e; i++) {
      const auto up = weight_bytes_random(t, 2 * f, d, group, 0.05f), down = weight_bytes_random(t, d, f, group, 0.05f);
      std::ranges::copy(up, all.begin() + i * l.stride);
      std::ranges::copy(down, all.begin() + i * l.stride + l.down_offset);
    }
    x.data = static_cast<const uint8_t*>(put(all.data(), all.size(), DType::U8, static_cast<int64_t>(all.size()), 0, 0).data);
    return x;
  }

  // Written by the operation: between guards, reported by finish(). `start` empty: filled with a value that must vanish.
  Tensor out(const char* name, int64_t d0, int64_t d1 = 0, int64_t d2 = 0, Floats start = {}, DType type = DType::F32) {
    const auto n = static_cast<size_t>(d0 * std::max<int64_t>(d1, 1) * std::max<int64_t>(d2, 1));
    const bool inout = !start.empty();
    if (!inout) start.assign(n, 7777.f);
    std::vector<uint8_t> bytes(2 * kGuard + n * static_cast<size_t>(item_bytes(type)), 0xa5);
    for (size_t i = 0; i < n; i++)
      if (type == DType::BF16) reinterpret_cast<uint16_t*>(&bytes[kGuard])[i] = float_to_bf16(start[i]);
      else if (type == DType::F16) reinterpret_cast<uint16_t*>(&bytes[kGuard])[i] = float_to_half(start[i]);
      else if (type == DType::I8) bytes[kGuard + i] = static_cast<uint8_t>(static_cast<int8_t>(start[i]));
      else reinterpret_cast<float*>(&bytes[kGuard])[i] = start[i];
    buffers_.push_back(device_.alloc(bytes.size(), name));
    device_.upload(buffers_.back().data(), bytes.data(), bytes.size());
    const Tensor t = view(static_cast<uint8_t*>(buffers_.back().data()) + kGuard, type, d0, d1, d2);
    outs_.push_back({{name, inout ? start : Floats(), {}, std::max<int64_t>(t.row_stride, 1)}, t, bytes.size()});
    return t;
  }
  const StepParams* step(int pos, int n, int from = 0) {
    const StepParams p{pos, n, from};
    return static_cast<const StepParams*>(put(&p, sizeof p, DType::U8, sizeof p, 0, 0).data);
  }

  Outputs finish() {
    device_.sync();
    Outputs all;
    for (Out& o : outs_) {
      std::vector<uint8_t> bytes(o.bytes);
      device_.download(bytes.data(), static_cast<uint8_t*>(o.t.data) - kGuard, bytes.size());
      for (size_t i = 0; i < kGuard; i++) {
        REQUIRE_MESSAGE(bytes[i] == 0xa5, o.report.name, ": wrote before its output");
        REQUIRE_MESSAGE(bytes[bytes.size() - 1 - i] == 0xa5, o.report.name, ": wrote behind its output");
      }
      const size_t n = (o.bytes - 2 * kGuard) / static_cast<size_t>(item_bytes(o.t.dtype));
      for (size_t i = 0; i < n; i++) {
        float f;
        int32_t v;
        if (o.t.dtype == DType::BF16) f = bf16_to_float(reinterpret_cast<const uint16_t*>(&bytes[kGuard])[i]);
        else if (o.t.dtype == DType::F16) f = half_to_float(reinterpret_cast<const uint16_t*>(&bytes[kGuard])[i]);
        else if (o.t.dtype == DType::I8) f = static_cast<int8_t>(bytes[kGuard + i]);
        else if (o.t.dtype == DType::I32) std::memcpy(&v, &bytes[kGuard + 4 * i], 4), f = static_cast<float>(v + 1);
        else std::memcpy(&f, &bytes[kGuard + 4 * i], 4);
        o.report.after.push_back(f);
      }
      all.push_back(o.report);
    }
    return all;
  }

 private:
  static constexpr size_t kGuard = 256;
  struct Out {
    Output report;
    Tensor t;
    size_t bytes;
  };

  Tensor put(const void* p, size_t bytes, DType t, int64_t d0, int64_t d1, int64_t d2) {
    buffers_.push_back(device_.alloc(std::max<size_t>(bytes, 1), "input"));
    device_.upload(buffers_.back().data(), p, bytes);
    return view(buffers_.back().data(), t, d0, d1, d2);
  }

  std::vector<uint8_t> weight_bytes_random(DType t, int64_t n, int64_t k, int group, float sd) {
    std::vector<uint8_t> b(static_cast<size_t>(weight_bytes(t, n, k, group)));
    if (!is_t16(t)) {
      for (int64_t i = 0; i < n * k; i++) {
        const float v = normal(sd);
        const uint16_t h = float_to_bf16(v);
        if (t == DType::BF16) std::memcpy(&b[static_cast<size_t>(2 * i)], &h, 2);
        else std::memcpy(&b[static_cast<size_t>(4 * i)], &v, 4);
      }
      return b;
    }
    const int64_t kp = round_up(k, kPadK);
    std::vector<uint8_t> codes(static_cast<size_t>(16 * kp));
    std::vector<uint16_t> scales(static_cast<size_t>(kp / group * 16));
    for (int64_t p = 0; p < t16_panels(n); p++) {
      for (int64_t r = 0; r < 16; r++)
        for (int64_t c = 0; c < kp; c++) {
          const bool real = p * 16 + r < n && c < k;
          codes[static_cast<size_t>(r * kp + c)] = static_cast<uint8_t>(!real ? code_zero(t) : t == DType::INT4 ? random_() % 16 : 1 + random_() % 255);
        }
      for (uint16_t& s : scales) s = float_to_half(sd / (t == DType::INT4 ? 4.6f : 74.f) * uniform(0.5f, 1.5f) * (random_() % 4 ? 1.f : -1.f));
      write_panel(t, k, group, codes.data(), scales.data(), &b[static_cast<size_t>(p * t16_panel_bytes(t, k, group))]);
    }
    return b;
  }

  Device& device_;
  std::mt19937 random_;
  std::vector<Buffer> buffers_;
  std::vector<Out> outs_;
};

struct Case {
  std::string name;
  Act act;
  std::function<void(Device&, Bench&)> run;
  bool codes = false;     // of an INT8 cache among the outputs
  bool chunked = false;   // a recurrence that may be taken in chunks with BF16 operands
  bool rounds_p = false;  // attention that may round its probabilities to BF16
};

struct Format {
  DType type;
  int group;
};
const Format kFormats[] = {{DType::F32, 0},    {DType::BF16, 0},  {DType::INT8, 32},  {DType::INT8, 64},
                           {DType::INT8, 128}, {DType::INT4, 32}, {DType::INT4, 64}, {DType::INT4, 128}};
const Act kActs[] = {Act::F32, Act::BF16, Act::INT8};

std::string label(const char* op, Format f, Act a, std::initializer_list<std::pair<const char*, int64_t>> dims) {
  std::string s = std::string(op) + " " + name(f.type) + (f.group ? "g" + std::to_string(f.group) : "") + " act=" + name(a);
  for (auto [k, v] : dims) s += std::string(" ") + k + "=" + std::to_string(v);
  return s;
}

// Activations whose groups differ in scale, with outliers, as real ones have
Floats activations(Bench& b, int64_t t, int64_t n) {
  Floats x = b.normals(t * n, 1);
  for (int64_t i = 0; i < t * n; i++) x[static_cast<size_t>(i)] *= i % 97 == 5 ? 12.f : (i / 128 % 3 + 0.25f);
  return x;
}
Floats norm_weights(Bench& b, int64_t n) {
  Floats w(static_cast<size_t>(n));
  for (float& v : w) v = b.uniform(0.5f, 1.5f);
  return w;
}

void norm_matmul_case(std::vector<Case>& out, Format f, Act act, int64_t t, int64_t k, int64_t n, bool norm) {
  if (f.group && k % f.group) return;
  out.push_back({label(norm ? "norm_matmul" : "matmul", f, act, {{"T", t}, {"K", k}, {"N", n}}), act, [=](Device& d, Bench& b) {
                   NormMatmulArgs a;
                   a.h = b.in(activations(b, t, k), t, k);
                   if (norm) a.norm = b.in(norm_weights(b, k), k);
                   a.act = act;
                   a.w = b.weights(f.type, n, k, f.group);
                   a.y = b.out("y", t, n);
                   if (norm) {
                     a.w_exact = b.weights(DType::BF16, 6, k);
                     a.y_exact = b.out("y_exact", t, 6);
                     a.normed = b.out("normed", t, k);
                   }
                   d.norm_matmul(a);
                 }});
}

void delta_case(std::vector<Case>& out, int pos, int64_t t, int gk, int gv, int64_t dk, int64_t dv, DType conv, int64_t slots = 4,
                Act act = Act::F32, bool logs = false, int from = 0) {
  out.push_back({label("delta_net", {conv, 0}, act, {{"pos", pos}, {"T", t}, {"GK", gk}, {"GV", gv}, {"DK", dk}, {"DV", dv}, {"slots", slots}}) +
                     (logs ? " log from=" + std::to_string(from) : ""),
                 act, [=](Device& d, Bench& b) {
                   const int64_t ch = 2 * gk * dk + gv * dv;
                   DeltaNetArgs a;
                   a.qkv = b.slice_in(b.normals(t * ch, 1), t, ch, 0, ch + 32);
                   a.ba = b.in(b.normals(t * 2 * gv, 2), t, 2 * gv);
                   a.conv = b.weights(conv, ch, 4, 0, 0.5f);
                   Floats na, dt;
                   for (int h = 0; h < gv; h++) {  // from heads that forget in a token to heads that remember thousands
                     na.push_back(-std::exp(b.uniform(-6, 2.7f)));
                     dt.push_back(b.uniform(-6, 1));
                   }
                   a.neg_a = b.in(na, gv), a.dt_bias = b.in(dt, gv);
                   Floats ring = pos ? b.normals(slots * ch, 1) : Floats(static_cast<size_t>(slots * ch));
                   Floats state = pos ? b.normals(gv * dk * dv, 0.1f) : Floats(static_cast<size_t>(gv * dk * dv));
                   a.conv_ring = b.out("ring", slots, ch, 0, ring);
                   a.state = b.out("state", gv, dk, dv, state);
                   a.o = b.out("o", t, gv * dv);
                   if (logs) {
                     const int64_t width = delta_log_width(gk, gv, dk, dv);
                     Floats log = b.normals(kDeltaLogRows * width, 0.3f);
                     for (int64_t i = 0; i < kDeltaLogRows * gv; i++) log[static_cast<size_t>(i / gv * width + gk * dk + i % gv * (dv + 4) + dv)] = b.uniform(0, 1);
                     a.log = b.in(log, kDeltaLogRows, width);
                   }
                   a.key_heads = gk, a.value_heads = gv, a.act = act, a.step = b.step(pos, static_cast<int>(t), from);
                   d.delta_net(a);
                   if (logs && t > 1) d.delta_replay({a.log, a.state, gk, pos + static_cast<int>(t), static_cast<int>(t)});
                 }, false, act != Act::F32});
}

// As in a layer: the second operation may find something prepared by the first
void gated_delta_case(std::vector<Case>& out, Format f, Act act, int64_t t, int gk, int gv, int64_t dk, int64_t dv, int64_t dim) {
  const int64_t ch = 2 * gk * dk + gv * dv, n = gv * dv;
  if (f.group && n % f.group) return;
  out.push_back({label("delta_net, gated_norm_matmul", f, act, {{"T", t}, {"GK", gk}, {"GV", gv}, {"DK", dk}, {"DV", dv}, {"D", dim}}), act, [=](Device& d, Bench& b) {
                   const Tensor qkvz = b.in(b.normals(t * (ch + n), 1), t, ch + n);
                   DeltaNetArgs a;
                   a.qkv = qkvz.columns(0, ch), a.z = qkvz.columns(ch, n), a.out_norm = b.in(norm_weights(b, dv), dv);
                   a.ba = b.in(b.normals(t * 2 * gv, 2), t, 2 * gv), a.conv = b.weights(DType::F32, ch, 4, 0, 0.5f);
                   a.neg_a = b.in(Floats(static_cast<size_t>(gv), -0.3f), gv), a.dt_bias = b.in(Floats(static_cast<size_t>(gv), 0.1f), gv);
                   a.conv_ring = b.out("ring", 16, ch, 0, b.normals(16 * ch, 1)), a.state = b.out("state", gv, dk, dv, b.normals(gv * dk * dv, 0.1f));
                   a.o = b.out("o", t, n), a.key_heads = gk, a.value_heads = gv, a.act = act, a.step = b.step(21, static_cast<int>(t), 0);
                   d.delta_net(a);
                   GatedNormMatmulArgs m;
                   m.o = a.o, m.z = a.z, m.norm = a.out_norm, m.key_dim = dk, m.act = act, m.w = b.weights(f.type, dim, n, f.group);
                   m.h = b.out("h", t, dim, 0, b.normals(t * dim, 1));
                   d.gated_norm_matmul(m);
                 }, false, act != Act::F32 && t > 8});
}

void attention_case(std::vector<Case>& out, int pos, int64_t t, int h, int hk, int64_t dh, int64_t r, DType kv) {
  out.push_back({label("attention", {kv, 0}, kv == DType::F32 ? Act::F32 : Act::BF16, {{"pos", pos}, {"T", t}, {"H", h}, {"HK", hk}, {"DH", dh}, {"R", r}}),
                 kv == DType::F32 ? Act::F32 : Act::BF16, [=](Device& d, Bench& b) {
                   const int64_t width = 2 * (h + hk) * dh, c = pos + t + 3;
                   AttentionArgs a;
                   a.qgkv = b.in(b.normals(t * width, 1), t, width);
                   a.q_norm = b.in(norm_weights(b, dh), dh), a.k_norm = b.in(norm_weights(b, dh), dh);
                   Floats freq;
                   for (int64_t i = 0; i < r / 2; i++) freq.push_back(static_cast<float>(std::pow(1e7, -2.0 * static_cast<double>(i) / static_cast<double>(r))));
                   a.inv_freq = b.in(freq, r / 2), a.rope_scale = pos % 2 ? 1.1386f : 1.f;
                   const auto cache = [&](const char* name, const char* scales, Tensor& values, Tensor& of_codes) {
                     const Floats x = b.normals(hk * c * dh, 1);
                     if (kv != DType::I8) return void(values = b.out(name, hk, c, dh, x, kv));
                     const int64_t groups = kv_groups(dh);
                     std::vector<int8_t> codes(x.size());
                     std::vector<uint16_t> halves(static_cast<size_t>(hk * c * groups));
                     for (int64_t r = 0; r < hk * c; r++) quantize_kv(std::span(x).subspan(r * dh, dh), &codes[r * dh], &halves[r * groups]);
                     values = b.out(name, hk, c, dh, Floats(codes.begin(), codes.end()), DType::I8);
                     Floats start;
                     for (uint16_t h : halves) start.push_back(half_to_float(h));
                     of_codes = b.out(scales, hk, c, groups, start, DType::F16);
                   };
                   cache("k_cache", "k_scales", a.k_cache, a.k_scales);
                   cache("v_cache", "v_scales", a.v_cache, a.v_scales);
                   a.heads = h, a.kv_heads = hk, a.step = b.step(pos, static_cast<int>(t)), a.act = kv == DType::F32 ? Act::F32 : Act::BF16;
                   a.o = b.out("o", t, h * dh), a.then_gate = true;
                   d.attention(a);
                   if (t > 9) return;
                   GateMatmulArgs m;  // as in a layer: it may find something prepared
                   m.o = a.o, m.gate = a.qgkv.columns(h * dh, h * dh), m.act = a.act, m.behind = true, m.w = b.weights(DType::BF16, 32, h * dh);
                   m.h = b.out("h", t, 32, 0, Floats(static_cast<size_t>(t * 32)));
                   d.gate_matmul(m);
                 }, kv == DType::I8, false, kv == DType::BF16 && h >= 64});
}

void moe_cases(std::vector<Case>& out, Format f, Format shared, Act act, int64_t t, int e, int k, int64_t dim, int64_t width, int64_t fs) {
  if ((f.group && (dim % f.group || width % f.group)) || (shared.group && (dim % shared.group || fs % shared.group))) return;
  const auto dims = {std::pair<const char*, int64_t>{"T", t}, {"E", e}, {"K", k}, {"D", dim}, {"F", width}};
  out.push_back({label("moe_router", shared, act, dims), act, [=](Device& d, Bench& b) {
                   MoeRouterArgs a;
                   a.h = b.in(activations(b, t, dim), t, dim), a.norm = b.in(norm_weights(b, dim), dim);
                   a.router = b.weights(DType::BF16, e, dim), a.shared_gate = b.weights(DType::BF16, 1, dim);
                   a.shared_act = act, a.shared_gate_up = b.weights(shared.type, 2 * fs, dim, shared.group);
                   a.x = b.out("x", t, dim), a.logits = b.out("logits", t, e);
                   a.shared = b.out("shared", t, fs), a.shared_scale = b.out("shared_scale", t);
                   d.moe_router(a);
                 }});
  out.push_back({label("moe_gate_up", f, act, dims), act, [=](Device& d, Bench& b) {
                   MoeGateUpArgs a;
                   a.x = b.in(activations(b, t, dim), t, dim);
                   Floats l = b.normals(t * e, 2);
                   if (e > 3) l[1] = l[3] = 9.f, l[static_cast<size_t>(e - 1)] = 9.f;  // ties: the lower index comes first
                   a.logits = b.in(l, t, e), a.renormalise = t % 2 == 1, a.act = act, a.experts = b.experts(f.type, e, dim, width, f.group);
                   a.ids = b.out("ids", t, k, 0, {}, DType::I32), a.weights = b.out("weights", t, k), a.inner = b.out("inner", t * k, width);
                   d.moe_gate_up(a);
                 }});
  for (bool both : {false, true})  // the operation before gives logits, and may have prepared something
    out.push_back({label(both ? "moe_gate_up, moe_down" : "moe_down", f, act, dims), act, [=](Device& d, Bench& b) {
                   MoeDownArgs a;
                   a.act = act, a.experts = b.experts(f.type, e, dim, width, f.group);
                   if (both) {
                     MoeGateUpArgs up;
                     Floats l = b.normals(t * e, 2);
                     for (int64_t i = 0; i < t; i++) l[static_cast<size_t>(i * e + i * 3 % e)] = 7.f;
                     up.x = b.in(activations(b, t, dim), t, dim), up.logits = a.logits = b.in(l, t, e), up.act = act, up.experts = a.experts;
                     up.ids = a.ids = b.out("ids", t, k, 0, {}, DType::I32), up.weights = a.weights = b.out("weights", t, k);
                     up.inner = a.inner = b.out("inner", t * k, width);
                     d.moe_gate_up(up);
                   } else {
                     std::vector<int32_t> ids;
                     for (int64_t i = 0; i < t; i++)
                       for (int j = 0; j < k; j++) ids.push_back(static_cast<int32_t>((i * 3 + j * 5 + i * j) % e));
                     Tensor flat = b.in(ids);
                     a.ids = view(flat.data, DType::I32, t, k);
                     Floats w(static_cast<size_t>(t * k));
                     for (float& v : w) v = b.uniform(0.05f, 0.5f);
                     a.weights = b.in(w, t, k), a.inner = b.in(activations(b, t * k, width), t * k, width);
                   }
                   a.shared = b.in(activations(b, t, fs), t, fs), a.shared_act = act;
                   Floats s(static_cast<size_t>(t));
                   for (float& v : s) v = b.uniform(0.1f, 0.9f);
                   a.shared_scale = b.in(s, t), a.shared_down = b.weights(shared.type, dim, fs, shared.group);
                   a.h = b.out("h", t, dim, 0, b.normals(t * dim, 1));
                   d.moe_down(a);
                 }});
}

void gated_cases(std::vector<Case>& out, Format f, Act act, int64_t t, int heads, int64_t dv, int64_t dim) {
  const int64_t n = heads * dv;
  if (f.group && n % f.group) return;
  const auto dims = {std::pair<const char*, int64_t>{"T", t}, {"heads", heads}, {"DV", dv}, {"D", dim}};
  out.push_back({label("gated_norm_matmul", f, act, dims), act, [=](Device& d, Bench& b) {
                   GatedNormMatmulArgs a;
                   a.o = b.in(b.normals(t * n, 0.3f), t, n), a.z = b.slice_in(b.normals(t * n, 1), t, n, 64, n + 96);
                   a.norm = b.in(norm_weights(b, dv), dv), a.act = act, a.w = b.weights(f.type, dim, n, f.group);
                   a.h = b.out("h", t, dim, 0, b.normals(t * dim, 1));
                   d.gated_norm_matmul(a);
                 }});
  out.push_back({label("gate_matmul", f, act, dims), act, [=](Device& d, Bench& b) {
                   GateMatmulArgs a;
                   a.o = b.in(b.normals(t * n, 1), t, n), a.gate = b.slice_in(b.normals(t * n, 2), t, n, 32, n + 64);
                   a.act = act, a.w = b.weights(f.type, dim, n, f.group), a.h = b.out("h", t, dim, 0, b.normals(t * dim, 1));
                   d.gate_matmul(a);
                 }});
  if (dim % 32 == 0 && (!f.group || 2 * dim % f.group == 0))
    out.push_back({label("concat_matmul", f, act, dims), act, [=](Device& d, Bench& b) {
                     ConcatMatmulArgs a;
                     a.a = b.in(b.normals(t * dim, 1), t, dim), a.b = b.in(b.normals(t * dim, 3), t, dim);
                     a.norm_a = b.in(norm_weights(b, dim), dim), a.norm_b = b.in(norm_weights(b, dim), dim);
                     a.act = act, a.w = b.weights(f.type, dim, 2 * dim, f.group), a.y = b.out("y", t, dim);
                     d.concat_matmul(a);
                   }});
}

std::vector<Case> table() {
  std::vector<Case> c;
  for (Format f : kFormats)
    for (Act act : kActs) {
      for (int64_t n = 1; n <= 17; n++) norm_matmul_case(c, f, act, 1, 256, n, false);                 // every remainder of a panel
      for (int64_t t : {2, 3, 7, 8, 9, 17}) norm_matmul_case(c, f, act, t, 256, 33, t % 2 == 1);       // and of a block of tokens
      for (int64_t k : {32, 64, 96, 128, 160, 192, 320, 384, 2048}) norm_matmul_case(c, f, act, 3, k, 31, k % 64 == 0);
      if (f.group == 128) norm_matmul_case(c, f, act, 1, 2048, 1174, true);                            // a head for guesses
      if (f.group && act == Act::INT8) {  // tokens enough for kernels that unpack weights first
        for (int64_t t : {32, 40, 97}) norm_matmul_case(c, f, act, t, t == 97 ? 128 : 384, 49, false);
        moe_cases(c, f, f, act, 70, 6, 3, 256, 128, 128);
      }
      gated_cases(c, f, act, 1, 4, 128, 64);
      gated_cases(c, f, act, 5, 3, 64, 96);
      gated_cases(c, f, act, 9, 2, 128, 256);
      moe_cases(c, f, f, act, 1, 8, 2, 128, 128, 128);
      moe_cases(c, f, {DType::BF16, 0}, act, 9, 16, 4, 256, 64, 32);
      moe_cases(c, f, {DType::INT8, 32}, act, 3, 5, 5, 96, 32, 96);
    }
  moe_cases(c, {DType::INT4, 32}, {DType::BF16, 0}, Act::INT8, 33, 512, 10, 64, 64, 64);
  // Widths of the real model, where fast kernels cut K among all their warps
  for (Format f : {Format{DType::BF16, 0}, {DType::INT8, 128}})
    for (int64_t t : {1, 3}) {
      moe_cases(c, {DType::INT4, 128}, f, Act::BF16, t, 11, 10, t == 3 ? 1152 : 2048, t == 3 ? 256 : 512, 256);
      gated_cases(c, f, Act::BF16, t, 32, 128, 32);
      gated_delta_case(c, f, Act::BF16, t, 2, 4, 128, 128, 64);
    }
  for (Format f : {Format{DType::BF16, 0}, {DType::INT8, 128}, {DType::INT4, 128}})  // whole chunks for every warp
    for (int64_t t : {1, 2, 4, 5, 8}) {
      norm_matmul_case(c, f, Act::BF16, t, 2048, 41, true);
      if (t != 2) gated_delta_case(c, f, Act::BF16, t, 16, 32, 128, 128, 40);
    }
  for (int64_t t : {1, 2, 4, 5, 8})  // shared experts of more slabs than warps do
    for (int e : {11, 70}) moe_cases(c, {DType::INT4, 128}, {e == 11 ? DType::INT8 : DType::BF16, e == 11 ? 64 : 0}, Act::BF16, t, e, 10, 256, 512, 512);
  moe_cases(c, {DType::INT4, 128}, {DType::BF16, 0}, Act::BF16, 1, 40, 10, 512, 384, 256);  // more candidates than a warp has lanes
  for (DType conv : {DType::F32, DType::BF16}) {
    for (int64_t t : {1, 2, 3, 4, 5, 8, 63, 64, 65, 127}) delta_case(c, 0, t, 2, 4, 128, 128, conv);
    for (int pos : {1, 2, 3, 4, 61, 64}) delta_case(c, pos, pos % 2 ? 1 : 67, 1, 2, 128, 128, conv);
    for (int64_t t = 1; t <= 8; t++) delta_case(c, t % 2 ? static_cast<int>(13 * t) : 0, t, 4, 8, 128, 128, conv, 16);
    for (int64_t t : {1, 2, 3, 5, 8})  // with a log, of which some counts
      for (int from : {0, 1, 4, 5, 8}) delta_case(c, t == 5 ? 40 : 45, t, 2, 4, 128, 128, conv, 16, Act::F32, true, from);
    for (int from : {0, 2, 7}) delta_case(c, from == 2 ? 35 : 30, from == 7 ? 8 : 3, 1, 3, 32, 96, conv, 16, Act::F32, true, from);
    for (int64_t t : {1, 9, 127, 128, 129, 160, 191, 192}) delta_case(c, t % 2 ? 0 : 70, t, 2, t == 129 ? 2 : 4, 128, 128, conv, t == 191 ? 16 : 4, Act::BF16);
    for (int pos : {1, 2, 3}) delta_case(c, pos, 128 + pos, 1, 3, 128, 128, conv, 4, Act::BF16);
    delta_case(c, 7, 3, 2, 2, 64, 32, conv);
    delta_case(c, 9, 5, 1, 3, 32, 96, conv);
  }
  for (int64_t t : {2, 7, 9}) gated_delta_case(c, {DType::BF16, 0}, Act::BF16, t, 16, 32, 128, 128, 96);
  for (Act act : {Act::F32, Act::BF16, Act::INT8})
    for (int64_t dv : {128, 96}) gated_delta_case(c, {DType::INT8, 32}, act, 3, 1, 3, dv == 96 ? 32 : 128, dv, 48);
  for (DType kv : {DType::F32, DType::BF16, DType::I8}) {
    for (int pos : {0, 1, 15, 63, 64, 255, 256, 300}) attention_case(c, pos, 1, 8, 1, 256, 64, kv);
    for (int64_t t : {2, 5, 8, 65}) attention_case(c, static_cast<int>(t) - 2, t, 4, 2, 256, 64, kv);
    attention_case(c, 250, 9, 4, 4, 128, 128, kv);
    attention_case(c, 3, 2, 6, 2, 32, 8, kv);
  }
  for (int t = 1; t <= 9; t++) attention_case(c, 130 - t, t, 4, 2, 256, 64, DType::I8);  // across a boundary of tiles; all few, then many
  for (int64_t dh : {96, 128, 160, 288}) attention_case(c, 70, 3, 3, 1, dh, 32, DType::I8);  // remainders of a group
  attention_case(c, 33, 100, 16, 2, 256, 64, DType::I8);
  for (int pos : {0, 5, 63, 200}) attention_case(c, pos, 160 - pos % 7, 64, 8, 256, 64, DType::BF16);  // blocks for half of a large GPU
  for (int pos : {0, 70}) attention_case(c, pos, 161, 64, 8, 256, 64, DType::I8);
  for (int pos : {254, 700}) attention_case(c, pos, 1, 32, 32, 256, 64, DType::I8);  // more chunks of a head than a large GPU has multiprocessors for it
  attention_case(c, 100, 97, 36, 12, 256, 64, DType::BF16), attention_case(c, 7, 150, 64, 4, 256, 64, DType::BF16);
  for (DType t : {DType::F32, DType::BF16})
    c.push_back({std::string("embed ") + name(t), Act::F32, [=](Device& d, Bench& b) {
                   EmbedArgs a;
                   a.ids = b.in(std::vector<int32_t>{0, 36, 5, 5, 17}), a.table = b.weights(t, 37, 64), a.h = b.out("h", 5, 64);
                   d.embed(a);
                 }});
  return c;
}

// The comparison every device has to pass and every mutant has to fail.
Close compare(const Case& c, const Output& ref, const Floats& got) {
  const bool exact = c.act == Act::F32;
  if (c.chunked) return close(ref.after, got, 1e-4, 1e-1 * rms(ref.after));
  if (!c.codes) return close(ref.after, got, exact ? 1e-10 : c.rounds_p ? 4e-6 : 1e-6, (exact ? 2e-4 : 2e-2) * rms(ref.after));
  const Close whole = close(ref.after, got, 1e-5, INFINITY);
  for (size_t at = 0, n = static_cast<size_t>(ref.row); whole && at < got.size(); at += n) {
    const auto want = std::span(ref.after).subspan(at, n);
    Close row = close(want, std::span(got).subspan(at, n), INFINITY, 4e-2 * rms(want));
    row.at += at;
    if (!row) return row;
  }
  return whole;
}

Outputs run(const Case& c, Device& d) {
  Bench b(d, static_cast<uint32_t>(std::hash<std::string>()(c.name)));
  c.run(d, b);
  return b.finish();
}

void check_mutants(const Case& c, const Output& o) {
  const auto n = static_cast<int64_t>(o.after.size());
  auto refused = [&](const std::string& what, const Floats& m) {
    if (m != o.after) CHECK_MESSAGE(!compare(c, o, m).ok, c.name, ": ", o.name, ": a ", what, " output passes");
  };
  Floats m(o.after.size());
  refused("zeroed", m);
  for (size_t i = 0; i < m.size(); i++) m[i] = -o.after[i];
  refused("negated", m);
  m = o.after;
  std::fill(m.end() - std::min<int64_t>(16, n), m.end(), 0.f);
  refused("tail-less", m);
  if (o.row < n) {
    m = o.after;
    std::rotate(m.begin(), m.begin() + o.row, m.end());
    refused("shifted", m);
  }
  if (!o.before.empty()) refused("untouched", o.before);
}

}  // namespace

static void agree_with_ref(const std::vector<std::unique_ptr<Device>>& devices, bool mutants) {
  const auto ref = make_ref_device();
  OpLimits l;
  l.tokens = 192, l.width = 16384, l.experts = 512, l.chosen = 10, l.expert_width = 512, l.model_width = 2048;
  l.heads = 64, l.context = 512, l.kv_codes = 12 * 256, l.value_heads = 32, l.key_heads = 16, l.key_dim = 128, l.value_dim = 128;
  for (const auto& d : devices) d->reserve(l);

  int cases = 0;
  for (const Case& c : table()) {
    const Outputs want = run(c, *ref);
    if (mutants)
      for (const Output& o : want) check_mutants(c, o);
    for (const auto& d : devices) {
      Outputs got;
      try {
        got = run(c, *d);
      } catch (const Error& e) {
        FAIL_CHECK(d->name(), ": ", c.name, ": ", std::string(e.what()));
        continue;
      }
      REQUIRE(got.size() == want.size());
      for (size_t i = 0; i < want.size(); i++) {
        const Close r = compare(c, want[i], got[i].after);
        CHECK_MESSAGE(r.ok, d->name(), ": ", c.name, ": ", want[i].name, ": ", r.text());
      }
    }
    cases++;
  }
  MESSAGE(cases, " cases on ", devices.size(), " devices");
}

TEST_CASE("operations agree with ref on every CPU device, and mutants do not") {
  std::vector<std::unique_ptr<Device>> devices;
  for (Isa isa : {Isa::Scalar, Isa::Avx2, Isa::Avx512})
    if (isa_available(isa)) devices.push_back(make_cpu_device(2, isa));
    else MESSAGE("SKIPPED: this machine lacks an instruction set of the CPU device");
  agree_with_ref(devices, true);
}

TEST_CASE("CUDA: operations agree with ref") {
  if (list_cuda_devices().empty()) {
    MESSAGE("SKIPPED: no GPU");
    return;
  }
  std::vector<std::unique_ptr<Device>> devices;
  devices.push_back(make_cuda_device(0, false));  // a failure names its operation
  agree_with_ref(devices, false);
}

static void on_the_cpu(void (*test)(Device&)) {
  test(*make_ref_device());
  for (Isa isa : {Isa::Scalar, Isa::Avx2, Isa::Avx512})
    if (isa_available(isa)) test(*make_cpu_device(3, isa));
}
static void on_a_gpu(void (*test)(Device&)) {
  if (list_cuda_devices().empty()) {
    MESSAGE("SKIPPED: no GPU");
    return;
  }
  test(*make_cuda_device(0, false));  // a failure names its operation
}

// A NaN among the keys or values of a token reaches every head that reads them, through a cache of any format.
static void nan_stays(Device& device) {
  OpLimits l;
  l.tokens = 16, l.width = 4096, l.heads = 16, l.context = 512;
  device.reserve(l);
  constexpr int64_t kDh = 256, kWidth = 2 * (2 + 2) * kDh;  // 2 heads, 2 key heads
  for (DType kv : {DType::F32, DType::BF16, DType::I8})
    for (int64_t t : {1, 3, 12})
      for (const bool value : {false, true}) {
        Bench b(device, 5);
        AttentionArgs a;
        Floats x = b.normals(t * kWidth, 1);
        x[static_cast<size_t>((4 + (value ? 2 : 0) + 1) * kDh + 130)] = NAN;  // token 0, key head 1, second 128
        a.qgkv = b.in(x, t, kWidth), a.q_norm = a.k_norm = b.in(norm_weights(b, kDh), kDh), a.inv_freq = b.in(b.normals(16, 1), 16);
        a.heads = a.kv_heads = 2, a.step = b.step(0, static_cast<int>(t)), a.o = b.out("o", t, 2 * kDh);
        a.k_cache = b.out("k", 2, t + 1, kDh, Floats(static_cast<size_t>(2 * (t + 1) * kDh)), kv);
        a.v_cache = b.out("v", 2, t + 1, kDh, Floats(static_cast<size_t>(2 * (t + 1) * kDh)), kv);
        if (kv == DType::I8) a.k_scales = b.out("ks", 2, t + 1, 2, {}, DType::F16), a.v_scales = b.out("vs", 2, t + 1, 2, {}, DType::F16);
        device.attention(a);
        const Floats o = b.finish()[0].after;
        int lost = 0, spread = 0;
        for (int64_t i = 0; i < t * 2 * kDh; i++) {
          const int64_t dim = i % kDh;
          const bool second = i / kDh % 2;
          const bool must = second && (!value || (kv == DType::I8 ? dim >= 128 : dim == 130)), nan = !finite_bits(o[static_cast<size_t>(i)]);
          lost += must && !nan, spread += nan && !must;
        }
        CHECK_MESSAGE(lost == 0, device.name(), ": ", name(kv), ", T=", t, value ? ", value" : ", key");
        CHECK_MESSAGE(spread == 0, device.name(), ": ", name(kv), ", T=", t, value ? ", value" : ", key");
      }
}

TEST_CASE("attention: NaN stays NaN, where it was") { on_the_cpu(nan_stays); }
TEST_CASE("CUDA: attention: NaN stays NaN, where it was") { on_a_gpu(nan_stays); }

// Experts whose logit is no number come last, equal ones in order of their index; and what one row holds is nothing to the others.
static void numbers_come_first(Device& device) {
  OpLimits l;
  l.tokens = 16, l.width = 1024, l.experts = 512, l.chosen = 10, l.expert_width = 512, l.model_width = 128;
  device.reserve(l);
  constexpr int64_t kDim = 128, kShared = 64;
  constexpr int kChosen = 10, kKinds = 8;
  for (const auto& [count, width] : {std::pair<int, int64_t>{512, 128}, {508, 128}, {60, 512}, {13, 128}, {12, 512}}) {
    const auto logit = [](int kind, int e) {
      const float some = static_cast<float>((e * 37 + kind * 11) % 101) / 10;
      switch (kind) {
        case 0: return NAN;
        case 1: return e % 5 == 2 && e < 13 ? some : NAN;  // fewer than are chosen
        case 2: return e % 3 == 1 ? NAN : some;
        case 3: return 0.5f;
        case 4: return -INFINITY;
        case 5: return e == 4 ? 1.f : -INFINITY;
        case 6: return e % 2 ? -0.f : 0.f;
        default: return some;
      }
    };
    Bench b(device, 9);
    const Experts experts = b.experts(DType::INT4, count, kDim, width, 128);
    const Tensor shared_down = b.weights(DType::BF16, kDim, kShared);
    for (int64_t t : {1, 2, 8, 9})
      for (int first = 0; first < kKinds; first += t < kKinds ? static_cast<int>(t) : kKinds) {
        Floats logits;
        std::vector<int32_t> expected;
        for (int64_t row = 0; row < t; row++) {
          const int kind = (first + static_cast<int>(row)) % kKinds;
          std::vector<int32_t> order(static_cast<size_t>(count));
          for (int e = 0; e < count; e++) logits.push_back(logit(kind, e)), order[static_cast<size_t>(e)] = e;
          std::ranges::stable_sort(order, [&](int x, int y) { return std::isnan(logit(kind, y)) ? !std::isnan(logit(kind, x)) : logit(kind, x) > logit(kind, y); });
          expected.insert(expected.end(), order.begin(), order.begin() + kChosen);
        }
        Bench call(device, 10);
        MoeGateUpArgs up;
        up.x = call.in(call.normals(t * kDim, 1), t, kDim), up.logits = call.in(logits, t, count), up.act = Act::BF16, up.experts = experts;
        up.ids = call.out("ids", t, kChosen, 0, {}, DType::I32), up.weights = call.out("weights", t, kChosen), up.inner = call.out("inner", t * kChosen, width);
        device.moe_gate_up(up);
        MoeDownArgs down;
        down.ids = up.ids, down.weights = up.weights, down.inner = up.inner, down.logits = up.logits, down.act = down.shared_act = Act::BF16, down.experts = experts;
        down.shared = call.in(call.normals(t * kShared, 1), t, kShared), down.shared_scale = call.in(Floats(static_cast<size_t>(t), 0.5f), t);
        down.shared_down = shared_down, down.h = call.out("h", t, kDim, 0, call.normals(t * kDim, 1));
        device.moe_down(down);
        std::vector<int32_t> ids(static_cast<size_t>(t * kChosen));
        device.download(ids.data(), up.ids.data, ids.size() * 4);
        const Floats h = call.finish().back().after;
        for (int64_t row = 0; row < t; row++) {
          const int kind = (first + static_cast<int>(row)) % kKinds;
          CHECK_MESSAGE(std::equal(ids.begin() + row * kChosen, ids.begin() + (row + 1) * kChosen, expected.begin() + row * kChosen), device.name(), ": E=", count,
                        ", T=", t, ", row ", row, " of kind ", kind);
          bool finite = true;
          for (int64_t i = row * kDim; i < (row + 1) * kDim; i++) finite = finite && finite_bits(h[static_cast<size_t>(i)]);
          if ((kind == 2 && count > 20) || kind == 3 || kind > 4) CHECK_MESSAGE(finite, device.name(), ": E=", count, ", T=", t, ", row ", row, " of kind ", kind);
        }
      }
  }
}

TEST_CASE("experts: numbers come first, and NaN stays in its row") { on_the_cpu(numbers_come_first); }
TEST_CASE("CUDA: experts: numbers come first, and NaN stays in its row") { on_a_gpu(numbers_come_first); }

// A call that logs its tokens, taken back to any of them, goes on as if they had come one by one and those behind had never been there: bit for bit.
static void logs_lead_back(Device& device) {
  OpLimits l;
  l.tokens = 8, l.width = 4096, l.value_heads = 4, l.key_heads = 2, l.key_dim = 128, l.value_dim = 128;
  device.reserve(l);
  for (const auto& [dk, dv] : {std::pair<int64_t, int64_t>{128, 128}, {32, 64}}) {
    constexpr int kGk = 2, kGv = 4, kStart = 27;  // so that rings and log begin again inside of the calls
    const int64_t ch = 2 * kGk * dk + kGv * dv;
    const auto step_by = [&](int first, int again, int more) {  // `first` tokens (0: one by one), of which `again` are kept, then `more` others; the state behind
      Bench b(device, 77);
      const Floats qkv = b.normals(11 * ch, 1), ba = b.normals(11 * 2 * kGv, 2);
      DeltaNetArgs a;
      a.conv = b.weights(DType::F32, ch, 4, 0, 0.5f), a.neg_a = b.in(Floats(kGv, -0.3f), kGv), a.dt_bias = b.in(Floats(kGv, 0.1f), kGv);
      a.conv_ring = b.out("ring", 16, ch, 0, b.normals(16 * ch, 1)), a.state = b.out("state", kGv, dk, dv, b.normals(kGv * dk * dv, 0.1f));
      const int64_t width = delta_log_width(kGk, kGv, dk, dv);
      a.log = b.in(Floats(static_cast<size_t>(kDeltaLogRows * width), 1.f), kDeltaLogRows, width);
      a.key_heads = kGk, a.value_heads = kGv;
      const auto call = [&](int row, int tokens, int pos, int from, const char* name) {
        a.qkv = b.in(Floats(qkv.begin() + row * ch, qkv.begin() + (row + tokens) * ch), tokens, ch);
        a.ba = b.in(Floats(ba.begin() + row * 2 * kGv, ba.begin() + (row + tokens) * 2 * kGv), tokens, 2 * kGv);
        a.o = b.out(name, tokens, kGv * dv), a.step = b.step(pos, tokens, from);
        device.delta_net(a);
      };
      if (first) call(0, first, kStart, 0, "o1");
      for (int i = 0; !first && i < again; i++) call(i, 1, kStart + i, 0, "o1");
      call(8, more, kStart + again, first > 1 ? again : 0, "o2");
      if (more > 1) device.delta_replay({a.log, a.state, kGk, kStart + again + more, more});
      Outputs all = b.finish();
      return std::pair(all.back().after, all[1].after);  // o of the others, S
    };
    for (int more : {1, 3})
      for (int kept = 1; kept <= 8; kept++) {
        const auto want = step_by(0, kept, more);
        for (int first : {1, 2, 5, 8})
          if (first >= kept) CHECK_MESSAGE(step_by(first, kept, more) == want, device.name(), ": ", kept, " of ", first, ", then ", more, ", DK ", dk);
      }
  }
}

TEST_CASE("delta rule: back to any token of a call, bit for bit") { on_the_cpu(logs_lead_back); }
TEST_CASE("CUDA: delta rule: back to any token of a call, bit for bit") { on_a_gpu(logs_lead_back); }

TEST_CASE("contracts refuse what does not fit") {
  const auto d = make_ref_device();
  Bench b(*d, 1);
  NormMatmulArgs a;
  a.h = b.in(b.normals(64, 1), 1, 64);
  a.w = b.weights(DType::BF16, 8, 32);
  a.y = b.out("y", 1, 8);
  CHECK_THROWS_AS(d->norm_matmul(a), Bug);  // K differs
  a.w = b.weights(DType::BF16, 9, 64);
  CHECK_THROWS_AS(d->norm_matmul(a), Bug);  // N differs
  a.w = b.weights(DType::BF16, 8, 64);
  CHECK_NOTHROW(d->norm_matmul(a));
  a.w.dtype = DType::INT4, a.w.group = 48;
  CHECK_THROWS_AS(d->norm_matmul(a), Bug);
  a.w = b.weights(DType::INT4, 8, 128, 64).columns(0, 64);
  CHECK_THROWS_AS(d->norm_matmul(a), Bug);  // panels cannot be cut along K
}

TEST_CASE("contracts: a log has room for what is asked") {
  const auto d = make_ref_device();
  Bench b(*d, 1);
  const auto call = [&](int64_t t, int64_t slots, int64_t log_rows) {
    DeltaNetArgs a;
    a.qkv = b.in(b.normals(t * 96, 1), t, 96), a.ba = b.in(b.normals(t * 2, 1), t, 2), a.conv = b.weights(DType::F32, 96, 4);
    a.neg_a = a.dt_bias = b.in(b.normals(1, 1), 1), a.conv_ring = b.out("ring", slots, 96, 0, b.normals(slots * 96, 1));
    a.state = b.out("state", 1, 32, 32, b.normals(1024, 1)), a.log = b.in(b.normals(log_rows * 68, 1), log_rows, 68);
    a.o = b.out("o", t, 32), a.key_heads = a.value_heads = 1, a.step = b.step(20, static_cast<int>(t));
    d->delta_net(a);
  };
  CHECK_NOTHROW(call(8, 16, kDeltaLogRows));
  CHECK_THROWS_AS(call(9, 16, kDeltaLogRows), Bug);
  CHECK_THROWS_AS(call(6, 8, kDeltaLogRows), Bug);  // inputs that are read would be overwritten
  CHECK_THROWS_AS(call(8, 16, 8), Bug);
  const Tensor log = b.in(b.normals(kDeltaLogRows * 68, 1), kDeltaLogRows, 68), state = b.out("state", 1, 32, 32, b.normals(1024, 1));
  CHECK_NOTHROW(d->delta_replay({log, state, 1, 8, 8}));
  CHECK_THROWS_AS(d->delta_replay({log, state, 1, 20, 9}), Bug);
  CHECK_THROWS_AS(d->delta_replay({log, state, 1, 3, 4}), Bug);
  CHECK_THROWS_AS(d->delta_replay({log, view(state.data, DType::F32, 1, 32, 16), 1, 8, 8}), Bug);
}

TEST_CASE("contracts: an INT8 cache has scales, others have none") {
  const auto d = make_ref_device();
  Bench b(*d, 1);
  AttentionArgs a;
  a.qgkv = b.in(b.normals(512, 1), 1, 512), a.q_norm = a.k_norm = b.in(b.normals(128, 1), 128), a.inv_freq = b.in(b.normals(8, 1), 8);
  a.heads = a.kv_heads = 1, a.step = b.step(0, 1), a.o = b.out("o", 1, 128);
  a.k_cache = b.out("k", 1, 4, 128, {}, DType::I8), a.v_cache = b.out("v", 1, 4, 128, {}, DType::I8);
  CHECK_THROWS_AS(d->attention(a), Bug);
  a.k_scales = b.out("ks", 1, 4, 1, {}, DType::F16), a.v_scales = b.out("vs", 1, 4, 2, {}, DType::F16);
  CHECK_THROWS_AS(d->attention(a), Bug);  // one scale for 128 values
  a.v_scales = b.out("vs", 1, 4, 1, {}, DType::F16);
  CHECK_NOTHROW(d->attention(a));
  a.k_cache = b.out("k", 1, 4, 128, {}, DType::BF16), a.v_cache = b.out("v", 1, 4, 128, {}, DType::BF16);
  CHECK_THROWS_AS(d->attention(a), Bug);
}

TEST_CASE("contracts refuse outputs that share memory with what is read") {
  const auto d = make_ref_device();
  Bench b(*d, 1);
  ConcatMatmulArgs c;
  c.a = b.in(b.normals(128, 1), 2, 64), c.b = b.in(b.normals(128, 1), 2, 64);
  c.norm_a = c.norm_b = b.in(b.normals(64, 1), 64), c.w = b.weights(DType::BF16, 64, 128), c.y = b.out("y", 2, 64);
  CHECK_NOTHROW(d->concat_matmul(c));
  const Tensor y = c.y;
  for (const Tensor& shared : {c.a, c.b}) {
    c.y = shared;
    CHECK_THROWS_AS(d->concat_matmul(c), Bug);
  }
  c.y = y, c.a = y.slice(0, 2);
  CHECK_THROWS_AS(d->concat_matmul(c), Bug);

  // Columns of one buffer: h reads the first 64 of 160, y writes elsewhere in the same rows
  NormMatmulArgs a;
  const Tensor wide = b.out("wide", 3, 160);
  a.h = wide.columns(0, 64), a.w = b.weights(DType::BF16, 32, 64);
  for (int64_t at : {64, 96, 128}) {
    a.y = wide.columns(at, 32);
    CHECK_NOTHROW(d->norm_matmul(a));
  }
  for (int64_t at : {0, 32, 63, 129}) {  // the last runs into the next row
    a.y = wide.columns(at, 32);
    CHECK_THROWS_AS(d->norm_matmul(a), Bug);
  }
  a.h = wide.columns(96, 64), a.y = wide.columns(0, 32);
  CHECK_NOTHROW(d->norm_matmul(a));
  a.y = wide.columns(65, 32);
  CHECK_THROWS_AS(d->norm_matmul(a), Bug);
  a.y = wide.columns(64, 32), a.normed = b.out("normed", 3, 64);
  CHECK_NOTHROW(d->norm_matmul(a));
  a.y = view(a.normed.data, DType::F32, 3, 32);
  CHECK_THROWS_AS(d->norm_matmul(a), Bug);
}
