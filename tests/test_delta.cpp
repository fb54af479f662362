// The gated delta rule on inputs that are hard for its chunked form: heads that forget at once, heads that forget nothing, keys that are
// nearly parallel; against the recurrence in fp64, over 1,024 and over 65,536 tokens.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "cuda/cuda.h"
#include "ggml-lite/core/device.h"
#include "ggml-lite/cpu/cpu.h"
#include "ggml-lite/ref/ref.h"

namespace {

using namespace qn;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr int kKeys = 1, kHeads = 2, kW = 128, kChannels = 2 * kKeys * kW + kHeads * kW;
constexpr int64_t kShort = 1024, kLong = 65536, kCall = 4096;

struct Hard {
  const char* name;
  float neg_a[kHeads], dt_bias;
  float together;  // how much of a key all keys share
};
const Hard kHard[] = {
    {"strong decay", {-20.f, -3.f}, 1.f, 0.f}, {"long memory", {-1e-5f, -1e-3f}, -3.f, 0.f}, {"near-parallel keys", {-1e-3f, -1e-2f}, -3.f, 0.995f}};

struct Sequence {
  int64_t tokens;
  Floats qkv, ba, conv, neg_a, dt_bias;
  Sequence(const Hard& h, int64_t n) : tokens(n), qkv(n * kChannels), ba(n * 2 * kHeads), conv(kChannels * 4), neg_a(h.neg_a, h.neg_a + kHeads), dt_bias(kHeads, h.dt_bias) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    Floats shared(kW);
    for (float& x : shared) x = 3 * normal(random);
    for (int64_t t = 0; t < n; t++)
      for (int c = 0; c < kChannels; c++) {
        const bool key = c >= kKeys * kW && c < 2 * kKeys * kW;
        const float x = normal(random), m = key ? h.together : 0.f;
        qkv[t * kChannels + c] = m * shared[c % kW] + std::sqrt(1 - m * m) * x;
      }
    for (float& x : ba) x = 2 * normal(random);
    for (int c = 0; c < kChannels; c++) conv[4 * c + 3] = 1.f, conv[4 * c + 2] = 0.1f * normal(random);
  }
};

struct Result {
  Doubles o, state;  // (tokens, kHeads, kW), (kHeads, kW, kW)
};

// Inputs of the rule for one head, after convolution, norms and gates
struct Prepared {
  Doubles q, k, v, log_alpha, beta;
  Prepared(const Sequence& s, int head) : q(s.tokens * kW), k(s.tokens * kW), v(s.tokens * kW), log_alpha(s.tokens), beta(s.tokens) {
    const auto channel = [&](int64_t t, int c) {
      double x = 0;
      for (int j = 0; j < 4; j++)
        if (t - 3 + j >= 0) x += static_cast<double>(s.conv[4 * c + j]) * s.qkv[(t - 3 + j) * kChannels + c];
      return x / (1 + std::exp(-x));
    };
    for (int64_t t = 0; t < s.tokens; t++) {
      double qq = 0, kk = 0;
      for (int i = 0; i < kW; i++) {
        q[t * kW + i] = channel(t, i), k[t * kW + i] = channel(t, kW + i), v[t * kW + i] = channel(t, (2 + head) * kW + i);
        qq += q[t * kW + i] * q[t * kW + i], kk += k[t * kW + i] * k[t * kW + i];
      }
      for (int i = 0; i < kW; i++) q[t * kW + i] /= std::sqrt((qq + 1e-6) * kW), k[t * kW + i] /= std::sqrt(kk + 1e-6);
      const double x = static_cast<double>(s.ba[t * 2 * kHeads + kHeads + head]) + s.dt_bias[head];
      log_alpha[t] = s.neg_a[head] * std::log1p(std::exp(x));
      beta[t] = 1 / (1 + std::exp(-static_cast<double>(s.ba[t * 2 * kHeads + head])));
    }
  }
};

template <class T>
void recurrence(const Prepared& p, int64_t tokens, std::vector<T>& state, std::vector<T>& o) {
  std::vector<T> sk(kW), sq(kW);
  o.assign(tokens * kW, 0);
  for (int64_t t = 0; t < tokens; t++) {
    const T alpha = static_cast<T>(std::exp(p.log_alpha[t])), beta = static_cast<T>(p.beta[t]);
    std::fill(sk.begin(), sk.end(), T(0)), std::fill(sq.begin(), sq.end(), T(0));
    T kq = 0;
    for (int i = 0; i < kW; i++) {
      const T k = static_cast<T>(p.k[t * kW + i]), q = static_cast<T>(p.q[t * kW + i]);
      kq += k * q;
      for (int c = 0; c < kW; c++) sk[c] += state[i * kW + c] * k, sq[c] += state[i * kW + c] * q;
    }
    for (int c = 0; c < kW; c++) {
      const T u = beta * (static_cast<T>(p.v[t * kW + c]) - alpha * sk[c]);
      o[t * kW + c] = alpha * sq[c] + kq * u;
      sk[c] = u;
    }
    for (int i = 0; i < kW; i++)
      for (int c = 0; c < kW; c++) state[i * kW + c] = alpha * state[i * kW + c] + static_cast<T>(p.k[t * kW + i]) * sk[c];
  }
}

