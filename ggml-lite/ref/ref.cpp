// Scalar fp32, one thread, in the order of the formulas of the model specification. Never optimised: where this file and a fast
// kernel disagree beyond rounding, the kernel is wrong.
#include "ggml-lite/ref/ref.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/core/codec.h"

namespace qn {
namespace {

float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }
float silu(float x) { return x * sigmoid(x); }
float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

using Vec = std::vector<float>;

float dot(const float* a, const float* b, int64_t n) {
  float s = 0;
  for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
  return s;
}

// x / sqrt(mean(x^2) + eps) * w; w may be null
void rms_norm(const float* x, const float* w, float eps, int64_t n, float* y) {
  const float r = 1.f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * r * (w ? w[i] : 1.f);
}

Vec normed(const Tensor& h, int64_t t, const Tensor& norm, float eps) {
  Vec x(h.f32(t), h.f32(t) + h.cols());
  if (norm) rms_norm(h.f32(t), norm.f32(), eps, h.cols(), x.data());
  return x;
}

// y = W round(x)
Vec matmul(const Tensor& w, Vec x, Act act) {
  round_act(act, x);
  Vec y(w.rows()), row(w.cols());
  for (int64_t n = 0; n < w.rows(); n++) {
    decode_row(w, n, row);
    y[n] = dot(row.data(), x.data(), w.cols());
  }
  return y;
}

// Stored gate_up rows (2F, D) times x -> silu(gate) * up (F); T16 formats interleave gate and up by 8 rows
Vec swiglu(const Tensor& w, const Vec& x, Act act) {
  const int64_t f = w.rows() / 2;
  const Vec y = matmul(w, x, act);
  Vec out(f);
  for (int64_t i = 0; i < f; i++)
    out[i] = is_t16(w.dtype) ? silu(y[interleave_row(i, f)]) * y[interleave_row(f + i, f)] : silu(y[i]) * y[f + i];
  return out;
}

float value_at(const Tensor& t, int64_t row, int64_t col) {
  return t.dtype == DType::F32 ? t.f32(row)[col] : bf16_to_float(t.bf16(row)[col]);
}

class RefDevice final : public Device {
 public:
  std::string name() const override { return "ref"; }
  const void* place(const void* host, size_t) override { return host; }
  void upload(void* to, const void* from, size_t n) override { std::memcpy(to, from, n); }
  void download(void* to, const void* from, size_t n) override { std::memcpy(to, from, n); }
  void copy(void* to, const void* from, size_t n) override { std::memmove(to, from, n); }
  void zero(void* to, size_t n) override { std::memset(to, 0, n); }
  uint64_t scratch_bytes(const OpLimits&) const override { return 0; }
  void reserve(const OpLimits&) override {}

 private:
  void* do_alloc(size_t bytes, const char*) override {
    arenas_.emplace_back(bytes);
    return arenas_.back().data();
  }
  void do_free(void* p, size_t) override {
    std::erase_if(arenas_, [p](const Arena& a) { return a.data() == p; });
  }

  void do_embed(const EmbedArgs& a) override {
    for (int64_t t = 0; t < a.h.rows(); t++) {
      const int32_t id = a.ids.i32()[t];
      QN_CHECK(id >= 0 && id < a.table.rows(), "embed: id %d of %lld", id, static_cast<long long>(a.table.rows()));
      for (int64_t d = 0; d < a.h.cols(); d++) a.h.f32(t)[d] = value_at(a.table, id, d);
    }
  }

  void do_norm_matmul(const NormMatmulArgs& a) override {
    for (int64_t t = 0; t < a.h.rows(); t++) {
      const Vec x = normed(a.h, t, a.norm, a.eps);
      if (a.w) std::ranges::copy(matmul(a.w, x, a.act), a.y.f32(t));
      if (a.w_exact) std::ranges::copy(matmul(a.w_exact, x, Act::F32), a.y_exact.f32(t));
      if (a.normed) std::ranges::copy(x, a.normed.f32(t));
    }
  }

