// Encoders against brute force and against the decoder; requantising a file.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <vector>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/base/safetensors.h"
#include "ggml-lite/core/codec.h"
#include "ggml-lite/core/qn.h"
#include "quantize/encode.h"
#include "quantize/recipe.h"
#include "quantize/requantize.h"
#include "tests/temp_dir.h"

using namespace qn;

namespace {

using Floats = std::vector<float>;

// Portable noise: the golden checksums below must not depend on a standard library's distributions.
struct Noise {
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  float uniform() { return static_cast<float>(bits() >> 7) * 0x1p-24f; }  // [0, 1)
  float bell() {                                                          // close to normal, variance 1
    float s = -6;
    for (int i = 0; i < 12; i++) s += uniform();
    return s;
  }
};

struct Encoded {
  DType dtype;
  int64_t n, k;
  int group;
  std::vector<uint8_t> bytes;
  QuantError error;
  Floats decoded() const {
    Floats out(static_cast<size_t>(n * k));
    const Tensor w = weight(bytes.data(), dtype, n, k, group);
    for (int64_t r = 0; r < n; r++) decode_row(w, r, {out.data() + r * k, static_cast<size_t>(k)});
    return out;
  }
};

Encoded encode(DType dtype, int64_t n, int64_t k, int group, const Floats& x, ScaleSearch search) {
  Encoded e{dtype, n, k, group, std::vector<uint8_t>(static_cast<size_t>(weight_bytes(dtype, n, k, group)), 0xee), {}};
  encode_rows(dtype, n, k, group, x.data(), search, e.bytes, &e.error);
  return e;
}

double squared(const float* a, const float* b, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  return s;
}

double error_of(const float* x, int n, double scale, int lo, int hi) {
  double e = 0;
  for (int i = 0; i < n; i++) {
    const double q = scale == 0 ? 0 : std::clamp(std::nearbyint(x[i] / scale), static_cast<double>(lo), static_cast<double>(hi));
    e += (x[i] - q * scale) * (x[i] - q * scale);
  }
  return e;
}

// The least error over every fp16 scale of either sign that could matter.
double brute_force(const float* x, int n, DType dtype) {
  const int lo = dtype == DType::INT4 ? -8 : -127, hi = dtype == DType::INT4 ? 7 : 127;
  float m = 0;
  for (int i = 0; i < n; i++) m = std::max(m, std::fabs(x[i]));
  double best = error_of(x, n, 0, lo, hi);
  const float smallest = m / static_cast<float>(hi) * 0.35f;
  const float largest = std::max(0x1p-24f, m * 1.01f / (dtype == DType::INT4 ? 1.0f : 100.0f));
  for (int h = std::max(1, static_cast<int>(float_to_half(smallest))); h < 0x7c00 && half_to_float(static_cast<uint16_t>(h)) <= largest;
       h++)
    for (const double sign : {1.0, -1.0}) {
      if (sign < 0 && dtype == DType::INT8) continue;  // the same codes
      best = std::min(best, error_of(x, n, sign * static_cast<double>(half_to_float(static_cast<uint16_t>(h))), lo, hi));
    }
  return best;
}

// Weights of several shapes: what real tensors look like, and what nobody wishes for.
constexpr int kShapes = 9;
float draw(Noise& noise, int shape, int i) {
  const float z = noise.bell();
  switch (shape) {
    case 0:
      return round_bf16(0.02f * z);
    case 1:
      return 0.02f * std::copysign(std::log(1.0001f - noise.uniform()), z);  // Laplace
    case 2:
      return 0.01f * z / std::sqrt(0.05f + noise.uniform());  // long tails
    case 3:
      return noise.uniform() - 0.5f;
    case 4:
      return i % 32 == 7 ? 10.0f * z : 0.01f * z;  // one outlier
    case 5:
      return std::fabs(z);  // one sign
    case 6:
      return noise.bits() % 4 ? 0.0f : z;  // mostly zero
    case 7:
      return std::ldexp(z, -static_cast<int>(noise.bits() % 40));  // over 40 octaves
    default:
      return z * 4e-8f;  // about the least fp16
  }
}

Floats drawn(Noise& noise, int shape, int64_t n) {
  Floats x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); i++) x[i] = draw(noise, shape, static_cast<int>(i));
  return x;
}

}  // namespace

