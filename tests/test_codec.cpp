// The T16 layout (core/blocks.h) and the scalar decoders. Every consumer that the layout was made for is emulated here lane by
// lane on the bytes of a tile and must give the dot products of decode_row().
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "ggml-lite/base/check.h"
#include "ggml-lite/core/codec.h"

using namespace qn;

namespace {

constexpr int kTokens = 8;

// One tile of random codes with scale 1, the integer activations of 8 tokens, and the sums by decode_row().
struct Tile {
  DType dtype;
  int k;                             // 64 or 32
  std::vector<uint8_t> codes;        // (16, 64)
  std::vector<uint8_t> panel;
  const uint8_t* bytes;              // 512
  int x[kTokens][64] = {};
  int ref[16][kTokens] = {};

  Tile(DType type, uint32_t seed) : dtype(type), k(tile_k(type)), codes(16 * 64) {
    std::mt19937 rng(seed);
    for (uint8_t& c : codes) c = static_cast<uint8_t>(type == DType::INT4 ? rng() % 16 : 1 + rng() % 255);
    for (auto& token : x)
      for (int i = 0; i < k; i++) token[i] = static_cast<int>(rng() % 255) - 127;
    const std::vector<uint16_t> ones(2 * 16, 0x3c00);
    panel.resize(t16_panel_bytes(type, 64, 32));
    write_panel(type, 64, 32, codes.data(), ones.data(), panel.data());
    bytes = panel.data() + t16_scale_bytes(64, 32);
    const Tensor w = weight(panel.data(), type, 16, 64, 32);
    std::vector<float> row(64);
    for (int r = 0; r < 16; r++) {
      decode_row(w, r, row);
      for (int n = 0; n < kTokens; n++)
        for (int i = 0; i < k; i++) ref[r][n] += static_cast<int>(row[i]) * x[n][i];
    }
  }
  uint32_t word(int lane, int i) const {  // what a lane's 16-byte load at 16 * lane leaves in its register i
    uint32_t w;
    std::memcpy(&w, bytes + 16 * lane + 4 * i, 4);
    return w;
  }
  int code(int r, int i) const { return codes[r * 64 + i] - code_zero(dtype); }
};

uint8_t byte_of(uint32_t word, int i) { return static_cast<uint8_t>(word >> (8 * i)); }

// D += A B with A (16, K), B (K, 8), as mma computes it; entries nobody set are poison.
constexpr int kPoison = 1 << 20;
template <int K>
struct Mma {
  int a[16][K], b[kTokens][K];
  Mma() {
    std::fill(&a[0][0], &a[0][0] + 16 * K, kPoison);
    std::fill(&b[0][0], &b[0][0] + kTokens * K, kPoison);
  }
  void add_to(int (&c)[16][kTokens]) const {
    for (int r = 0; r < 16; r++)
      for (int n = 0; n < kTokens; n++)
        for (int i = 0; i < K; i++) c[r][n] += a[r][i] * b[n][i];
  }
};

bool equal(const int (&c)[16][kTokens], const Tile& t) { return std::memcmp(c, t.ref, sizeof c) == 0; }

}  // namespace

TEST_CASE("T16: the picture in blocks.h, byte by byte") {
  const Tile t4(DType::INT4, 1), t8(DType::INT8, 2);
  int at = 0, wrong = 0;  // the byte index counts up by itself: the picture is read from left to right
  for (int g = 0; g < 8; g++)
    for (int t = 0; t < 4; t++)
      for (const int row : {g, g + 8})
        for (int b = 0; b < 8; b++, at++) {
          wrong += t4.bytes[at] != (t4.codes[row * 64 + 16 * t + b] | t4.codes[row * 64 + 16 * t + 8 + b] << 4);
          wrong += t8.bytes[at] != t8.codes[row * 64 + 8 * t + b];
          wrong += t8.bytes[512 + at] != t8.codes[row * 64 + 32 + 8 * t + b];  // the second tile follows
        }
  CHECK(at == 512);
  CHECK(wrong == 0);
}