  void do_delta_net(const DeltaNetArgs& a) override {
    const int64_t dk = a.state.shape[1], dv = a.state.shape[2], gk = a.key_heads, gv = a.value_heads, ch = a.qkv.cols();
    const int64_t slots = a.conv_ring.rows();
    Vec y(ch);
    if (a.log) replay(a.log, a.state, gk, a.step->pos, a.step->from);
    const bool logs = a.log && a.qkv.rows() > 1;
    const Vec before(a.state.f32(), a.state.f32() + (logs ? gv * dk * dv : 0));
    for (int64_t t = 0; t < a.qkv.rows(); t++) {
      const int64_t pos = a.step->pos + t;
      std::copy_n(a.qkv.f32(t), ch, a.conv_ring.f32(pos & (slots - 1)));
      for (int64_t c = 0; c < ch; c++) {  // tap j meets position pos - 3 + j; before the sequence the input is 0
        float s = 0;
        for (int64_t j = 0; j < 4; j++)
          if (pos - 3 + j >= 0) s += value_at(a.conv, c, j) * a.conv_ring.f32((pos - 3 + j) & (slots - 1))[c];
        y[c] = silu(s);
      }
      for (int64_t g = 0; g < 2 * gk; g++) {  // q heads, then k heads
        float* v = &y[g * dk];
        float scale = 1.f / std::sqrt(dot(v, v, dk) + 1e-6f);
        if (g < gk) scale *= 1.f / std::sqrt(static_cast<float>(dk));
        for (int64_t i = 0; i < dk; i++) v[i] *= scale;
      }
      if (logs) std::copy_n(&y[gk * dk], gk * dk, a.log.f32(pos % kDeltaLogRows));
      for (int64_t h = 0; h < gv; h++) {
        const float* q = &y[h / (gv / gk) * dk];
        const float* k = q + gk * dk;
        const float* v = &y[2 * gk * dk + h * dv];
        const float beta = sigmoid(a.ba.f32(t)[h]);
        const float alpha = std::exp(a.neg_a.f32()[h] * softplus(a.ba.f32(t)[gv + h] + a.dt_bias.f32()[h]));
        if (logs) a.log.f32(pos % kDeltaLogRows)[delta_log_u(gk, dk, dv, h) + dv] = alpha;
        float* s = a.state.f32(h);  // (DK, DV)
        for (int64_t i = 0; i < dk * dv; i++) s[i] *= alpha;
        for (int64_t j = 0; j < dv; j++) {
          float m = 0, o = 0;
          for (int64_t i = 0; i < dk; i++) m += s[i * dv + j] * k[i];
          const float u = beta * (v[j] - m);
          if (logs) a.log.f32(pos % kDeltaLogRows)[delta_log_u(gk, dk, dv, h) + j] = u;
          for (int64_t i = 0; i < dk; i++) s[i * dv + j] += k[i] * u;
          for (int64_t i = 0; i < dk; i++) o += s[i * dv + j] * q[i];
          a.o.f32(t)[h * dv + j] = o;
        }
      }
    }
    std::ranges::copy(before, a.state.f32());
  }

  static void replay(const Tensor& log, const Tensor& state, int64_t gk, int pos, int count) {
    const int64_t gv = state.rows(), dk = state.shape[1], dv = state.shape[2];
    for (int p = pos - count; p < pos; p++)
      for (int64_t h = 0; h < gv; h++) {
        const float *row = log.f32(p % kDeltaLogRows), *k = row + h / (gv / gk) * dk, *u = row + delta_log_u(gk, dk, dv, h);
        for (int64_t i = 0; i < dk; i++)
          for (int64_t j = 0; j < dv; j++) {
            float& s = state.f32(h)[i * dv + j];
            s *= u[dv];
            s += k[i] * u[j];
          }
      }
  }
  void do_delta_replay(const DeltaReplayArgs& a) override { replay(a.log, a.state, a.key_heads, a.pos, a.count); }

  void add(const Tensor& h, int64_t t, const Vec& y) {
    for (size_t i = 0; i < y.size(); i++) h.f32(t)[i] += y[i];
  }

  void do_gated_norm_matmul(const GatedNormMatmulArgs& a) override {
    const int64_t n = a.o.cols(), dv = a.norm.rows();
    Vec x(n);
    for (int64_t t = 0; t < a.o.rows(); t++) {
      for (int64_t c = 0; c < n; c += dv) rms_norm(a.o.f32(t) + c, a.norm.f32(), a.eps, dv, &x[c]);
      for (int64_t i = 0; i < n; i++) x[i] *= silu(a.z.f32(t)[i]);
      add(a.h, t, matmul(a.w, x, a.act));
    }
  }