TEST_CASE("encode: least squares is near the best of all fp16 scales, and never worse than the maximum") {
  Noise noise{1};
  const Floats nothing(32);
  for (const DType dtype : {DType::INT4, DType::INT8})
    for (int shape = 0; shape < kShapes; shape++) {
      const int64_t n = 48, k = 32;
      const Floats x = drawn(noise, shape, n * k);
      const Floats best = encode(dtype, n, k, 32, x, ScaleSearch::LeastSquares).decoded();
      const Floats plain = encode(dtype, n, k, 32, x, ScaleSearch::Max).decoded();
      double sum = 0, sum_brute = 0, sum_plain = 0;
      for (int64_t r = 0; r < n; r++) {
        const double e = squared(&x[r * k], &best[r * k], k), e_max = squared(&x[r * k], &plain[r * k], k);
        const double brute = brute_force(&x[r * k], static_cast<int>(k), dtype);
        CHECK(e <= e_max);
        CHECK(e >= brute * 0.999999);
        CAPTURE(shape);
        CHECK(e <=
              brute * (dtype == DType::INT4 ? 1.15 : 2) + 1e-7 * squared(&x[r * k], nothing.data(), k));  // a row may miss a lucky scale
        sum += e, sum_brute += brute, sum_plain += e_max;
      }
      INFO(std::string(name(dtype)) << " shape " << shape << ": search " << sum / sum_brute << ", maximum " << sum_plain / sum_brute
                                    << " of brute force");
      CHECK(sum <= sum_brute * (dtype == DType::INT4 ? 1.003 : 1.04));
      if (dtype == DType::INT4 && shape < 4) CHECK(sum < 0.97 * sum_plain);
    }
}

TEST_CASE("encode: never worse than the maximum in any group") {
  Noise noise{2};
  for (const DType dtype : {DType::INT4, DType::INT8})
    for (const int group : {32, 64, 128})
      for (int shape = 0; shape < kShapes; shape++) {
        const int64_t n = 64, k = 512;
        const Floats x = drawn(noise, shape, n * k);
        const Floats best = encode(dtype, n, k, group, x, ScaleSearch::LeastSquares).decoded();
        const Floats plain = encode(dtype, n, k, group, x, ScaleSearch::Max).decoded();
        for (int64_t i = 0; i < n * k; i += group) REQUIRE(squared(&x[i], &best[i], group) <= squared(&x[i], &plain[i], group));
      }
}

TEST_CASE("encode: weights that lie on a grid come back exactly") {
  Noise noise{3};
  for (const DType dtype : {DType::INT4, DType::INT8})
    for (const int group : {32, 128}) {
      const int64_t n = 160, k = 256;
      Floats x(static_cast<size_t>(n * k));
      for (int64_t r = 0; r < n; r++)
        for (int64_t g = 0; g < k; g += group) {
          // Any fp16 scale, subnormal ones too, of either sign. The longest code of INT4 may be any, one or eight alike.
          const uint16_t h = static_cast<uint16_t>(1 + noise.bits() % 0x7800);
          const float scale = half_to_float(h) * (noise.bits() % 2 ? 1.0f : -1.0f);
          const int longest = dtype == DType::INT8 ? 127 : 1 + static_cast<int>(r % 8);
          for (int64_t i = 0; i < group; i++) {
            int q = static_cast<int>(noise.bits() % static_cast<uint32_t>(2 * longest + 1)) - longest;
            if (i == 5) q = -longest;
            if (q == 8) q = 7;
            x[r * k + g + i] = static_cast<float>(q) * scale;
          }
        }
      const Encoded e = encode(dtype, n, k, group, x, ScaleSearch::LeastSquares);
      const Floats back = e.decoded();
      for (int64_t i = 0; i < n * k; i++) {
        INFO(std::string(name(dtype)) << " group " << group << " row " << i / k << " column " << i % k);
        REQUIRE(back[i] == x[i]);
      }
      CHECK(e.error.squared == 0);
      // Encoded once more, nothing moves.
      CHECK(encode(dtype, n, k, group, back, ScaleSearch::LeastSquares).decoded() == back);
    }
}

// One source for every instruction set: a machine with AVX2 and one without must write the same file.
TEST_CASE("encode: the bits written are the same on every machine") {
  Noise noise{4};
  Floats x;
  for (int shape = 0; shape < kShapes; shape++) {
    const Floats part = drawn(noise, shape, 16 * 256);
    x.insert(x.end(), part.begin(), part.end());
  }
  std::string got;
  for (const DType dtype : {DType::INT4, DType::INT8})
    for (const int group : {32, 128})
      for (const ScaleSearch search : {ScaleSearch::Max, ScaleSearch::LeastSquares}) {
        const Encoded e = encode(dtype, 16 * kShapes, 256, group, x, search);
        got += format(" %08x", crc32c(e.bytes));
      }
  CHECK(got == " 5742b4a2 cccded20 ae2c285b 4595ead1 7bdaff65 7a2da883 641d3da6 11d219f5");
}