TEST_CASE("T16: scales come first, 16 rows of a group together") {
  const int64_t k = 192;
  const int group = 64;
  std::vector<uint8_t> codes(16 * k, 9);
  std::vector<uint16_t> scales(3 * 16);
  for (size_t i = 0; i < scales.size(); i++) scales[i] = float_to_half(static_cast<float>(i + 1));
  std::vector<uint8_t> panel(t16_panel_bytes(DType::INT4, k, group));
  REQUIRE(panel.size() == 3 * 16 * 2 + 3 * 512);
  write_panel(DType::INT4, k, group, codes.data(), scales.data(), panel.data());
  std::vector<float> row(k);
  for (int r = 0; r < 16; r++) {
    decode_row(weight(panel.data(), DType::INT4, 16, k, group), r, row);
    for (int i = 0; i < k; i++) CHECK(row[i] == static_cast<float>(16 * (i / 64) + r + 1));
    uint16_t stored;
    std::memcpy(&stored, panel.data() + 2 * (16 * 2 + r), 2);
    CHECK(stored == scales[16 * 2 + r]);
  }
}

TEST_CASE("T16 INT4: vector product, one lane per (row pair, 16 k)") {
  const Tile t(DType::INT4, 3);
  int y[16][kTokens] = {};
  for (int n = 0; n < kTokens; n++)
    for (int lane = 0; lane < 32; lane++)
      for (int h = 0; h < 2; h++)
        for (int i = 0; i < 2; i++)
          for (int b = 0; b < 4; b++) {
            const int v = byte_of(t.word(lane, 2 * h + i), b), k = 16 * (lane & 3) + 4 * i + b;
            y[(lane >> 2) + 8 * h][n] += ((v & 15) - 8) * t.x[n][k] + ((v >> 4) - 8) * t.x[n][k + 8];
          }
  CHECK(equal(y, t));
}

TEST_CASE("T16 INT4: mma.m16n8k16, four k-steps out of one load") {
  const Tile t(DType::INT4, 4);
  // Mask 0x000f000f on word >> s gives two codes (low half, high half): their k within the lane's 16; the second word adds 4.
  const auto pair = [](int s) {
    const int first = s == 0 ? 0 : s == 4 ? 8 : s == 8 ? 1 : 9;
    return std::array<int, 2>{first, first + 2};
  };
  const int steps[4][3] = {{0, 0, 4}, {0, 8, 12}, {1, 0, 4}, {1, 8, 12}};  // word, shift for columns 2t.., shift for columns 2t+8..
  int c[16][kTokens] = {};
  for (const auto& [i, s0, s1] : steps) {
    Mma<16> m;
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane >> 2, col = 2 * (lane & 3);
      for (const int s : {s0, s1}) {
        const int to = col + (s == s1 ? 8 : 0);
        for (int h = 0; h < 2; h++) {
          const uint32_t v = (t.word(lane, 2 * h + i) >> s) & 0x000f000f;
          m.a[g + 8 * h][to] = static_cast<int>(v & 0xffff) - 8;
          m.a[g + 8 * h][to + 1] = static_cast<int>(v >> 16) - 8;
        }
        for (int j = 0; j < 2; j++) m.b[g][to + j] = t.x[g][16 * (lane & 3) + 4 * i + pair(s)[j]];
      }
    }
    m.add_to(c);
  }
  CHECK(equal(c, t));
}

TEST_CASE("T16 INT4: mma.m16n8k32.s8, two k-steps out of one load") {
  const Tile t(DType::INT4, 5);
  int c[16][kTokens] = {};
  for (int i = 0; i < 2; i++) {
    Mma<32> m;
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane >> 2, q = lane & 3;
      for (int b = 0; b < 4; b++) {
        for (int h = 0; h < 2; h++) {  // registers a0, a1 (low nibbles), a2, a3 (high nibbles)
          m.a[g + 8 * h][4 * q + b] = byte_of(t.word(lane, 2 * h + i) & 0x0f0f0f0f, b) - 8;
          m.a[g + 8 * h][16 + 4 * q + b] = byte_of((t.word(lane, 2 * h + i) >> 4) & 0x0f0f0f0f, b) - 8;
        }
        m.b[g][4 * q + b] = t.x[g][16 * q + 4 * i + b];
        m.b[g][16 + 4 * q + b] = t.x[g][16 * q + 8 + 4 * i + b];
      }
    }
    m.add_to(c);
  }
  CHECK(equal(c, t));
}