  void rope(float* x, int64_t pos, const Tensor& inv_freq, float scale) {
    const int64_t half = inv_freq.rows();
    for (int64_t i = 0; i < half; i++) {
      const double phi = static_cast<double>(pos) * inv_freq.f32()[i];
      const float c = static_cast<float>(std::cos(phi)) * scale, s = static_cast<float>(std::sin(phi)) * scale;
      const float lo = x[i], hi = x[i + half];
      x[i] = lo * c - hi * s;
      x[i + half] = hi * c + lo * s;
    }
  }

  static float* cache_at(const Tensor& cache, int64_t head, int64_t pos) { return cache.f32(head) + pos * cache.shape[2]; }
  static uint16_t* cache_16(const Tensor& cache, int64_t head, int64_t pos) { return cache.bf16(head) + pos * cache.shape[2]; }
  static int8_t* codes_at(const Tensor& cache, int64_t head, int64_t pos) { return cache.i8(head) + pos * cache.shape[2]; }
  static void store(const Tensor& cache, const Tensor& scales, int64_t head, int64_t pos, const float* x) {
    const int64_t n = cache.shape[2];
    if (cache.dtype == DType::I8) return quantize_kv({x, static_cast<size_t>(n)}, codes_at(cache, head, pos), cache_16(scales, head, pos));
    for (int64_t i = 0; i < n; i++)
      if (cache.dtype == DType::F32) cache_at(cache, head, pos)[i] = x[i];
      else cache_16(cache, head, pos)[i] = float_to_bf16(x[i]);
  }
  static float fetch(const Tensor& cache, const Tensor& scales, int64_t head, int64_t pos, int64_t i) {
    if (cache.dtype == DType::I8) return codes_at(cache, head, pos)[i] * half_to_float(cache_16(scales, head, pos)[i / kKvGroup]);
    return cache.dtype == DType::F32 ? cache_at(cache, head, pos)[i] : bf16_to_float(cache_16(cache, head, pos)[i]);
  }

  void do_attention(const AttentionArgs& a) override {
    const int64_t dh = a.q_norm.rows(), heads = a.heads, kv = a.kv_heads;
    const float scale = 1.f / std::sqrt(static_cast<float>(dh));
    Vec x(dh), p;
    for (int64_t t = 0; t < a.qgkv.rows(); t++) {
      const int64_t pos = a.step->pos + t;
      QN_CHECK(pos < a.k_cache.shape[1], "attention: position %lld, cache %lld", static_cast<long long>(pos), static_cast<long long>(a.k_cache.shape[1]));
      const float* k = a.qgkv.f32(t) + 2 * heads * dh;
      for (int64_t g = 0; g < kv; g++) {
        rms_norm(k + g * dh, a.k_norm.f32(), a.eps, dh, x.data());
        rope(x.data(), pos, a.inv_freq, a.rope_scale);
        store(a.k_cache, a.k_scales, g, pos, x.data());
        store(a.v_cache, a.v_scales, g, pos, k + (kv + g) * dh);
      }
      for (int64_t h = 0; h < heads; h++) {
        const int64_t g = h / (heads / kv);
        rms_norm(a.qgkv.f32(t) + h * dh, a.q_norm.f32(), a.eps, dh, x.data());
        rope(x.data(), pos, a.inv_freq, a.rope_scale);
        p.assign(pos + 1, 0);
        float top = -INFINITY, sum = 0;
        for (int64_t j = 0; j <= pos; j++) {
          for (int64_t i = 0; i < dh; i++) p[j] += x[i] * fetch(a.k_cache, a.k_scales, g, j, i);
          p[j] *= scale;
          top = std::max(top, p[j]);
        }
        for (float& v : p) sum += v = std::exp(v - top);
        float* o = a.o.f32(t) + h * dh;
        std::fill_n(o, dh, 0.f);
        for (int64_t j = 0; j <= pos; j++)
          for (int64_t i = 0; i < dh; i++) o[i] += p[j] / sum * fetch(a.v_cache, a.v_scales, g, j, i);
      }
    }
  }

