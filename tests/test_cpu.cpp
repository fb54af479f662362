// What is special to the CPU device: every kernel of every instruction set against products in double, and bits that must not
// depend on the number of tokens, of threads, or on how a sequence is cut into calls. (test_ops.cpp compares operations with ref.)
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "ggml-lite/base/check.h"
#include "ggml-lite/core/codec.h"
#include "ggml-lite/cpu/cpu.h"
#include "ggml-lite/cpu/cpu_device.h"
#include "ggml-lite/ref/ref.h"
#include "tests/close.h"

namespace qn::cpu {
const Kernels* soft_amx_kernels();  // soft_amx.cpp
}

namespace {

using namespace qn;
using Floats = std::vector<float>;

struct Level {
  Isa isa;
  const cpu::Kernels* kernels;
};
std::vector<Level> levels() {
  std::vector<Level> all;
  for (Isa isa : {Isa::Scalar, Isa::Avx2, Isa::Avx512})
    for (cpu::Extra most : {cpu::Extra::None, cpu::Extra::Bf16, cpu::Extra::Amx})
      if (const cpu::Kernels* k = cpu::kernels_of(isa, most); k && (all.empty() || all.back().kernels != k)) all.push_back({isa, k});
  // without AMX, its kernels with tiles in software, which are compiled for the level below
  if (all.back().kernels == cpu::kernels_of(Isa::Avx512, cpu::Extra::Bf16) && all.back().kernels == cpu::avx512bf16_kernels() &&
      cpu::soft_amx_kernels() != all.back().kernels)
    all.push_back({Isa::Avx512, cpu::soft_amx_kernels()});
  return all;
}

struct Format {
  DType type;
  int group;
};
const Format kFormats[] = {{DType::F32, 0},    {DType::BF16, 0},  {DType::INT8, 32},  {DType::INT8, 64},
                           {DType::INT8, 128}, {DType::INT4, 32}, {DType::INT4, 64}, {DType::INT4, 128}};
const Act kActs[] = {Act::F32, Act::BF16, Act::INT8};

std::mt19937 dice(7);
float normal(float sd) { return std::normal_distribution<float>(0, sd)(dice); }
Floats normals(int64_t n, float sd = 1) {
  Floats v(static_cast<size_t>(n));
  for (float& x : v) x = normal(sd);
  return v;
}

// Bytes of a weight matrix with all codes; guard bytes behind it must not matter (they are 0xff: NaN in any float format)
std::vector<uint8_t> random_weights(Format f, int64_t n, int64_t k) {
  const int64_t bytes = weight_bytes(f.type, n, k, f.group);
  std::vector<uint8_t> b(static_cast<size_t>(bytes) + 512, 0xff);
  if (!is_t16(f.type)) {
    for (int64_t i = 0; i < n * k; i++) {
      const float v = normal(0.1f);
      const uint16_t h = float_to_bf16(v);
      if (f.type == DType::BF16) std::memcpy(&b[static_cast<size_t>(2 * i)], &h, 2);
      else std::memcpy(&b[static_cast<size_t>(4 * i)], &v, 4);
    }
    return b;
  }
  const int64_t kp = round_up(k, kPadK);
  std::vector<uint8_t> codes(static_cast<size_t>(16 * kp));
  std::vector<uint16_t> scales(static_cast<size_t>(kp / f.group * 16));
  for (int64_t p = 0; p < t16_panels(n); p++) {
    for (int64_t i = 0; i < 16 * kp; i++) {
      const bool real = p * 16 + i / kp < n && i % kp < k;
      const uint32_t any = f.type == DType::INT4 ? dice() % 16 : dice() % 256;
      const uint32_t edge = f.type == DType::INT4 ? (dice() % 2 ? 15 : 0) : (dice() % 2 ? 255 : dice() % 2);
      codes[static_cast<size_t>(i)] = static_cast<uint8_t>(!real ? static_cast<uint32_t>(code_zero(f.type)) : p % 2 ? edge : any);
    }
    for (uint16_t& s : scales) s = float_to_half(normal(0.02f));
    write_panel(f.type, k, f.group, codes.data(), scales.data(), &b[static_cast<size_t>(p * t16_panel_bytes(f.type, k, f.group))]);
  }
  return b;
}

// Activations with outliers, groups of different scale, one group of zeros, and extremes that saturate what can saturate
Floats activations(int64_t tokens, int64_t k) {
  Floats x = normals(tokens * k);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < k; i++) {
      float& v = x[static_cast<size_t>(t * k + i)];
      if (t == 2) v = i % 3 ? 1.f : -1.f;               // every code 127 or -127
      else if (t == 3 && i / 128 == 0) v = 0;           // a group without a scale
      else v *= i % 61 == 3 ? 20.f : static_cast<float>(1 + i / 128);
    }
  return x;
}

bool same_bits(const Floats& a, const Floats& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0; }

}  // namespace