TEST_CASE("encode: padding, and statistics against the decoder") {
  Noise noise{5};
  for (const DType dtype : {DType::INT4, DType::INT8, DType::BF16, DType::F32})
    for (const ScaleSearch search : {ScaleSearch::Max, ScaleSearch::LeastSquares}) {
      const int64_t n = 20, k = 96;
      const int group = is_t16(dtype) ? 32 : 0;
      const Floats x = drawn(noise, 2, n * k);
      Encoded e = encode(dtype, n, k, group, x, search);
      const Floats back = e.decoded();
      CAPTURE(std::string(name(dtype)));
      double reference = 0, largest = 0;
      for (size_t i = 0; i < x.size(); i++) {
        reference += static_cast<double>(x[i]) * x[i];
        largest = std::max(largest, std::fabs(static_cast<double>(x[i]) - back[i]));
      }
      const double error = squared(x.data(), back.data(), n * k);
      CHECK(e.error.count == x.size());
      CHECK(e.error.squared == doctest::Approx(error).epsilon(1e-5));
      CHECK(e.error.reference == doctest::Approx(reference).epsilon(1e-5));
      CHECK(e.error.largest == doctest::Approx(largest).epsilon(1e-5));
      CHECK(e.error.relative() == doctest::Approx(std::sqrt(error / reference)).epsilon(1e-5));
      const Floats by_max = encode(dtype, n, k, group, x, ScaleSearch::Max).decoded();
      CHECK(e.error.squared_max == doctest::Approx(squared(x.data(), by_max.data(), n * k)).epsilon(1e-5));
      CHECK(e.error.relative() <= e.error.relative_max());
      CHECK((e.error.squared == 0) == (dtype == DType::F32));

      encode_rows(dtype, n, k, group, x.data(), search, e.bytes, &e.error);  // added up
      CHECK(e.error.count == 2 * x.size());
      CHECK(e.error.squared == doctest::Approx(2 * error).epsilon(1e-5));
      QuantError none;
      CHECK(none.relative() == 0);

      if (dtype == DType::BF16) CHECK(reinterpret_cast<const uint16_t*>(e.bytes.data())[7] == float_to_bf16(x[7]));
      if (!is_t16(dtype)) continue;
      std::vector<uint8_t> codes(16 * 128);
      std::vector<uint16_t> scales(4 * 16);
      for (int p = 0; p < 2; p++) {
        read_panel(dtype, k, group, e.bytes.data() + p * t16_panel_bytes(dtype, k, group), codes.data(), scales.data());
        for (int r = 0; r < 16; r++)
          for (int c = 0; c < 128; c++) {
            const bool inside = p * 16 + r < n && c < k;
            const int code = codes[r * 128 + c];
            if (!inside) REQUIRE(code == code_zero(dtype));
            if (!inside) REQUIRE((scales[c / 32 * 16 + r] == 0 || c < k));
            if (p * 16 + r >= n) REQUIRE(scales[c / 32 * 16 + r] == 0);
            if (dtype == DType::INT8) REQUIRE(code >= 1);
          }
      }
    }
}

TEST_CASE("encode: zeros, the smallest and the largest weights") {
  for (const DType dtype : {DType::INT4, DType::INT8})
    for (const ScaleSearch search : {ScaleSearch::Max, ScaleSearch::LeastSquares}) {
      CAPTURE(std::string(name(dtype)));
      const float reach = 65504.0f * (dtype == DType::INT4 ? 8 : 127);
      Floats x(16 * 64, 0.0f);
      const auto encoded = [&] { return encode(dtype, 16, 64, 64, x, search); };
      const auto scale_of = [&](const Encoded& e, int row) { return reinterpret_cast<const uint16_t*>(e.bytes.data())[row]; };
      Encoded e = encoded();
      for (int r = 0; r < 16; r++) CHECK(scale_of(e, r) == 0);
      CHECK(e.decoded() == x);
      CHECK(e.error.relative() == 0);

      x[64] = 1e-30f, x[2 * 64] = -1e-9f, x[3 * 64] = 1e-45f;  // no fp16 scale is as small: zeros, scale 0
      x[4 * 64] = reach, x[5 * 64] = -reach, x[6 * 64] = 0x1p-24f, x[7 * 64 + 1] = -0.0f;
      e = encoded();
      const Floats back = e.decoded();
      for (const int r : {1, 2, 3, 7}) CHECK((scale_of(e, r) == 0 && back[static_cast<size_t>(r) * 64] == 0));
      for (const size_t r : {4, 5, 6}) CHECK(back[r * 64] == x[r * 64]);
      for (const float v : back) CHECK(std::isfinite(v));

      for (const float bad : {std::nextafter(reach, INFINITY), 3e38f, -3e38f, INFINITY, -INFINITY, std::nanf("")}) {
        x[8 * 64 + 3] = bad;
        CHECK_THROWS_AS(encoded(), Error);
      }
    }
  std::vector<uint8_t> out(2);
  for (const float bad : {3.4e38f, INFINITY, std::nanf("")})
    CHECK_THROWS_AS(encode_rows(DType::BF16, 1, 1, 0, &bad, ScaleSearch::Max, out, nullptr), Error);
  const float good = 3.38e38f;
  encode_rows(DType::BF16, 1, 1, 0, &good, ScaleSearch::Max, out, nullptr);

  const Floats x(size_t{16} * 96);
  std::vector<uint8_t> to(100);
  CHECK_THROWS_AS(encode_rows(DType::INT4, 16, 96, 32, x.data(), ScaleSearch::Max, to, nullptr), Bug);  // wrong size
  to.resize(static_cast<size_t>(weight_bytes(DType::INT4, 16, 96, 64)));
  CHECK_THROWS_AS(encode_rows(DType::INT4, 16, 96, 64, x.data(), ScaleSearch::Max, to, nullptr), Bug);  // 64 does not divide 96
}