// vpdpbusd: each of 16 lanes adds four products of unsigned bytes of a and signed bytes of b.
static void dpbusd(int (&acc)[16], const uint8_t* a, const int* b) {
  for (int j = 0; j < 64; j++) acc[j / 4] += a[j] * b[j];
}

TEST_CASE("T16 INT4: a line is one AVX-512 register of VNNI operands; half of it one of AVX2") {
  const Tile t(DType::INT4, 6);
  int y[16][kTokens] = {};
  for (int n = 0; n < kTokens; n++) {
    int low[64], high[64];  // activations, each 8 values twice
    for (int j = 0; j < 64; j++) {
      low[j] = t.x[n][16 * (j / 16) + j % 8];
      high[j] = t.x[n][16 * (j / 16) + 8 + j % 8];
    }
    for (int g = 0; g < 8; g++) {
      uint8_t lo[64], hi[64];
      int acc[16] = {};
      for (int j = 0; j < 64; j++) {
        lo[j] = t.bytes[64 * g + j] & 15;
        hi[j] = t.bytes[64 * g + j] >> 4;
        acc[j / 4] -= 8 * (low[j] + high[j]);  // the excess, known before any weight is read
      }
      dpbusd(acc, lo, low);
      dpbusd(acc, hi, high);
      for (int j = 0; j < 16; j++) y[g + (j & 2 ? 8 : 0)][n] += acc[j];  // dwords 0 1 of four: row g, 2 3: row g + 8
    }
  }
  CHECK(equal(y, t));
}

TEST_CASE("T16 INT4: unpacking 8-byte halves gives AMX rows in natural order") {
  const Tile t(DType::INT4, 7);
  for (int g = 0; g < 8; g++) {
    const uint8_t* v = t.bytes + 64 * g;
    std::vector<uint8_t> rows[2];
    for (int l = 0; l < 4; l++)
      for (int h = 0; h < 2; h++)          // unpacklo / unpackhi of (low nibbles, high nibbles) per 128-bit lane
        for (const int shift : {0, 4})
          for (int b = 0; b < 8; b++) rows[h].push_back((v[16 * l + 8 * h + b] >> shift) & 15);
    for (int h = 0; h < 2; h++) CHECK(std::memcmp(rows[h].data(), &t.codes[(g + 8 * h) * 64], 64) == 0);
  }
}

TEST_CASE("T16 INT8: vector product") {
  const Tile t(DType::INT8, 8);
  int y[16][kTokens] = {};
  for (int n = 0; n < kTokens; n++)
    for (int lane = 0; lane < 32; lane++)
      for (int j = 0; j < 16; j++)
        y[(lane >> 2) + (j < 8 ? 0 : 8)][n] += (byte_of(t.word(lane, j / 4), j % 4) - 128) * t.x[n][8 * (lane & 3) + j % 8];
  CHECK(equal(y, t));
}

TEST_CASE("T16 INT8: mma.m16n8k32.s8, one k-step out of one load") {
  const Tile t(DType::INT8, 9);
  Mma<32> m;
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane >> 2, q = lane & 3;
    for (int b = 0; b < 4; b++)
      for (int half = 0; half < 2; half++) {  // a0 = word 0, a1 = word 2, a2 = word 1, a3 = word 3; ^ 0x80 makes excess-128 signed
        for (int h = 0; h < 2; h++)
          m.a[g + 8 * h][16 * half + 4 * q + b] = static_cast<int8_t>(byte_of(t.word(lane, 2 * h + half), b) ^ 0x80);
        m.b[g][16 * half + 4 * q + b] = t.x[g][8 * q + 4 * half + b];
      }
  }
  int c[16][kTokens] = {};
  m.add_to(c);
  CHECK(equal(c, t));
}

TEST_CASE("T16 INT8: mma.m16n8k16, two k-steps out of one load") {
  const Tile t(DType::INT8, 10);
  int c[16][kTokens] = {};
  for (int i = 0; i < 2; i++) {
    Mma<16> m;
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane >> 2, q = lane & 3;
      for (int b = 0; b < 4; b++) {  // bytes 0 1: columns 2q, 2q+1; bytes 2 3: columns 2q+8, 2q+9
        const int to = 2 * q + (b & 1) + (b & 2 ? 8 : 0);
        for (int h = 0; h < 2; h++) m.a[g + 8 * h][to] = byte_of(t.word(lane, 2 * h + i), b) - 128;
        m.b[g][to] = t.x[g][8 * q + 4 * i + b];
      }
    }
    m.add_to(c);
  }
  CHECK(equal(c, t));
}