TEST_CASE("cpu kernels: products of every format, rounding and instruction set") {
  for (Format f : kFormats)
    for (Act act : kActs)
      for (int64_t k : {32, 64, 96, 160, 256, 2048}) {
        if (f.group && k % f.group) continue;
        // 97: two blocks of tokens and a remainder of one, tiles of 16 and more, evenly and unevenly divided
        const bool panels = f.group && act == Act::INT8;
        const int64_t kTokens = panels && (k == 256 || k == 160) ? cpu::kBlock + 33 : panels && k == 2048 ? 27 : 9, kRows = 33;
        const std::vector<uint8_t> bytes = random_weights(f, kRows, k);
        const Tensor w = weight(bytes.data(), f.type, kRows, k, f.group);
        const Floats x = activations(kTokens, k);
        std::vector<double> want(static_cast<size_t>(kTokens * kRows)), scale(want);  // sum and sum of absolute values
        Floats row(static_cast<size_t>(k));
        for (int64_t n = 0; n < kRows; n++) {
          decode_row(w, n, row);
          for (int64_t t = 0; t < kTokens; t++) {
            Floats r(x.begin() + t * k, x.begin() + (t + 1) * k);
            round_act(act, r);
            for (int64_t i = 0; i < k; i++) {
              const double p = static_cast<double>(row[static_cast<size_t>(i)]) * r[static_cast<size_t>(i)];
              want[static_cast<size_t>(t * kRows + n)] += p;
              scale[static_cast<size_t>(t * kRows + n)] += std::fabs(p);
            }
          }
        }
        for (const Level& level : levels()) {
          cpu::Matrix m = cpu::make_matrix(*level.kernels, w, act);
          REQUIRE(static_cast<bool>(m.multiply));
          REQUIRE(m.product.bytes <= cpu::largest_prepared_row(k));
          std::vector<std::vector<uint8_t>> prepared;
          std::vector<const uint8_t*> xs;
          for (int64_t t = 0; t < kTokens; t++) {
            prepared.emplace_back(static_cast<size_t>(m.product.bytes) + 64, uint8_t{0xee});
            level.kernels->prepare(m.product, act, &x[static_cast<size_t>(t * k)], prepared.back().data());
            for (int i = 0; i < 64; i++) REQUIRE(prepared.back()[static_cast<size_t>(m.product.bytes + i)] == 0xee);
            xs.push_back(prepared.back().data());
          }
          Arena unpacked(static_cast<size_t>(cpu::kPanels * m.product.unpacked + cpu::kBlock / cpu::kPacked * m.product.packed + 64));
          Arena packed(static_cast<size_t>((kTokens + cpu::kPacked - 1) / cpu::kPacked * m.product.packed + 64));
          Floats first;  // all tokens at once
          double worst = 0;
          int unequal = 0, misplaced = 0, checked = 0;
          for (int64_t tokens = kTokens; tokens >= 1; tokens--)
            for (int64_t n = kRows; n >= 1; n--) {
              if (tokens > 9 && n < kRows && (n != 16 || tokens % 8 > 1)) continue;
              if (n < 31 && (n > 17 || (tokens != 1 && tokens != 4) || k > 256)) continue;
              m.rows = n;
              Floats y(static_cast<size_t>(kTokens * kRows), 7777.f);
              const bool before = m.takes_packed(tokens) && tokens % 2;  // packed before, or there
              for (int64_t t = 0; before && t < tokens; t += cpu::kPacked)
                m.many->pack(m.product, &xs[static_cast<size_t>(t)], static_cast<int>(std::min<int64_t>(cpu::kPacked, tokens - t)),
                             packed.data() + t / cpu::kPacked * m.product.packed);
              cpu::multiply(m, {0, m.panels()}, {xs.data(), tokens, before ? packed.data() : nullptr}, unpacked.data(), [&](int64_t r0, int rows, int64_t t0, int count, const float* tile) {
                for (int t = 0; t < count; t++)
                  for (int r = 0; r < rows; r++) y[static_cast<size_t>((t0 + t) * kRows + r0 + r)] = tile[16 * t + r];
              });
              if (first.empty()) first = y;
              for (int64_t t = 0; t < kTokens; t++)
                for (int64_t r = 0; r < kRows; r++) {
                  const auto i = static_cast<size_t>(t * kRows + r);
                  if (t >= tokens || r >= n) {
                    misplaced += y[i] != 7777.f;
                    continue;
                  }
                  checked++;
                  unequal += std::memcmp(&y[i], &first[i], 4) != 0;
                  if (!finite_bits(y[i])) worst = 1e30;
                  worst = std::max(worst, std::fabs(y[i] - want[i]) / (scale[i] + 1e-30));
                }
            }
          const std::string what = std::string(level.kernels->name) + " " + name(f.type) + "g" + std::to_string(f.group) + " act " + name(act) + " K " + std::to_string(k);
          CHECK_MESSAGE(worst < 2e-6, what, ": error ", worst);  // of the sum of absolute products
          CHECK_MESSAGE(unequal == 0, what, ": ", unequal, " of ", checked, " values depend on tokens or rows");
          CHECK_MESSAGE(misplaced == 0, what);
        }
      }
}