TEST_CASE("encode: gate and up interleaved, experts there and back") {
  Noise noise{6};
  const int64_t d = 96, f = 64;
  const Floats gate = drawn(noise, 0, f * d), up = drawn(noise, 1, f * d), down = drawn(noise, 0, d * f);
  for (const DType dtype : {DType::INT4, DType::INT8, DType::BF16, DType::F32}) {
    CAPTURE(std::string(name(dtype)));
    const int group = is_t16(dtype) ? 32 : 0;
    const ExpertLayout l = expert_layout(dtype, d, f, group);
    std::vector<uint8_t> record(static_cast<size_t>(l.stride), 0xee);
    QuantError error;
    encode_expert(dtype, d, f, group, gate.data(), up.data(), down.data(), ScaleSearch::LeastSquares, record, &error);
    CHECK(error.count == static_cast<uint64_t>(3 * d * f));
    CHECK(std::all_of(record.begin() + l.bytes, record.end(), [](uint8_t b) { return b == 0; }));

    // Each row as it comes out when encoded alone.
    const auto alone = [&](const Floats& m, int64_t r, int64_t k) {
      return encode(dtype, 1, k, group, Floats(&m[r * k], &m[r * k] + k), ScaleSearch::LeastSquares).decoded();
    };
    const Experts e = {record.data(), dtype, static_cast<uint16_t>(group), 1, d, f};
    Floats row(static_cast<size_t>(d)), narrow(static_cast<size_t>(f));
    for (int64_t r = 0; r < f; r++) {
      const int64_t at = is_t16(dtype) ? r / 8 * 16 + r % 8 : r;
      decode_row(e.gate_up(0), at, row);
      CHECK(row == alone(gate, r, d));
      decode_row(e.gate_up(0), at + (is_t16(dtype) ? 8 : f), row);
      CHECK(row == alone(up, r, d));
    }
    for (int64_t r = 0; r < d; r++) {
      decode_row(e.down(0), r, narrow);
      CHECK(narrow == alone(down, r, f));
    }
    Floats g(gate.size()), u(up.size()), w(down.size());
    decode_expert(dtype, d, f, group, record.data(), g.data(), u.data(), w.data());
    double largest = 0;
    for (size_t i = 0; i < g.size(); i++)
      largest = std::max({largest, std::fabs(static_cast<double>(g[i]) - gate[i]), std::fabs(static_cast<double>(u[i]) - up[i]),
                          std::fabs(static_cast<double>(w[i]) - down[i])});
    CHECK(largest == doctest::Approx(error.largest).epsilon(1e-5));
  }
}

TEST_CASE("encode: the search beats the maximum on every kind of tensor of a trained model") {
  const SafeTensors s = SafeTensors::open_folder(QN_STORIES);
  std::map<std::string, std::map<std::string, QuantError>> kinds;  // by the last words of the name, then by format
  for (const auto& [name, t] : s.tensors()) {
    if (t.shape.size() != 2 || t.shape[1] % 32 || (name.find(".experts.") != name.npos && name.find(".experts.3.") == name.npos)) continue;
    if (name.find("layers.") != name.npos && name.find("layers.0.") == name.npos && name.find("layers.3.") == name.npos) continue;
    const Floats x = s.read_f32(name);
    const size_t cut = name.rfind('.', name.rfind('.') - 1);
    for (const DType dtype : {DType::INT4, DType::INT8})
      for (const int group : {32, 64})
        kinds[name.substr(cut + 1)][format("%s g%d", qn::name(dtype), group)].add(
            encode(dtype, t.shape[0], t.shape[1], group, x, ScaleSearch::LeastSquares).error);
  }
  CHECK(kinds.size() >= 12);
  for (const auto& [kind, formats] : kinds)
    for (const auto& [format, e] : formats) {
      INFO(kind << " " << format << ": " << e.relative() << " by search, " << e.relative_max() << " by maximum");
      CHECK(e.relative() < 0.97 * e.relative_max());
      CHECK(e.relative() > 0);
    }
}