// The form of cuda/gdn_chunk.cu with fp32 products; the logarithms of the gates are summed in fp64, as the recurrence gets its gates from fp64
void chunks_in_fp32(const Prepared& p, int64_t tokens, Floats& state, Floats& o) {
  constexpr int kC = 64;
  o.assign(tokens * kW, 0);
  for (int64_t begin = 0; begin < tokens; begin += kC) {
    const double* const k = &p.k[begin * kW];
    double g[kC], sum = 0;
    float t[kC][kC] = {};
    for (int i = 0; i < kC; i++) g[i] = sum += std::max(p.log_alpha[begin + i], -100.);
    const auto decay = [](double log) { return static_cast<float>(std::exp(log)); };
    const auto dot = [&](const double* a, const double* b) {
      float d = 0;
      for (int c = 0; c < kW; c++) d += static_cast<float>(a[c]) * static_cast<float>(b[c]);
      return d;
    };
    for (int i = 0; i < kC; i++) {
      t[i][i] = 1;
      for (int l = 0; l < i; l++) {
        const float a = static_cast<float>(p.beta[begin + i]) * dot(k + i * kW, k + l * kW) * decay(g[i] - g[l]);
        for (int j = 0; j <= l; j++) t[i][j] -= a * t[l][j];
      }
    }
    Floats u(kC * kW), w(kC * kW);
    for (int i = 0; i < kC; i++)
      for (int j = 0; j <= i; j++) {
        const float x = t[i][j] * static_cast<float>(p.beta[begin + j]), y = x * decay(g[j]);
        for (int c = 0; c < kW; c++) u[i * kW + c] += x * static_cast<float>(p.v[(begin + j) * kW + c]), w[i * kW + c] += y * static_cast<float>(k[j * kW + c]);
      }
    for (int i = 0; i < kC; i++)
      for (int r = 0; r < kW; r++)
        for (int c = 0; c < kW; c++) u[i * kW + c] -= w[i * kW + r] * state[r * kW + c];
    for (int i = 0; i < kC; i++) {
      const double* const q = &p.q[(begin + i) * kW];
      float* const y = &o[(begin + i) * kW];
      for (int r = 0; r < kW; r++)
        for (int c = 0; c < kW; c++) y[c] += decay(g[i]) * static_cast<float>(q[r]) * state[r * kW + c];
      for (int j = 0; j <= i; j++) {
        const float x = dot(q, k + j * kW) * decay(g[i] - g[j]);
        for (int c = 0; c < kW; c++) y[c] += x * u[j * kW + c];
      }
    }
    for (float& x : state) x *= decay(g[kC - 1]);
    for (int j = 0; j < kC; j++)
      for (int r = 0; r < kW; r++)
        for (int c = 0; c < kW; c++) state[r * kW + c] += static_cast<float>(k[j * kW + r]) * decay(g[kC - 1] - g[j]) * u[j * kW + c];
  }
}

template <class A, class B>
double relative(const A& want, const B& got, size_t from = 0, size_t to = ~size_t{0}) {
  double error = 0, norm = 0;
  for (size_t i = from; i < std::min(to, want.size()); i++) {
    const double e = static_cast<double>(got[i]) - static_cast<double>(want[i]);
    error += e * e, norm += static_cast<double>(want[i]) * static_cast<double>(want[i]);
  }
  return std::sqrt(error / norm);
}

Result exact(const Sequence& s) {
  Result r;
  r.o.resize(s.tokens * kHeads * kW);
  for (int h = 0; h < kHeads; h++) {
    Doubles state(kW * kW), o;
    recurrence<double>(Prepared(s, h), s.tokens, state, o);
    for (int64_t t = 0; t < s.tokens; t++) std::copy_n(&o[t * kW], kW, &r.o[(t * kHeads + h) * kW]);
    r.state.insert(r.state.end(), state.begin(), state.end());
  }
  return r;
}