TEST_CASE("cpu kernels: of many tokens, what is not finite stays with its token; tiny ones have the bits of one") {
  for (Format f : {Format{DType::INT8, 32}, Format{DType::INT8, 128}, Format{DType::INT4, 64}, Format{DType::INT4, 128}}) {
    const int64_t k = 256, rows = 32, tokens = 21;
    const std::vector<uint8_t> bytes = random_weights(f, rows, k);
    const Tensor w = weight(bytes.data(), f.type, rows, k, f.group);
    Floats x = activations(tokens, k);
    x[7 * k + 3] = std::numeric_limits<float>::quiet_NaN(), x[9 * k + 200] = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < k; i++) x[static_cast<size_t>(11 * k + i)] *= 1e-33f, x[static_cast<size_t>(12 * k + i)] *= 1e30f;
    for (const Level& level : levels()) {
      const cpu::Matrix m = cpu::make_matrix(*level.kernels, w, Act::INT8);
      Arena prepared(static_cast<size_t>(tokens * m.product.bytes));
      Arena unpacked(static_cast<size_t>(cpu::kPanels * m.product.unpacked + cpu::kBlock / cpu::kPacked * m.product.packed + 64));
      std::vector<const uint8_t*> xs;
      for (int64_t t = 0; t < tokens; t++) {
        xs.push_back(prepared.data() + t * m.product.bytes);
        level.kernels->prepare(m.product, Act::INT8, &x[static_cast<size_t>(t * k)], prepared.data() + t * m.product.bytes);
      }
      Floats many(static_cast<size_t>(tokens * rows)), one(many);
      auto put = [&](Floats& y, int64_t t) {
        return [&y, t](int64_t r0, int n, int64_t t0, int count, const float* tile) {
          for (int i = 0; i < count; i++) std::copy_n(tile + 16 * i, n, y.begin() + (t + t0 + i) * rows + r0);
        };
      };
      cpu::multiply(m, {0, 2}, {xs.data(), tokens}, unpacked.data(), put(many, 0));
      for (int64_t t = 0; t < tokens; t++) cpu::multiply(m, {0, 2}, {&xs[static_cast<size_t>(t)], 1}, unpacked.data(), put(one, t));
      for (int64_t i = 0; i < tokens * rows; i++) {
        const float a = many[static_cast<size_t>(i)], b = one[static_cast<size_t>(i)];
        CHECK(std::isnan(a) == (i / rows == 7 || i / rows == 9));
        CHECK(((std::isnan(a) && std::isnan(b)) || float_to_bits(a) == float_to_bits(b)));
      }
    }
  }
}

TEST_CASE("cpu kernels: row-major rows may lie apart and nothing beyond the rows asked for is written") {
  for (const Level& level : levels())
    for (DType type : {DType::F32, DType::BF16})
      for (int rows = 1; rows <= 16; rows++) {
        const int64_t k = 64, apart = 96;
        const std::vector<uint8_t> bytes = random_weights({type, 0}, 17, apart);
        const Tensor w = weight(bytes.data(), type, 17, apart).columns(32, k);
        const cpu::Matrix m = cpu::make_matrix(*level.kernels, w, Act::F32);
        const Floats x = normals(k);
        Floats tile(16, 7777.f), row(apart);
        const uint8_t* xs = reinterpret_cast<const uint8_t*>(x.data());
        m.multiply(m.product, m.data, nullptr, rows, &xs, 1, tile.data());
        for (int r = 0; r < 16; r++) {
          if (r >= rows) {
            CHECK(tile[static_cast<size_t>(r)] == 7777.f);
            continue;
          }
          decode_row(weight(bytes.data(), type, 17, apart), r, row);
          double want = 0;
          for (int64_t i = 0; i < k; i++) want += static_cast<double>(row[static_cast<size_t>(32 + i)]) * x[static_cast<size_t>(i)];
          CHECK(std::fabs(tile[static_cast<size_t>(r)] - want) < 1e-5);
        }
      }
}