TEST_CASE("recipe") {
  CHECK(kind_of("embed") == Kind::Exact);
  CHECK(kind_of("head") == Kind::Rest);
  CHECK(kind_of("tokenizer") == Kind::Table);
  CHECK(kind_of("layers.11.moe.experts") == Kind::Experts);
  CHECK(kind_of("mtp.layer.moe.experts") == Kind::Experts);
  CHECK(kind_of("mtp.fc") == Kind::Exact);
  CHECK(kind_of("mtp.norm") == Kind::Norm);
  CHECK(kind_of("mtp.head") == Kind::Draft);
  CHECK(kind_of("layers.0.delta.neg_a") == Kind::Vector);
  CHECK(kind_of("layers.0.moe.shared_gate") == Kind::Exact);
  CHECK(kind_of("layers.0.moe.shared_gate_up") == Kind::Rest);
  for (const char* bad :
       {"", "layers", "layers.", "layers.0", "layers.0.", "layers..norm1", "layers.x.norm1", "layers.0.head", "norm1", "mtp.layer.0.norm1"})
    CHECK_THROWS_AS(kind_of(bad), Error);
  CHECK(largest_group(2048, "x") == 128);
  CHECK(largest_group(64, "x") == 64);
  CHECK(largest_group(96, "x") == 32);
  CHECK_THROWS_AS(largest_group(40, "x"), Error);
  CHECK_THROWS_AS(largest_group(0, "x"), Error);
  CHECK(draft_format({}, 151936, 2048) == DType::INT4);
  CHECK(draft_format({}, 4096, 512) == DType::INT8);
  for (const DType draft : {DType::INT8, DType::INT4}) {
    Recipe r;
    r.draft = draft;
    CHECK(has_draft_head(r, 151936, 2048, 151936 * 2048 * 2));
    CHECK(has_draft_head(r, 151936, 2048, 151936 * (2048 + 16 * 2)) == (draft == DType::INT4));  // an INT8 head
    CHECK(!has_draft_head(r, 151936, 2040, 151936 * 2040 * 2));
    CHECK(!has_draft_head(r, 3, 2048, 3 * 2048 * 2));  // a panel has 16 rows
  }
  CHECK(expert_group({DType::INT4, DType::BF16, 0}, 2048, 512) == 128);
  CHECK(expert_group({DType::INT4, DType::BF16, 0}, 256, 64) == 64);
  CHECK(expert_group({DType::INT4, DType::BF16, 32}, 256, 64) == 32);
  CHECK(expert_group({DType::INT8, DType::BF16, 32}, 256, 128) == 128);
  CHECK(expert_group({DType::BF16, DType::BF16, 32}, 100, 7) == 0);
  CHECK_THROWS_AS(expert_group({DType::INT4, DType::BF16, 128}, 256, 64), Error);
  CHECK_THROWS_AS(expert_group({DType::INT4, DType::BF16, 16}, 256, 64), Error);
  CHECK_THROWS_AS(expert_group({DType::INT4, DType::BF16, 0}, 256, 40), Error);
  CHECK(parse_dtype("int4", "--experts", true) == DType::INT4);
  CHECK_THROWS_AS(parse_dtype("int4", "--rest", false), Error);
}

// ---- whole files ----------------------------------------------------------------------------------------------------