TEST_CASE("T16 INT8: VNNI lines and AMX rows") {
  const Tile t(DType::INT8, 11);
  int y[16][kTokens] = {};
  for (int n = 0; n < kTokens; n++) {
    int twice[64];
    for (int j = 0; j < 64; j++) twice[j] = t.x[n][8 * (j / 16) + j % 8];
    for (int g = 0; g < 8; g++) {
      int acc[16] = {};
      for (int j = 0; j < 64; j++) acc[j / 4] -= 128 * twice[j];
      dpbusd(acc, t.bytes + 64 * g, twice);
      for (int j = 0; j < 16; j++) y[g + (j & 2 ? 8 : 0)][n] += acc[j];
    }
  }
  CHECK(equal(y, t));
  for (int g = 0; g < 8; g++)
    for (int h = 0; h < 2; h++)
      for (int l = 0; l < 4; l++) CHECK(std::memcmp(t.bytes + 64 * g + 16 * l + 8 * h, &t.codes[(g + 8 * h) * 64 + 8 * l], 8) == 0);
}

TEST_CASE("write_panel and read_panel are inverse; decode_row is (code - zero) * scale, over several panels") {
  std::mt19937 rng(12);
  for (const DType type : {DType::INT4, DType::INT8})
    for (const int group : {32, 64, 128})
      for (const int64_t k : {32, 64, 96, 128, 160, 384}) {
        const int64_t kp = round_up(k, 64), n = 37;  // the last panel has 11 rows of padding
        if (k % group) continue;
        CAPTURE(group);
        CAPTURE(k);
        std::vector<std::vector<uint8_t>> codes;
        std::vector<std::vector<uint16_t>> scales;
        std::vector<uint8_t> w(t16_bytes(type, n, k, group));
        const int64_t panel = t16_panel_bytes(type, k, group);
        REQUIRE(static_cast<int64_t>(w.size()) == 3 * panel);
        int wrong = 0;
        for (int p = 0; p < 3; p++) {
          auto& c = codes.emplace_back(16 * kp);
          auto& s = scales.emplace_back(kp / group * 16);
          for (uint8_t& v : c) v = static_cast<uint8_t>(type == DType::INT4 ? rng() % 16 : 1 + rng() % 255);
          for (uint16_t& v : s) v = float_to_half(static_cast<float>(rng() % 2001) / 1000.0f - 1.0f);
          write_panel(type, k, group, c.data(), s.data(), w.data() + p * panel);
          std::vector<uint8_t> c2(c.size());
          std::vector<uint16_t> s2(s.size());
          read_panel(type, k, group, w.data() + p * panel, c2.data(), s2.data());
          wrong += c2 != c || s2 != s;
        }
        std::vector<float> row(k);
        for (int64_t r = 0; r < n; r++) {
          decode_row(weight(w.data(), type, n, k, group), r, row);
          for (int64_t i = 0; i < k; i++) {
            const int code = codes[r / 16][r % 16 * kp + i] - (type == DType::INT4 ? 8 : 128);
            wrong += row[i] != static_cast<float>(code) * half_to_float(scales[r / 16][i / group * 16 + r % 16]);
          }
        }
        CHECK(wrong == 0);
      }
}

TEST_CASE("decode_row: row-major formats, column slices, and contracts") {
  std::vector<float> f(3 * 5);
  std::vector<uint16_t> h(3 * 5);
  for (size_t i = 0; i < f.size(); i++) h[i] = float_to_bf16(f[i] = static_cast<float>(i) - 4.5f);
  std::vector<float> row(5), two(2);
  decode_row(weight(f.data(), DType::F32, 3, 5), 2, row);
  CHECK(row == std::vector<float>{5.5f, 6.5f, 7.5f, 8.5f, 9.5f});
  decode_row(weight(h.data(), DType::BF16, 3, 5), 1, row);
  CHECK(row == std::vector<float>{0.5f, 1.5f, 2.5f, 3.5f, 4.5f});
  decode_row(weight(h.data(), DType::BF16, 3, 5).columns(3, 2), 1, two);
  CHECK(two == std::vector<float>{3.5f, 4.5f});
  CHECK_THROWS_AS(decode_row(weight(f.data(), DType::F32, 3, 5), 3, row), Bug);
  CHECK_THROWS_AS(decode_row(weight(f.data(), DType::F32, 3, 5), 0, two), Bug);
  CHECK_THROWS_AS(decode_row(weight(f.data(), DType::I32, 3, 5), 0, row), Bug);
}