TEST_CASE("cpu kernels: prepared activations are those of the definition") {
  for (const Level& level : levels())
    for (int64_t k : {32, 96, 128, 160, 320}) {
      Floats x = activations(1, k);
      x[1] = 0.5f * x[0], x[5] = -x[0];
      for (Act act : kActs) {
        cpu::Product p;
        p.k = k, p.kp = round_up(k, kPadK), p.dtype = DType::F32, p.bytes = p.kp * 4;
        Floats got(static_cast<size_t>(p.kp), 1.f), want = x;
        level.kernels->prepare(p, act, x.data(), reinterpret_cast<uint8_t*>(got.data()));
        round_act(act, want);
        want.resize(static_cast<size_t>(p.kp));  // zeros behind
        CHECK_MESSAGE(same_bits(want, got), std::string(level.kernels->name), " act ", std::string(name(act)), " K ", k);
      }
      // An infinity or a NaN must not be rounded away.
      for (float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
        for (Format f : {Format{DType::INT4, 32}, Format{DType::INT8, 32}, Format{DType::BF16, 0}, Format{DType::F32, 0}}) {
          Floats y = x;
          y[17] = bad;
          const std::vector<uint8_t> bytes = random_weights(f, 16, k);
          const cpu::Matrix m = cpu::make_matrix(*level.kernels, weight(bytes.data(), f.type, 16, k, f.group), Act::INT8);
          std::vector<uint8_t> prepared(static_cast<size_t>(m.product.bytes));
          level.kernels->prepare(m.product, Act::INT8, y.data(), prepared.data());
          const uint8_t* xs = prepared.data();
          Floats tile(16);
          m.multiply(m.product, m.data, nullptr, 16, &xs, 1, tile.data());
          for (float v : tile) CHECK_FALSE(finite_bits(v));
        }
    }
}

TEST_CASE("cpu kernels: elementwise functions, every length, whole range") {
  for (const Level& level : levels()) {
    for (int64_t n : {1, 7, 8, 9, 15, 16, 17, 31, 40}) {
      const Floats g = normals(n, 3), x = normals(n), w = normals(n);
      Floats silu(n + 1, 7777.f), sigmoid(n + 1, 7777.f), scaled(n + 1, 7777.f);
      level.kernels->silu_mul(g.data(), x.data(), n, silu.data());
      level.kernels->sigmoid_mul(g.data(), x.data(), n, sigmoid.data());
      level.kernels->scale(x.data(), w.data(), 3.f, n, scaled.data());
      double squares = 0;
      for (int64_t i = 0; i < n; i++) {
        const double s = 1 / (1 + std::exp(-static_cast<double>(g[i])));
        squares += static_cast<double>(x[i]) * x[i];
        CHECK(std::fabs(sigmoid[i] - s * x[i]) <= 4e-7 * std::fabs(s * x[i]));
        CHECK(std::fabs(silu[i] - s * g[i] * x[i]) <= 4e-7 * std::fabs(s * g[i] * x[i]));
        CHECK(scaled[i] == x[i] * 3.f * w[i]);
      }
      CHECK(std::fabs(level.kernels->sum_squares(x.data(), n) - squares) <= 1e-6 * squares);
      CHECK(silu[n] == 7777.f);
      CHECK(sigmoid[n] == 7777.f);
      CHECK(scaled[n] == 7777.f);
    }
    double worst = 0;
    for (float v = -80; v < 80; v += 0.0173f) {
      float one = 1, got;
      level.kernels->sigmoid_mul(&v, &one, 1, &got);
      const double want = 1 / (1 + std::exp(-static_cast<double>(v)));
      worst = std::max(worst, std::fabs(got - want) / want);
    }
    CHECK_MESSAGE(worst < 4e-7, std::string(level.kernels->name), ": ", worst);
    const float inf = std::numeric_limits<float>::infinity();
    for (auto [in, want] : {std::pair{-200.f, 0.f}, {200.f, 1.f}, {-inf, 0.f}, {inf, 1.f}, {0.f, 0.5f}}) {
      float one = 1, got;
      level.kernels->sigmoid_mul(&in, &one, 1, &got);
      CHECK(std::fabs(got - want) < 1e-30f);
    }
    float nan = std::numeric_limits<float>::quiet_NaN(), one = 1, got = 0;
    level.kernels->sigmoid_mul(&nan, &one, 1, &got);
    CHECK_FALSE(finite_bits(got));
  }
}

namespace {

OpLimits limits() {
  OpLimits l;
  l.tokens = 64, l.width = 512, l.experts = 24, l.chosen = 4, l.expert_width = 64, l.model_width = 128;
  l.heads = 16, l.context = 1100, l.value_heads = 4, l.key_heads = 2, l.key_dim = 64, l.value_dim = 96;
  return l;
}
std::unique_ptr<Device> device(const Level& level, int threads, int tokens = 64) {
  auto d = std::make_unique<cpu::CpuDevice>(threads, *level.kernels);
  OpLimits l = limits();
  l.tokens = tokens;
  d->reserve(l);
  return d;
}
Tensor of(Floats& v, int64_t d0, int64_t d1 = 0, int64_t d2 = 0) { return view(v.data(), DType::F32, d0, d1, d2); }

// One layer's worth of matrices and inputs for `tokens` tokens; all() runs the operations that treat tokens alike and returns what
// they wrote, token by token.
struct Layer {
  static constexpr int64_t kTokens = 81, kWidth = 128, kExperts = 24, kChosen = 4, kInner = 64, kShared = 64;
  Format f;
  Act act;
  std::vector<uint8_t> w, router, gate, up, down, experts;
  Floats h, z, norm, logits;

  Layer(Format format, Act a) : f(format), act(a) {
    w = random_weights(f, 37, kWidth), router = random_weights({DType::BF16, 0}, kExperts, kWidth), gate = random_weights({DType::F32, 0}, 1, kWidth);
    const Format s = f.group == 128 ? Format{f.type, 64} : f;
    up = random_weights(s, 2 * kShared, kWidth), down = random_weights(s, kWidth, kShared);
    const ExpertLayout l = expert_layout(s.type, kWidth, kInner, s.group);
    experts.assign(static_cast<size_t>(l.stride * kExperts), 0xff);
    for (int64_t e = 0; e < kExperts; e++) {
      const auto u = random_weights(s, 2 * kInner, kWidth), d = random_weights(s, kWidth, kInner);
      std::copy_n(u.begin(), l.down_offset, experts.begin() + e * l.stride);
      std::copy_n(d.begin(), l.bytes - l.down_offset, experts.begin() + e * l.stride + l.down_offset);
    }
    h = activations(kTokens, kWidth), z = normals(kTokens * kWidth), norm = normals(kWidth), logits = normals(kTokens * kExperts, 2);
    for (int64_t t = 0; t < kTokens; t++) logits[static_cast<size_t>(t * kExperts + 5)] = 9;  // one expert of all tokens, more than a block of them
  }

  std::vector<Floats> all(Device& d, int64_t begin, int64_t tokens) {
    const int small = f.group == 128 ? 64 : f.group;
    Floats in(h.begin() + begin * kWidth, h.begin() + (begin + tokens) * kWidth), gates(z.begin() + begin * kWidth, z.begin() + (begin + tokens) * kWidth);
    Floats route(logits.begin() + begin * kExperts, logits.begin() + (begin + tokens) * kExperts);
    Floats y(tokens * 37), exact(tokens * kExperts), normed(tokens * kWidth), added(tokens * 32, 1.f), gated(tokens * 32, 2.f), x(in), l(tokens * kExperts), shared(tokens * kShared);
    Floats scale(tokens), weights(tokens * kChosen), inner(tokens * kChosen * kInner), out(in);
    std::vector<int32_t> ids(static_cast<size_t>(tokens * kChosen));
    NormMatmulArgs n;
    n.h = of(in, tokens, kWidth), n.norm = of(norm, kWidth), n.act = act, n.w = weight(w.data(), f.type, 37, kWidth, f.group), n.y = of(y, tokens, 37);
    n.w_exact = weight(router.data(), DType::BF16, kExperts, kWidth), n.y_exact = of(exact, tokens, kExperts), n.normed = of(normed, tokens, kWidth);
    d.norm_matmul(n);
    const Tensor square = weight(w.data(), f.type, 32, kWidth, f.group);  // a part of w
    Floats head(norm.begin(), norm.begin() + 32);
    d.gated_norm_matmul({of(in, tokens, kWidth), of(gates, tokens, kWidth), of(head, 32), 1e-6f, act, square, of(added, tokens, 32)});
    d.gate_matmul({of(in, tokens, kWidth), of(gates, tokens, kWidth), act, square, of(gated, tokens, 32)});
    MoeRouterArgs r;
    r.h = n.h, r.norm = n.norm, r.router = n.w_exact, r.shared_gate = weight(gate.data(), DType::F32, 1, kWidth), r.shared_act = act;
    r.shared_gate_up = weight(up.data(), f.type, 2 * kShared, kWidth, small), r.x = of(x, tokens, kWidth), r.logits = of(l, tokens, kExperts);
    r.shared = of(shared, tokens, kShared), r.shared_scale = of(scale, tokens);
    d.moe_router(r);
    MoeGateUpArgs g;
    g.x = r.x, g.logits = of(route, tokens, kExperts), g.act = act, g.experts = {experts.data(), f.type, static_cast<uint16_t>(small), kExperts, kWidth, kInner};
    g.ids = view(ids.data(), DType::I32, tokens, kChosen), g.weights = of(weights, tokens, kChosen), g.inner = of(inner, tokens * kChosen, kInner);
    d.moe_gate_up(g);
    MoeDownArgs m;
    m.ids = g.ids, m.weights = g.weights, m.inner = g.inner, m.act = act, m.experts = g.experts, m.shared = r.shared, m.shared_scale = r.shared_scale;
    m.shared_act = act, m.shared_down = weight(down.data(), f.type, kWidth, kShared, small), m.h = of(out, tokens, kWidth);
    d.moe_down(m);
    std::vector<Floats> rows(static_cast<size_t>(tokens));
    for (const Floats* v : {&y, &exact, &normed, &added, &gated, &x, &l, &shared, &scale, &weights, &inner, &out})
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t width = static_cast<int64_t>(v->size()) / tokens;
        rows[static_cast<size_t>(t)].insert(rows[static_cast<size_t>(t)].end(), v->begin() + t * width, v->begin() + (t + 1) * width);
      }
    return rows;
  }
};

}  // namespace