Result on_device(Device& d, const Sequence& s, int64_t call, Act act) {
  OpLimits l;
  l.tokens = static_cast<int>(kCall), l.width = kChannels, l.value_heads = kHeads, l.key_heads = kKeys, l.key_dim = kW, l.value_dim = kW;
  d.reserve(l);
  const auto put = [&](const void* p, size_t bytes) {
    Buffer b = d.alloc(bytes, "test");
    d.upload(b.data(), p, bytes);
    return b;
  };
  const Buffer conv = put(s.conv.data(), s.conv.size() * 4), neg_a = put(s.neg_a.data(), s.neg_a.size() * 4), dt = put(s.dt_bias.data(), s.dt_bias.size() * 4);
  const Floats zeros(kHeads * kW * kW + 4 * kChannels);
  const Buffer state = put(zeros.data(), kHeads * kW * kW * 4), ring = put(zeros.data(), 4 * kChannels * 4);
  Buffer qkv = d.alloc(call * kChannels * 4, "test"), ba = d.alloc(call * 2 * kHeads * 4, "test"), o = d.alloc(call * kHeads * kW * 4, "test");
  Buffer step = d.alloc(sizeof(StepParams), "test");
  Floats got(s.tokens * kHeads * kW), end(kHeads * kW * kW);
  for (int64_t at = 0; at < s.tokens; at += call) {
    const int64_t n = std::min(call, s.tokens - at);
    const StepParams p{static_cast<int>(at), static_cast<int>(n)};
    d.upload(qkv.data(), &s.qkv[at * kChannels], n * kChannels * 4), d.upload(ba.data(), &s.ba[at * 2 * kHeads], n * 2 * kHeads * 4);
    d.upload(step.data(), &p, sizeof p);
    DeltaNetArgs a;
    a.qkv = view(qkv.data(), DType::F32, n, kChannels), a.ba = view(ba.data(), DType::F32, n, 2 * kHeads), a.conv = view(conv.data(), DType::F32, kChannels, 4);
    a.neg_a = view(neg_a.data(), DType::F32, kHeads), a.dt_bias = view(dt.data(), DType::F32, kHeads);
    a.conv_ring = view(ring.data(), DType::F32, 4, kChannels), a.state = view(state.data(), DType::F32, kHeads, kW, kW);
    a.o = view(o.data(), DType::F32, n, kHeads * kW), a.key_heads = kKeys, a.value_heads = kHeads, a.act = act;
    a.step = static_cast<const StepParams*>(step.data());
    d.delta_net(a);
    d.sync();
    d.download(&got[at * kHeads * kW], o.data(), n * kHeads * kW * 4);
  }
  d.download(end.data(), state.data(), end.size() * 4);
  return {Doubles(got.begin(), got.end()), Doubles(end.begin(), end.end())};
}

}  // namespace

TEST_CASE("delta rule, hard inputs: in chunks with fp32 products, and on every CPU device") {
  for (const Hard& h : kHard) {
    const Sequence s(h, kShort);
    const Result want = exact(s);
    Floats o, one_by_one, state(kW * kW), chunked(kW * kW);
    const Prepared p(s, 0);
    Doubles first(s.tokens * kW);
    for (int64_t t = 0; t < s.tokens; t++) std::copy_n(&want.o[t * kHeads * kW], kW, &first[t * kW]);
    recurrence<float>(p, kShort, state, one_by_one);
    chunks_in_fp32(p, kShort, chunked, o);
    const double recurrent = relative(first, one_by_one), in_chunks = relative(first, o);
    CHECK_MESSAGE(in_chunks <= 8 * recurrent, std::string(h.name), ": fp32 ", recurrent, " one by one, ", in_chunks, " in chunks");
    const Result ref = on_device(*make_ref_device(), s, kCall, Act::BF16), cpu = on_device(*make_cpu_device(2), s, kCall, Act::BF16);
    for (const Result* r : {&ref, &cpu}) CHECK_MESSAGE((relative(want.o, r->o) <= 1e-5 && relative(want.state, r->state) <= 1e-5), std::string(h.name));
  }
}

TEST_CASE("CUDA: delta rule, hard inputs: chunks on tensor cores") {
  if (list_cuda_devices().empty()) {
    MESSAGE("SKIPPED: no GPU");
    return;
  }
  const auto d = make_cuda_device(0, false);
  for (const Hard& h : kHard) {
    const Sequence s(h, kLong);
    const Result want = exact(s), got = on_device(*d, s, kCall, Act::BF16);
    const Sequence begin(h, kShort);
    const Result want_short = exact(begin), got_short = on_device(*d, begin, kShort, Act::BF16), steps = on_device(*d, begin, 1, Act::BF16);
    const size_t row = kHeads * kW;
    const double o_short = relative(want_short.o, got_short.o), o_long = relative(want.o, got.o, (kLong - kShort) * row);
    const double s_short = relative(want_short.state, got_short.state), s_long = relative(want.state, got.state);
    const double from_steps = relative(steps.state, got_short.state), exact_steps = relative(want_short.state, steps.state);
    MESSAGE(std::string(h.name), ": outputs ", o_short, " at 1K, ", o_long, " at 64K; state ", s_short, ", ", s_long, "; state against token by token ", from_steps,
            " (that itself ", exact_steps, ")");
    CHECK((o_short <= 1.5e-2 && o_long <= 1.5e-2 && s_short <= 1.5e-2 && s_long <= 1.5e-2 && from_steps <= 1.5e-2));
    CHECK((o_long <= 2 * o_short && s_long <= 2 * s_short));
    CHECK(exact_steps <= 1e-5);
    const Result exact_form = on_device(*d, begin, kShort, Act::F32);
    CHECK((relative(want_short.o, exact_form.o) <= 1e-5 && relative(want_short.state, exact_form.state) <= 1e-5));
  }
}