TEST_CASE("gate and up rows interleave by 8") {
  const int64_t f = 24;
  std::vector<int> seen(2 * f);
  for (int64_t r = 0; r < f; r++) {
    CHECK(interleave_row(r, f) == r / 8 * 16 + r % 8);          // gate: rows 0..7 of panel r / 8
    CHECK(interleave_row(f + r, f) == interleave_row(r, f) + 8);  // its up row: rows 8..15 of the same panel
    seen[interleave_row(r, f)]++;
    seen[interleave_row(f + r, f)]++;
  }
  CHECK(seen == std::vector<int>(2 * f, 1));
}

TEST_CASE("expert records: gate_up, down, whole pages") {
  CHECK(expert_layout(DType::INT4, 2048, 512, 128).down_offset == 64 * (16 * 16 * 2 + 32 * 512));
  CHECK(expert_layout(DType::INT4, 2048, 512, 128).bytes == 396 * 4096);
  const ExpertLayout b = expert_layout(DType::BF16, 64, 24, 0);
  CHECK(b.down_offset == 2 * 24 * 64 * 2);
  CHECK(b.bytes == 3 * 24 * 64 * 2);
  CHECK(b.stride == 12288);
}

// ---- activations --------------------------------------------------------------------------------------------------------

TEST_CASE("round_act: bf16 and f32") {
  std::vector<float> x{1.0f, 1.00390625f, 1.01171875f, -1.00390625f, 3.14159265f, -0.0f}, y = x;
  round_act(Act::F32, y);
  CHECK(y == x);
  round_act(Act::BF16, y);
  CHECK(y == std::vector<float>{1.0f, 1.0f, 1.015625f, -1.0f, 3.140625f, -0.0f});
}

TEST_CASE("round_act: int8 takes the largest of each 128, nearest even, short last group") {
  std::vector<float> x(128 + 128 + 5, 0.0f);
  x[0] = -127.0f;  // scale 1
  x[1] = 0.5f, x[2] = 1.5f, x[3] = 2.5f, x[4] = -0.5f, x[5] = -1.5f, x[6] = 1.4999f, x[127] = 126.7f;
  // second group: all zero
  x[256] = 254.0f, x[257] = 3.1f, x[260] = -1.0f;  // scale 2
  std::vector<int8_t> codes(x.size());
  std::vector<float> scales(3);
  quantize_act(x, codes, scales);
  CHECK(scales == std::vector<float>{1.0f, 0.0f, 2.0f});
  CHECK(codes[0] == -127);
  CHECK(std::vector<int>{codes[1], codes[2], codes[3], codes[4], codes[5], codes[6]} == std::vector<int>{0, 2, 2, 0, -2, 1});
  CHECK(codes[127] == 127);
  CHECK(codes[256] == 127);
  CHECK(codes[257] == 2);
  CHECK(codes[260] == 0);  // -0.5: to even
  std::vector<float> y = x;
  round_act(Act::INT8, y);
  int wrong = 0;
  for (size_t i = 0; i < x.size(); i++) wrong += y[i] != static_cast<float>(codes[i]) * scales[i / 128];
  CHECK(wrong == 0);
}