TEST_CASE("cpu device: bits of a row depend neither on the other rows nor on the threads") {
  for (const Level& level : levels())
    for (Format f : {Format{DType::F32, 0}, Format{DType::BF16, 0}, Format{DType::INT8, 32}, Format{DType::INT8, 128}, Format{DType::INT4, 32}, Format{DType::INT4, 128}})
      for (Act act : kActs) {
        Layer layer(f, act);
        const auto one = device(level, 1, Layer::kTokens);
        const std::vector<Floats> want = layer.all(*one, 0, Layer::kTokens);
        for (const Floats& row : want)
          for (float v : row) REQUIRE(finite_bits(v));
        const std::pair<int, std::vector<int64_t>> calls[] = {
            {1, {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23, 41, Layer::kTokens}}, {2, {1, 7}}, {3, {Layer::kTokens}}, {4, {4, 16}}, {7, {5, 33, Layer::kTokens}}};
        for (const auto& [threads, lengths] : calls) {
          const auto d = device(level, threads, Layer::kTokens);
          for (int64_t tokens : lengths) {
            const int64_t begin = Layer::kTokens - tokens;
            const std::vector<Floats> got = layer.all(*d, begin, tokens);
            for (int64_t t = 0; t < tokens; t++)
              CHECK_MESSAGE(same_bits(got[static_cast<size_t>(t)], want[static_cast<size_t>(begin + t)]), d->name(), " ", std::string(name(f.type)), "g", f.group,
                            " act ", std::string(name(act)), ": token ", begin + t, " in a call of ", tokens);
          }
        }
      }
}