namespace {

struct Source {
  std::map<std::string, QnTensor> tensors;
  std::map<std::string, Floats> values;  // experts: gate, up, down of one after the other
};

QnTensor described(const std::string& name, DType dtype, std::vector<int64_t> shape, int group = 0) {
  QnTensor t;
  t.name = name, t.dtype = dtype, t.shape = std::move(shape), t.group = static_cast<uint16_t>(group);
  t.experts = name.ends_with("moe.experts");
  return t;
}

// A file with a tensor of every sort, wide enough that the big ones take several blocks.
constexpr int64_t kE = 5, kD = 64, kF = 128, kFs = 16400, kV = 33001;
Source write_source(const std::string& path, DType experts, int group, bool head = true, const std::vector<QnTensor>& more = {}) {
  Source s;
  Noise noise{7};
  QnWriter w(path);
  w.set("general.name", std::string("noise"));
  w.set("quant.experts", std::string(name(experts)));
  w.set("quant.rest", std::string("bf16"));
  std::vector<QnTensor> list = {
      described("tokenizer", DType::U8, {1000}),
      described("embed", DType::BF16, {kV, kD}),
      described("layers.0.norm1", DType::F32, {kD}),
      described("layers.0.moe.router", DType::BF16, {kE, kD}),
      described("layers.0.moe.shared_gate_up", DType::BF16, {2 * kFs, kD}),
      described("layers.0.moe.shared_down", DType::BF16, {kD, 96}),
      described("norm", DType::F32, {kD}),
  };
  if (head) list.push_back(described("head", DType::BF16, {kV, kD}));
  list.insert(list.end(), more.begin(), more.end());
  list.push_back(described("layers.0.moe.experts", experts, {kE, kD, kF}, group));
  for (const QnTensor& t : list) w.declare(t, t.experts);
  w.layout();
  for (size_t i = 0; i < list.size(); i++) {
    const QnTensor& t = list[i];
    s.tensors[t.name] = t;
    int64_t n = t.experts ? 3 : 1;
    for (const int64_t d : t.shape) n *= d;
    Floats& x = s.values[t.name] = Floats(static_cast<size_t>(n));
    for (float& v : x) v = t.dtype == DType::F32 ? noise.uniform() : round_bf16((noise.uniform() + noise.uniform() - 1) * 0.05f);
    if (t.experts) {
      std::vector<uint8_t> record(static_cast<size_t>(expert_layout(t.dtype, kD, kF, group).stride));
      for (int64_t e = 0; e < kE; e++) {
        const float* m = &x[e * 3 * kD * kF];
        encode_expert(t.dtype, kD, kF, group, m, m + kD * kF, m + 2 * kD * kF, ScaleSearch::LeastSquares, record, nullptr);
        w.write_expert(i, e, record);
      }
    } else if (t.dtype == DType::U8) {
      w.write(i, std::vector<uint8_t>(1000, 42));
    } else if (is_t16(t.dtype)) {
      std::vector<uint8_t> bytes(stored_bytes(t));
      encode_rows(t.dtype, t.shape[0], t.shape[1], t.group, x.data(), ScaleSearch::Max, bytes, nullptr);
      w.write(i, bytes);
    } else {
      std::vector<uint8_t> bytes(x.size() * static_cast<size_t>(item_bytes(t.dtype)));
      encode_rows(t.dtype, 1, n, 0, x.data(), ScaleSearch::Max, bytes, nullptr);
      w.write(i, bytes);
    }
  }
  w.finish();
  return s;
}

std::string refusal(const std::string& in, const std::string& out, const RequantizeOptions& options) {
  try {
    requantize(in, out, options);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("requantize: every tensor as the encoders make it, the rest as it was") {
  TempDir dir;
  const Source s = write_source(dir / "in.qn", DType::BF16, 0);
  RequantizeOptions o;
  o.experts = DType::INT4, o.rest = DType::INT8, o.group = 32, o.threads = 3;
  uint64_t last = 0, all = 0;
  const RequantizeReport report = requantize(dir / "in.qn", dir / "out.qn", o, [&](std::string_view, uint64_t done, uint64_t total) {
    CHECK(done <= total);
    last = done, all = total;
  });
  CHECK((last > 0 && all >= last));
  const QnFile in = QnFile::open(dir / "in.qn"), out = QnFile::open(dir / "out.qn");
  out.verify(2);
  CHECK(out.text("general.name") == "noise");
  CHECK(out.text("quant.experts") == "int4");
  CHECK(out.text("quant.rest") == "int8");
  CHECK(out.integer("quant.group", 0, 128) == 32);
  CHECK(out.text("general.quantizer") == "qnext-quantize: experts int4 g32, rest int8, scale search, from in.qn");
  REQUIRE(out.tensors().size() == in.tensors().size());
  for (size_t i = 0; i < in.tensors().size(); i++) {
    const QnTensor &a = in.tensors()[i], &b = out.tensors()[i];
    CAPTURE(a.name);
    CHECK((a.name == b.name && a.shape == b.shape && a.experts == b.experts));
    const Kind kind = kind_of(a.name);
    const std::vector<uint8_t> got(out.data(b).begin(), out.data(b).end());
    if (kind != Kind::Rest && kind != Kind::Experts) {
      CHECK(a.dtype == b.dtype);
      CHECK(std::equal(got.begin(), got.end(), in.data(a).begin(), in.data(a).end()));
      continue;
    }
    const Floats& x = s.values.at(a.name);
    std::vector<uint8_t> expected(got.size());
    if (kind == Kind::Experts) {
      CHECK((b.dtype == DType::INT4 && b.group == 32));
      const size_t stride = expected.size() / kE;
      for (int64_t e = 0; e < kE; e++) {
        const float* m = &x[e * 3 * kD * kF];
        encode_expert(b.dtype, kD, kF, 32, m, m + kD * kF, m + 2 * kD * kF, o.search, std::span(expected).subspan(e * stride, stride),
                      nullptr);
      }
    } else {
      CHECK((b.dtype == DType::INT8 && b.group == largest_group(a.shape[1], "")));
      if (a.name == "layers.0.moe.shared_gate_up")
        encode_gate_up(b.dtype, kD, kFs, 64, x.data(), &x[kFs * kD], o.search, expected, nullptr);
      else
        encode_rows(b.dtype, a.shape[0], a.shape[1], b.group, x.data(), o.search, expected, nullptr);
    }
    CHECK(got == expected);
  }

  uint64_t weights = 0, before = 0, after = 0;
  for (const QnTensor& t : in.tensors()) before += t.bytes;
  for (const QnTensor& t : out.tensors()) after += t.bytes;
  for (const RequantizeRow& r : report.rows) {
    before -= r.bytes_before, after -= r.bytes_after;
    const bool changed = r.before != r.after;
    CAPTURE(r.label);
    CHECK((r.error.count == r.weights) == changed);
    CHECK((changed || r.error.count == 0));
    if (changed) CHECK(r.error.relative() < r.error.relative_max());
    weights += r.weights;
  }
  uint64_t expected_weights = 0;
  for (const auto& [name, x] : s.values) expected_weights += x.size();
  CHECK(weights == expected_weights);
  CHECK((before == 0 && after == 0));
  CHECK((report.bytes_before == in.size() && report.bytes_after == out.size()));
  CHECK(report.notes.empty());

  // One thread writes the same file, and scaling by the maximum another one.
  o.threads = 1;
  requantize(dir / "in.qn", dir / "out1.qn", o);
  CHECK(file_bytes(dir / "out1.qn") == file_bytes(dir / "out.qn"));
  o.search = ScaleSearch::Max;
  const RequantizeReport by_max = requantize(dir / "in.qn", dir / "out1.qn", o);
  for (size_t i = 0; i < report.rows.size(); i++) {
    CHECK(by_max.rows[i].error.squared == by_max.rows[i].error.squared_max);
    CHECK(by_max.rows[i].error.squared_max == doctest::Approx(report.rows[i].error.squared_max));
  }
}

TEST_CASE("requantize: from INT8 with a note; INT4 only when told; never to more bits") {
  TempDir dir;
  write_source(dir / "in8.qn", DType::INT8, 64);
  write_source(dir / "in4.qn", DType::INT4, 64);
  const std::string out = dir / "out.qn";
  RequantizeOptions o;
  o.experts = DType::INT4, o.threads = 2;
  const RequantizeReport r = requantize(dir / "in8.qn", out, o);
  REQUIRE(r.notes.size() == 1);
  CHECK(r.notes[0].find("int8 g64 to int4 g64") != std::string::npos);
  CHECK(QnFile::open(out).text("quant.experts") == "int4");
  CHECK(QnFile::open(out).text("quant.rest") == "bf16");

  // INT4 of the same or of no stated group stays as it is, byte for byte.
  for (const int group : {0, 64}) {
    o.group = group;
    requantize(dir / "in4.qn", out, o);
    const QnFile a = QnFile::open(dir / "in4.qn"), b = QnFile::open(out);
    const auto x = a.data(*a.find("layers.0.moe.experts")), y = b.data(*b.find("layers.0.moe.experts"));
    CHECK(std::equal(x.begin(), x.end(), y.begin(), y.end()));
  }
  std::filesystem::remove(out);
  o.group = 32;
  const auto check = [&](const char* in, const char* word) {
    const std::string m = refusal(dir / in, out, o);
    INFO(m);
    CHECK(m.find(word) != std::string::npos);
    CHECK(m.find(in) != std::string::npos);
    CHECK(!std::filesystem::exists(out));
  };
  check("in4.qn", "--allow-requantize");
  o.allow_requantize = true;
  CHECK(requantize(dir / "in4.qn", out, o).notes.size() == 1);
  CHECK(QnFile::open(out).find("layers.0.moe.experts")->group == 32);
  std::filesystem::rename(out, dir / "once.qn");
  RequantizeOptions again;
  again.rest = DType::INT8, again.threads = 1;
  requantize(dir / "once.qn", out, again);  // what was done before stays on record
  CHECK(QnFile::open(out).text("general.quantizer") ==
        "qnext-quantize: experts int4 g32, scale search, from in4.qn; then qnext-quantize: rest int8, scale search, from once.qn");
  std::filesystem::remove(out);
  o.group = 128;
  check("in4.qn", "does not divide");
  o.group = 0, o.experts = DType::INT8;
  check("in4.qn", "nothing new");
  o.experts = DType::BF16;
  check("in4.qn", "nothing new");
  check("in8.qn", "nothing new");
  o.experts = DType::INT8, o.group = 64;
  check("in8.qn", "--group");
  o = {};
  o.rest = DType::INT8;
  requantize(dir / "in8.qn", dir / "rest8.qn", o);
  o.rest = DType::BF16;
  check("rest8.qn", "nothing new");
}

TEST_CASE("requantize: a tied head, damage, and what is no model") {
  TempDir dir;
  const Source s = write_source(dir / "in.qn", DType::BF16, 0, false);
  const std::string out = dir / "out.qn";
  RequantizeOptions o;
  o.rest = DType::INT8, o.threads = 2;
  const RequantizeReport report = requantize(dir / "in.qn", out, o);
  CHECK(
      std::any_of(report.rows.begin(), report.rows.end(), [](const RequantizeRow& r) { return r.label == "head" && r.bytes_before == 0; }));
  {
    const QnFile f = QnFile::open(out);
    f.verify(1);
    const QnTensor* head = f.find("head");
    REQUIRE(head);
    CHECK(head == f.find("norm") + 1);
    CHECK(f.find("embed")->dtype == DType::BF16);
    std::vector<uint8_t> expected(head->bytes);
    encode_rows(DType::INT8, kV, kD, 64, s.values.at("embed").data(), o.search, expected, nullptr);
    CHECK(std::equal(expected.begin(), expected.end(), f.data(*head).begin()));
  }
  std::filesystem::remove(out);

  CHECK(refusal(dir / "in.qn", dir / "in.qn", o).find("same file") != std::string::npos);
  std::filesystem::create_symlink(dir / "in.qn", dir / "link.qn");
  CHECK(refusal(dir / "in.qn", dir / "link.qn", o).find("same file") != std::string::npos);
  CHECK(!refusal(dir / "absent.qn", out, o).empty());
  CHECK(!refusal(dir / "in.qn", dir / "nowhere/out.qn", o).empty());

  // A flipped bit in what is copied, in what is encoded, and in an expert.
  const std::vector<uint8_t> good = file_bytes(dir / "in.qn");
  o.experts = DType::INT4;
  for (const char* name : {"tokenizer", "embed", "layers.0.moe.shared_gate_up", "layers.0.moe.experts"}) {
    std::vector<uint8_t> b = good;
    const QnTensor t = *QnFile::open(dir / "in.qn").find(name);
    b[t.offset + t.bytes - 4000 % t.bytes - 1] ^= 16;
    put_file(dir / "bad.qn", b);
    const std::string m = refusal(dir / "bad.qn", out, o);
    INFO(m);
    CHECK(m.find("damaged") != std::string::npos);
    CHECK(m.find(name) != std::string::npos);
  }
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(dir.path)) files++;
  CHECK(files == 3);  // in, link, bad: nothing half-written is left

  {
    QnWriter w(dir / "tokens.qn");
    w.declare(described("tokenizer", DType::U8, {4}));
    w.layout();
    w.write(0, std::vector<uint8_t>(4));
    w.finish();
  }
  CHECK(refusal(dir / "tokens.qn", out, o).find("no weights") != std::string::npos);
  {
    QnWriter w(dir / "odd.qn");
    w.declare(described("surprise", DType::U8, {4}));
    w.layout();
    w.write(0, std::vector<uint8_t>(4));
    w.finish();
  }
  CHECK(refusal(dir / "odd.qn", out, o).find("surprise") != std::string::npos);
}

TEST_CASE("requantize: a head for guesses is kept, made where there is none, and left out where the head is as small") {
  TempDir dir;
  const QnTensor norm = described("mtp.norm", DType::F32, {kD});
  const std::string out = dir / "out.qn";
  RequantizeOptions o;
  o.threads = 2;
  // What is at mtp.head afterwards has to be these values; `from`: what they were made of, already rounded
  const auto check = [&](const Floats& from, DType dtype) {
    const QnFile f = QnFile::open(out);
    f.verify(1);
    const QnTensor* t = f.find("mtp.head");
    REQUIRE(t);
    CHECK((t == f.find("mtp.norm") + 1 && t->dtype == dtype && t->group == 64));
    std::vector<uint8_t> expected(t->bytes);
    encode_rows(dtype, kV, kD, 64, from.data(), o.search, expected, nullptr);
    CHECK(std::equal(expected.begin(), expected.end(), f.data(*t).begin()));
  };
  const auto same = [&](const std::string& in) {
    const QnFile a = QnFile::open(in), b = QnFile::open(out);
    const auto x = a.data(*a.find("mtp.head"));
    CHECK(std::ranges::equal(x, b.data(*b.find("mtp.head"))));
  };

  const Source s = write_source(dir / "old.qn", DType::BF16, 0, true, {norm});
  o.experts = DType::INT4;
  const RequantizeReport r = requantize(dir / "old.qn", out, o);
  check(s.values.at("head"), DType::INT8);
  CHECK(QnFile::open(out).text("general.quantizer").find(" draft head,") != std::string::npos);
  CHECK(std::ranges::any_of(r.rows, [](const RequantizeRow& x) { return x.label == "draft head" && x.before == "absent" && x.bytes_before == 0 && x.error.count > 0; }));
  CHECK(r.notes.empty());
  std::filesystem::rename(out, dir / "new.qn");
  o = {}, o.threads = 2, o.experts = DType::INT4;
  requantize(dir / "new.qn", out, o);
  same(dir / "new.qn");
  o.rest = DType::INT8;  // then the head holds as much
  CHECK(requantize(dir / "new.qn", out, o).notes.size() == 1);
  CHECK(!QnFile::open(out).find("mtp.head"));
  CHECK(QnFile::open(out).text("general.quantizer").rfind(" draft head,") < QnFile::open(out).text("general.quantizer").rfind("; then"));
  std::filesystem::rename(out, dir / "rest.qn");

  o = {}, o.threads = 2, o.rest = DType::INT8;
  requantize(dir / "old.qn", out, o);
  CHECK(!QnFile::open(out).find("mtp.head"));
  o.draft = DType::INT4;
  requantize(dir / "old.qn", out, o);
  check(s.values.at("head"), DType::INT4);
  {  // from an INT8 head
    const QnFile f = QnFile::open(dir / "rest.qn");
    Floats rounded(static_cast<size_t>(kV * kD));
    const Tensor head = weight(f.data(*f.find("head")).data(), DType::INT8, kV, kD, 64);
    for (int64_t i = 0; i < kV; i++) decode_row(head, i, std::span(rounded).subspan(static_cast<size_t>(i * kD), kD));
    requantize(dir / "rest.qn", out, o);
    check(rounded, DType::INT4);
  }

  const Source tied = write_source(dir / "tied.qn", DType::BF16, 0, false, {norm});
  requantize(dir / "tied.qn", out, o);
  check(tied.values.at("embed"), DType::INT4);
  CHECK(QnFile::open(out).find("head")->dtype == DType::INT8);
  write_source(dir / "four.qn", DType::BF16, 0, true, {norm, described("mtp.head", DType::INT4, {kV, kD}, 32)});
  requantize(dir / "four.qn", out, o);
  same(dir / "four.qn");
  write_source(dir / "none.qn", DType::BF16, 0);  // no layer that predicts
  requantize(dir / "none.qn", out, o);
  CHECK(!QnFile::open(out).find("mtp.head"));
}
