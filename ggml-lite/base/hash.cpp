#include "ggml-lite/base/hash.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace qn {

namespace {

constexpr uint32_t kPoly = 0x82F63B78;

// t[i][b]: what byte b does to the register when i more zero bytes follow it (slicing by 8).
struct Tables {
  uint32_t t[8][256];
};

constexpr Tables make_tables() {
  Tables r{};
  for (uint32_t b = 0; b < 256; b++) {
    uint32_t c = b;
    for (int i = 0; i < 8; i++) c = (c >> 1) ^ (c & 1 ? kPoly : 0);
    r.t[0][b] = c;
  }
  for (int i = 1; i < 8; i++)
    for (int b = 0; b < 256; b++) r.t[i][b] = (r.t[i - 1][b] >> 8) ^ r.t[0][r.t[i - 1][b] & 255];
  return r;
}
constexpr Tables kTables = make_tables();

uint64_t load64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

// c is the bare register here: the inversions before and after are done by crc32c().
uint32_t update_table(uint32_t c, const uint8_t* p, size_t n) {
  const auto& t = kTables.t;
  for (; n >= 8; n -= 8, p += 8) {
    const uint64_t v = load64(p) ^ c;
    c = 0;
    for (int i = 0; i < 8; i++) c ^= t[7 - i][(v >> (8 * i)) & 255];
  }
  for (; n; n--) c = (c >> 8) ^ t[0][(c ^ *p++) & 255];
  return c;
}

#if defined(__x86_64__)
// The instruction takes 8 bytes a cycle but answers after three cycles, so three stretches of kStretch bytes run side by side.
// The register is linear over GF(2): crc(a|b) = shift(crc(a)) ^ crc from 0 of b, shift being "kStretch zero bytes follow".
constexpr size_t kStretch = 4096;  // longer ones gain little; with shorter ones the prefetcher loses the three streams

using Shift = std::array<std::array<uint32_t, 256>, 4>;  // [i][b]: shift of b << 8i

Shift make_shift() {
  const uint8_t zeros[kStretch] = {};
  Shift s{};
  for (int i = 0; i < 4; i++)
    for (uint32_t bit = 1; bit < 256; bit *= 2) {
      const uint32_t one = update_table(bit << (8 * i), zeros, kStretch);
      for (uint32_t b = 0; b < 256; b++)
        if (b & bit) s[i][b] ^= one;
    }
  return s;
}

[[gnu::target("sse4.2")]] uint32_t update_sse42(uint32_t crc, const uint8_t* p, size_t n) {
  static const Shift s = make_shift();
  const auto shift = [](uint64_t v) {
    return s[0][v & 255] ^ s[1][(v >> 8) & 255] ^ s[2][(v >> 16) & 255] ^ s[3][(v >> 24) & 255];
  };
  uint64_t a = crc;
  for (; n >= 3 * kStretch; n -= 3 * kStretch, p += 3 * kStretch) {
    uint64_t b = 0, c = 0;
    for (size_t i = 0; i < kStretch; i += 8) {
      a = _mm_crc32_u64(a, load64(p + i));
      b = _mm_crc32_u64(b, load64(p + kStretch + i));
      c = _mm_crc32_u64(c, load64(p + 2 * kStretch + i));
    }
    a = shift(shift(a) ^ b) ^ c;
  }
  for (; n >= 8; n -= 8, p += 8) a = _mm_crc32_u64(a, load64(p));
  for (; n; n--) a = _mm_crc32_u8(static_cast<uint32_t>(a), *p++);
  return static_cast<uint32_t>(a);
}
#endif

}  // namespace

uint32_t crc32c(std::span<const uint8_t> bytes, uint32_t crc) {
#if defined(__x86_64__)
  static const bool fast = __builtin_cpu_supports("sse4.2");
  if (fast) return ~update_sse42(~crc, bytes.data(), bytes.size());
#endif
  return crc32c_portable(bytes, crc);
}

uint32_t crc32c_portable(std::span<const uint8_t> bytes, uint32_t crc) {
  return ~update_table(~crc, bytes.data(), bytes.size());
}

uint64_t fnv1a64(std::string_view bytes, uint64_t seed) {
  for (const char c : bytes) seed = (seed ^ static_cast<uint8_t>(c)) * 0x100000001b3ull;
  return seed;
}

}  // namespace qn