namespace {

struct DeltaSequence {
  static constexpr int64_t kTokens = 40, kGk = 2, kGv = 4, kDk = 64, kDv = 96, kCh = 2 * kGk * kDk + kGv * kDv;
  Floats qkv = normals(kTokens * kCh), ba = normals(kTokens * 2 * kGv, 2), conv = normals(kCh * 4, 0.5f), neg_a, dt = normals(kGv);
  DeltaSequence() {
    for (int64_t i = 0; i < kGv; i++) neg_a.push_back(-std::exp(normal(2)));
  }
  // o of all tokens, then the state, then the last 4 inputs as the ring holds them
  Floats run(Device& d, int64_t slots, const std::vector<int64_t>& cuts) {
    Floats o(kTokens * kGv * kDv), state(kGv * kDk * kDv), ring(static_cast<size_t>(slots * kCh));
    int64_t pos = 0;
    for (size_t i = 0; pos < kTokens; i++) {
      const int64_t n = std::min(cuts[i % cuts.size()], kTokens - pos);
      const StepParams step{static_cast<int32_t>(pos), static_cast<int32_t>(n)};
      DeltaNetArgs a;
      a.qkv = of(qkv, kTokens, kCh).slice(pos, n), a.ba = of(ba, kTokens, 2 * kGv).slice(pos, n), a.conv = of(conv, kCh, 4);
      a.neg_a = of(neg_a, kGv), a.dt_bias = of(dt, kGv), a.conv_ring = of(ring, slots, kCh), a.state = of(state, kGv, kDk, kDv);
      a.o = of(o, kTokens, kGv * kDv).slice(pos, n), a.key_heads = kGk, a.value_heads = kGv, a.step = &step;
      d.delta_net(a);
      pos += n;
    }
    Floats all = o;
    all.insert(all.end(), state.begin(), state.end());
    for (int64_t p = kTokens - 4; p < kTokens; p++) all.insert(all.end(), ring.begin() + (p & (slots - 1)) * kCh, ring.begin() + ((p & (slots - 1)) + 1) * kCh);
    return all;
  }
};

}  // namespace

TEST_CASE("cpu device: delta net, any cut of a sequence, any ring, any threads") {
  DeltaSequence s;
  for (const Level& level : levels()) {
    const auto one = device(level, 1);
    const Floats want = s.run(*one, 4, {DeltaSequence::kTokens});
    for (int threads : {1, 2, 3, 7}) {
      const auto d = device(level, threads);
      for (int64_t slots : {4, 8, 16})
        for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{1}, {2}, {3, 1}, {5, 4, 1, 7}, {17}, {DeltaSequence::kTokens}})
          CHECK_MESSAGE(same_bits(want, s.run(*d, slots, cuts)), d->name(), ": ", slots, " slots, cuts from ", cuts[0]);
    }
    const auto ref = make_ref_device();
    const Floats exact = s.run(*ref, 4, {DeltaSequence::kTokens});
    const Close c = close(exact, want, 1e-10, 1e-4);
    CHECK_MESSAGE(c.ok, std::string(level.kernels->name), ": ", c.text());
  }
}