  void do_gate_matmul(const GateMatmulArgs& a) override {
    Vec x(a.o.cols());
    for (int64_t t = 0; t < a.o.rows(); t++) {
      for (size_t i = 0; i < x.size(); i++) x[i] = a.o.f32(t)[i] * sigmoid(a.gate.f32(t)[i]);
      add(a.h, t, matmul(a.w, x, a.act));
    }
  }

  void do_moe_router(const MoeRouterArgs& a) override {
    for (int64_t t = 0; t < a.h.rows(); t++) {
      const Vec x = normed(a.h, t, a.norm, a.eps);
      std::ranges::copy(x, a.x.f32(t));
      std::ranges::copy(matmul(a.router, x, Act::F32), a.logits.f32(t));
      std::ranges::copy(swiglu(a.shared_gate_up, x, a.shared_act), a.shared.f32(t));
      a.shared_scale.f32()[t] = sigmoid(matmul(a.shared_gate, x, Act::F32)[0]);
    }
  }

  void do_moe_gate_up(const MoeGateUpArgs& a) override {
    const int64_t chosen = a.ids.cols(), e = a.experts.count;
    std::vector<int32_t> order(e);
    for (int64_t t = 0; t < a.x.rows(); t++) {
      const float* l = a.logits.f32(t);
      const float top = *std::max_element(l, l + e);
      Vec p(e);
      float all = 0, sum = 0;
      for (int64_t i = 0; i < e; i++) all += p[i] = std::exp(l[i] - top);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [l](int32_t i, int32_t j) { return l[i] > l[j] || (std::isnan(l[j]) && !std::isnan(l[i])); });
      for (int64_t j = 0; j < chosen; j++) sum += p[order[j]];
      const Vec x(a.x.f32(t), a.x.f32(t) + a.x.cols());
      for (int64_t j = 0; j < chosen; j++) {
        a.ids.i32(t)[j] = order[j];
        a.weights.f32(t)[j] = p[order[j]] / (a.renormalise ? sum : all);
        std::ranges::copy(swiglu(a.experts.gate_up(order[j]), x, a.act), a.inner.f32(t * chosen + j));
      }
    }
  }

  void do_moe_down(const MoeDownArgs& a) override {
    const int64_t chosen = a.ids.cols();
    for (int64_t t = 0; t < a.h.rows(); t++) {
      Vec sum(a.h.cols());
      for (int64_t j = 0; j < chosen; j++) {
        const float* inner = a.inner.f32(t * chosen + j);
        const Vec y = matmul(a.experts.down(a.ids.i32(t)[j]), Vec(inner, inner + a.inner.cols()), a.act);
        for (size_t i = 0; i < y.size(); i++) sum[i] += a.weights.f32(t)[j] * y[i];
      }
      const Vec y = matmul(a.shared_down, Vec(a.shared.f32(t), a.shared.f32(t) + a.shared.cols()), a.shared_act);
      for (size_t i = 0; i < y.size(); i++) sum[i] += a.shared_scale.f32()[t] * y[i];
      add(a.h, t, sum);
    }
  }

  void do_expert_pairs(const ExpertPairsArgs& a) override {
    for (int64_t t = 0; t < a.x.rows(); t++) {
      std::ranges::fill(std::span(a.y.f32(t), static_cast<size_t>(a.y.cols())), 0.f);
      const Vec x(a.x.f32(t), a.x.f32(t) + a.x.cols());
      for (int32_t e = 0; e < a.experts.count; e++)
        for (int64_t i = 0; i < a.token.rows(); i++) {
          if (a.token.i32()[i] != t || a.expert.i32()[i] != e) continue;
          Vec y = matmul(a.experts.down(e), swiglu(a.experts.gate_up(e), x, a.act), a.act);
          for (float& v : y) v *= a.weight.f32()[i];
          add(a.y, t, y);
        }
    }
  }

  void do_concat_matmul(const ConcatMatmulArgs& a) override {
    for (int64_t t = 0; t < a.a.rows(); t++) {
      Vec x = normed(a.a, t, a.norm_a, a.eps);
      const Vec b = normed(a.b, t, a.norm_b, a.eps);
      x.insert(x.end(), b.begin(), b.end());
      std::ranges::copy(matmul(a.w, x, a.act), a.y.f32(t));
    }
  }

  std::vector<Arena> arenas_;
};

}  // namespace

std::unique_ptr<Device> make_ref_device() { return std::make_unique<RefDevice>(); }

}  // namespace qn