TEST_CASE("round_act: int8 against its definition on random values of all sizes") {
  std::mt19937 rng(13);
  std::normal_distribution<float> normal;
  int wrong = 0;
  for (int power = -140; power <= 120; power += 13) {
    std::vector<float> x(300);
    for (float& v : x) v = std::ldexp(normal(rng), power);
    std::vector<float> y = x;
    round_act(Act::INT8, y);
    for (size_t begin = 0; begin < x.size(); begin += 128) {
      const size_t end = std::min<size_t>(begin + 128, x.size());
      float largest = 0;
      for (size_t i = begin; i < end; i++) largest = std::max(largest, std::fabs(x[i]));
      volatile float scale = largest / 127.0f;
      for (size_t i = begin; i < end; i++) {
        const float ratio = x[i] / scale;
        float code = std::floor(ratio);  // nearest even, spelled out
        const float rest = ratio - code;
        if (rest > 0.5f || (rest == 0.5f && std::fmod(code, 2.0f) != 0)) code += 1;
        code = std::min(127.0f, std::max(-127.0f, code));
        wrong += y[i] != code * scale;
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("round_act: int8 with numbers at the edge") {
  std::vector<float> x(128, 0.0f);
  x[3] = 1e-45f;  // its scale is zero
  round_act(Act::INT8, x);
  CHECK(x == std::vector<float>(128, 0.0f));
  for (const float bad : {INFINITY, -INFINITY, NAN}) {  // never a number out of nowhere: the damage stays visible
    std::vector<float> z(256, 1.0f);
    z[5] = bad;
    round_act(Act::INT8, z);
    CHECK(std::isnan(z[5]));
    CHECK(z[200] == 1.0f);
  }
}

// ---- rows of an INT8 KV cache

static std::vector<float> through_cache(const std::vector<float>& x) {
  std::vector<int8_t> codes(x.size(), 99);
  std::vector<uint16_t> scales(static_cast<size_t>(kv_groups(static_cast<int64_t>(x.size()))), 0x1234);
  quantize_kv(x, codes.data(), scales.data());
  std::vector<float> y;
  for (size_t i = 0; i < x.size(); i++) y.push_back(codes[i] * half_to_float(scales[i / 128]));
  return y;
}

TEST_CASE("INT8 cache rows: what codes can say comes back exactly; zeros are zeros; each started 128 has a scale of its own") {
  for (size_t width : {32, 128, 160, 256}) {
    std::vector<float> x(width);
    for (size_t i = 0; i < width; i++) x[i] = static_cast<float>(static_cast<int>(i * 37 % 255) - 127) * (i < 128 ? 0.0625f : 24.f);
    x[0] = -127 * 0.0625f;
    if (width > 128) x[128] = 127 * 24.f;
    CHECK(through_cache(x) == x);
  }
  std::vector<float> x(256, 0.f);
  x[3] = -0.f, x[200] = 5;
  std::vector<int8_t> codes(256, 99);
  std::vector<uint16_t> scales(2, 99);
  quantize_kv(x, codes.data(), scales.data());
  CHECK(scales == std::vector<uint16_t>{0, float_to_half(5 / 127.f)});
  for (size_t i = 0; i < 256; i++) REQUIRE(codes[i] == (i == 200 ? 127 : 0));
  // ties to even, of the scale as it was rounded: 127 / 127
  std::vector<float> t(32);
  t[0] = 127, t[1] = 0.5f, t[2] = 1.5f, t[3] = 2.5f, t[4] = -0.5f, t[5] = -1.5f, t[6] = 1.4999f;
  CHECK(through_cache(t) == std::vector<float>{127, 0, 2, 2, 0, -2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
}

TEST_CASE("INT8 cache rows: against the definition, of all sizes; nothing is more than half a scale away") {
  std::mt19937 rng(17);
  std::normal_distribution<float> normal;
  int wrong = 0, far = 0;
  for (int power = -40; power <= 20; power++) {
    std::vector<float> x(160);
    for (float& v : x) v = std::ldexp(normal(rng), power);
    const std::vector<float> y = through_cache(x);
    for (size_t begin = 0; begin < x.size(); begin += 128) {
      const size_t end = std::min<size_t>(begin + 128, x.size());
      double largest = 0;
      for (size_t i = begin; i < end; i++) largest = std::max(largest, std::fabs(static_cast<double>(x[i])));
      double scale = half_to_float(float_to_half(static_cast<float>(largest) / 127.f));
      if (largest / 127 < std::ldexp(1, -14) && largest >= 127.5 * scale) scale += std::ldexp(1, -24);  // the next of the coarse ones
      for (size_t i = begin; i < end; i++) {
        wrong += y[i] != std::nearbyint(static_cast<float>(x[i] / scale)) * scale;
        far += std::fabs(static_cast<double>(x[i]) - y[i]) > scale * (0.5 + 1e-5);
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(far == 0);
  int beyond = 0;  // the largest value of every scale there is, and its neighbours
  for (uint16_t h = 1; h < 0x7c00; h++)
    for (float factor : {126.5f, 127.f, 127.5f})
      for (uint32_t bits = float_to_bits(half_to_float(h) * factor) - 2, i = 0; i < 5; i++) {
        const float most = bits_to_float(bits + i), scale = half_to_float(kv_scale(bits + i));
        const int code = kv_code(most, scale), other = kv_code(-most, scale);
        beyond += std::isfinite(scale) && (code > 127 || code < (h < 0x400 ? 1 : 127) || other != -code);
      }
  CHECK(beyond == 0);
}

TEST_CASE("INT8 cache rows: NaN, infinity and what is too large stay visible, in their own 128 alone") {
  for (const float bad : {NAN, -NAN, INFINITY, -INFINITY, 1e7f, -3e38f}) {
    std::vector<float> x(256, 1.f);
    x[5] = bad;
    const std::vector<float> y = through_cache(x);
    for (size_t i = 0; i < 128; i++) REQUIRE(std::isnan(y[i]));
    for (size_t i = 128; i < 256; i++) REQUIRE(std::fabs(y[i] - 1) < 1e-3f);
  }
  std::vector<float> x(128, 1e4f);
  x[0] = 127 * 65504.f;
  CHECK(through_cache(x)[0] == x[0]);
}

// What a matrix of ldmatrix is made of: 8 rows of 16 bytes. Without transposition lane 4g + t gets bytes 4t..4t+3 of row g; with it, the
// 16-bit values at column g of rows 2t and 2t+1. Even and odd bytes are two operands each.
TEST_CASE("INT8 cache rows: mma.m16n8k16 from ldmatrix of codes, keys as they lie and values transposed") {
  std::mt19937 rng(19);
  int8_t rows[16][16];  // 16 keys, 16 dims
  int q[16][16], p[16][16];  // A of keys: (16 rows, 16 dims); of values: (16 rows, 16 keys)
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      rows[i][j] = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
      q[i][j] = static_cast<int>(rng() % 255) - 127, p[i][j] = static_cast<int>(rng() % 255) - 127;
    }
  Mma<16> keys, values[2];  // values: n tiles of the even and of the odd dims
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane >> 2, t = lane & 3;
    for (int b = 0; b < 4; b++) {
      const int to = 2 * t + (b >> 1);  // even bytes first, odd ones in columns from 8 on
      keys.b[g][to + 8 * (b & 1)] = rows[g][4 * t + b];
      for (int h = 0; h < 2; h++) {
        keys.a[g + 8 * h][to + 8 * (b & 1)] = q[g + 8 * h][4 * t + b];
        values[b & 1].b[g][to + 8 * h] = rows[8 * h + 2 * t + (b >> 1)][2 * g + (b & 1)];  // h: keys 0..7, 8..15
      }
    }
  }
  int scores[16][kTokens] = {}, sums[2][16][kTokens] = {}, wrong = 0;
  keys.add_to(scores);
  for (int odd = 0; odd < 2; odd++) {
    std::memcpy(values[odd].a, p, sizeof p);
    values[odd].add_to(sums[odd]);
  }
  for (int r = 0; r < 16; r++) {
    for (int key = 0; key < 8; key++) {
      int want = 0;
      for (int i = 0; i < 16; i++) want += q[r][i] * rows[key][i];
      wrong += scores[r][key] != want;
    }
    for (int dim = 0; dim < 16; dim++) {
      int want = 0;
      for (int key = 0; key < 16; key++) want += p[r][key] * rows[key][dim];
      wrong += sums[dim & 1][r][dim >> 1] != want;
    }
  }
  CHECK(wrong == 0);
  for (int code = -127; code <= 127; code++) {  // bits of a code -> BF16, with one subtraction that rounds nothing
    const auto c = static_cast<uint8_t>(code);
    const float a = bf16_to_float(static_cast<uint16_t>(0x4300 | (c & 127))), b = bf16_to_float(static_cast<uint16_t>(0x4300 | (c & 128)));
    CHECK(a - b == static_cast<float>(code));
    CHECK(round_bf16(a - b) == a - b);
  }
}