namespace {

struct AttentionSequence {
  int64_t tokens, heads, kv, width;
  DType cache;
  Floats qkv, q_norm, k_norm, freq;
  AttentionSequence(int64_t t, int64_t h, int64_t hk, int64_t w, DType c) : tokens(t), heads(h), kv(hk), width(w), cache(c) {
    qkv = normals(t * 2 * (h + hk) * w, 1.5f), q_norm = normals(w), k_norm = normals(w);
    for (int64_t i = 0; i < w / 8; i++) freq.push_back(std::pow(1e4f, -static_cast<float>(i) / static_cast<float>(w / 8)));
  }
  // o of positions begin.. and the caches; calls of `cut` tokens, after one call with everything before
  Floats run(Device& d, int64_t begin, int64_t cut) {
    const int64_t columns = 2 * (heads + kv) * width, context = tokens + 5;
    Floats o(static_cast<size_t>(tokens * heads * width));
    std::vector<uint8_t> k(static_cast<size_t>(kv * context * width * item_bytes(cache))), v = k;
    std::vector<uint16_t> ks(static_cast<size_t>(kv * context * kv_groups(width))), vs = ks;
    for (int64_t pos = 0; pos < tokens;) {
      const int64_t n = pos < begin ? std::min<int64_t>(64, begin - pos) : std::min(cut, tokens - pos);
      const StepParams step{static_cast<int32_t>(pos), static_cast<int32_t>(n)};
      AttentionArgs a;
      a.qgkv = of(qkv, tokens, columns).slice(pos, n), a.q_norm = of(q_norm, width), a.k_norm = of(k_norm, width);
      a.inv_freq = of(freq, static_cast<int64_t>(freq.size())), a.rope_scale = 1.1f;
      a.k_cache = view(k.data(), cache, kv, context, width), a.v_cache = view(v.data(), cache, kv, context, width);
      const int64_t groups = kv_groups(width);
      if (cache == DType::I8) a.k_scales = view(ks.data(), DType::F16, kv, context, groups), a.v_scales = view(vs.data(), DType::F16, kv, context, groups);
      a.heads = static_cast<int>(heads), a.kv_heads = static_cast<int>(kv), a.o = of(o, tokens, heads * width).slice(pos, n), a.step = &step;
      d.attention(a);
      pos += n;
    }
    return o;
  }
};

}  // namespace

TEST_CASE("cpu device: attention, any cut of a sequence, any threads") {
  for (const Level& level : levels())
    for (int64_t length : {1, 255, 256, 257, 258, 1000}) {
      if (length == 1000 && level.isa == Isa::Scalar) continue;
      const DType cache = length == 258 ? DType::I8 : length % 2 ? DType::F32 : DType::BF16;
      AttentionSequence s(length, length == 256 ? 13 : 8, length == 256 ? 1 : 2, 32, cache);
      if (cache == DType::I8) s = AttentionSequence(length, 3, 1, 160, cache);  // a scale for 128 dims, and one for 32
      const auto one = device(level, 1);
      const Floats want = s.run(*one, 0, 64);
      for (int threads : {1, 2, 4}) {
        const auto d = device(level, threads);
        for (int64_t cut : {1, 3, 64})  // near the end, where there are most blocks
          CHECK_MESSAGE(same_bits(want, s.run(*d, std::max<int64_t>(0, length - 9), cut)), d->name(), ": ", length, " keys, calls of ", cut);
      }
      if (length == 256 || length == 257 || length == 258) {
        const auto ref = make_ref_device();
        const Floats exact = s.run(*ref, 0, 64);
        const Close c = close(exact, want, s.cache == DType::F32 ? 1e-10 : s.cache == DType::I8 ? 1e-5 : 1e-6, 1e-2);
        CHECK_MESSAGE(c.ok, std::string(level.kernels->name), ": ", c.text());
      }
    }
}

TEST_CASE("cpu device: attention whose partial results do not fit the scratch at once") {
  const Level level = levels().back();
  constexpr int64_t kHeads = 16, kWidth = 256, kKeys = 10240, kTokens = 15;
  Floats qkv = normals(kTokens * 2 * (kHeads + 1) * kWidth), norm(kWidth, 1.f), freq(8, 0.1f);
  std::vector<uint16_t> keys(static_cast<size_t>((kKeys + kTokens) * kWidth));
  for (uint16_t& k : keys) k = float_to_bf16(static_cast<float>(dice() % 200) * 0.01f - 1);
  auto run = [&](int threads) {
    const auto d = std::make_unique<cpu::CpuDevice>(threads, *level.kernels);
    OpLimits l;
    l.tokens = kTokens, l.width = kHeads * kWidth, l.heads = kHeads, l.context = kKeys + kTokens;
    d->reserve(l);
    std::vector<uint16_t> k = keys, v(keys.rbegin(), keys.rend());
    Floats o(kTokens * kHeads * kWidth);
    const StepParams step{kKeys, kTokens};
    AttentionArgs a;
    a.qgkv = of(qkv, kTokens, 2 * (kHeads + 1) * kWidth), a.q_norm = of(norm, kWidth), a.k_norm = of(norm, kWidth), a.inv_freq = of(freq, 8);
    a.k_cache = view(k.data(), DType::BF16, 1, kKeys + kTokens, kWidth), a.v_cache = view(v.data(), DType::BF16, 1, kKeys + kTokens, kWidth);
    a.heads = kHeads, a.kv_heads = 1, a.o = of(o, kTokens, kHeads * kWidth), a.step = &step;
    d->attention(a);
    return o;
  };
  CHECK(same_bits(run(1), run(8)));
}

TEST_CASE("cpu device: routing survives NaN, memory and scratch are refused by name") {
  const auto d = device(levels().back(), 2);
  {
    Layer layer({DType::BF16, 0}, Act::F32);
    std::fill_n(layer.logits.begin(), Layer::kExperts, std::numeric_limits<float>::quiet_NaN());
    CHECK_NOTHROW(layer.all(*d, 0, 41));  // K distinct valid experts are chosen, whatever the logits
  }
  CHECK_THROWS_AS(d->alloc(size_t{1} << 60, "the cache"), Error);
  try {
    d->alloc(size_t{1} << 46, "the key-value cache");
    CHECK(false);
  } catch (const Error& e) {
    CHECK(std::string(e.what()).find("the key-value cache") != std::string::npos);
  }
  Floats h(96 * 128), y(96 * 32);
  const std::vector<uint8_t> w = random_weights({DType::BF16, 0}, 32, 128);
  NormMatmulArgs a;
  a.h = of(h, 96, 128), a.act = Act::INT8, a.w = weight(w.data(), DType::BF16, 32, 128), a.y = of(y, 96, 32);
  CHECK_NOTHROW(d->norm_matmul(a));  // more tokens, but narrow: fits
  Floats wide(96 * 512);
  const std::vector<uint8_t> w2 = random_weights({DType::BF16, 0}, 32, 512);
  a.h = of(wide, 96, 512), a.act = Act::F32, a.w = weight(w2.data(), DType::BF16, 32, 512);
  CHECK_THROWS_AS(d->norm_matmul(a), Bug);
  OpLimits more = limits();
  more.tokens = 96;
  d->reserve(more);
  CHECK_NOTHROW(d->norm_matmul(a));
  Buffer b = d->alloc(1000, "a buffer");
  for (int i = 0; i < 1000; i++) REQUIRE(static_cast<uint8_t*>(b.data())[i] == 0);
}

TEST_CASE("cpu device: scratch is told before it is taken") {
  cpu::CpuDevice d(2, *levels().back().kernels);
  const uint64_t told = d.scratch_bytes(limits());
  OpLimits wider = limits();
  wider.tokens *= 2;
  CHECK(told > 64 * 512 * 4);
  CHECK(d.scratch_bytes(wider) > told);
  d.reserve(limits());
  CHECK(d.scratch_bytes(limits()) == told);
  CHECK(d.scratch_bytes({}) == told);  // what is reserved stays
}

TEST_CASE("tensor: slices of T16 are whole panels, columns are none") {
  for (Format f : kFormats) {
    const std::vector<uint8_t> bytes = random_weights(f, 48, 128);
    const Tensor w = weight(bytes.data(), f.type, 48, 128, f.group), part = w.slice(16, 20);
    CHECK(part.rows() == 20);
    Floats want(128), got(128);
    for (int64_t n = 0; n < 20; n++) {
      decode_row(w, 16 + n, want), decode_row(part, n, got);
      CHECK(same_bits(want, got));
    }
    CHECK(static_cast<bool>(w.slice(8, 8)) == !is_t16(f.type));
    CHECK(static_cast<bool>(w.columns(32, 32)) == !is_t16(f.type));
  }
}

TEST_CASE("cpu device: instruction sets and names") {
  CHECK(isa_available(Isa::Auto));
  CHECK(isa_available(Isa::Scalar));
  CHECK((!isa_available(Isa::Avx512) || isa_available(Isa::Avx2)));
  for (Isa isa : {Isa::Avx2, Isa::Avx512})
    if (!isa_available(isa)) CHECK_THROWS_AS(make_cpu_device(1, isa), Error);
  CHECK(make_cpu_device(3, Isa::Scalar)->name() == "cpu (3 threads, scalar)");
  CHECK(make_cpu_device(1)->name() == std::string("cpu (1 threads, ") + cpu::kernels_of(Isa::Auto)->name + ")");
  CHECK(cpu_read_bandwidth(1, kLeastRead) > 1e6);
  CHECK(cpu_read_bandwidth(1, kLeastRead - 1) == 0);  // caches might hold it
  const int probed = probe_threads();
  CHECK((probed == default_threads() || probed == usable_processors()));
  for (const auto& level : levels()) CHECK((!level.kernels->work || level.kernels->work(10) > 0));
  CHECK((cpu_peak(1) > 1e9 || !levels().back().kernels->work));
  CHECK(cpu_peak(1, Isa::Scalar) == 0);
  const std::vector<uint8_t> ones(4096, 0x81);  // sums of such words wrap round: in unsigned ones, or UBSan says so
  for (const auto& level : levels()) CHECK(level.kernels->read(ones.data(), 4096) == levels().front().kernels->read(ones.data(), 4096));
}
