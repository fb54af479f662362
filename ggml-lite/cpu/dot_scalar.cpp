// The kernels without any instruction set: lanes of one float. Slow and portable. Quantised activations are rounded and then
// meet the weights as fp32 (Form::F32), which needs no kernels of its own.
#include <cmath>

#include "ggml-lite/core/blocks.h"
#include "ggml-lite/cpu/kernels.h"

namespace qn::cpu {
namespace {

using F = float;
constexpr int L = 1, kRows = 1, kTokens = 2, kChains = 4;

F zero() { return 0; }
F all(float x) { return x; }
F load(const float* p) { return *p; }
F load(const uint16_t* p) { return bf16_to_float(*p); }
F load(const int8_t* p) { return *p; }
F all_half(const uint16_t* p) { return half_to_float(*p); }
void store(float* p, F v) { *p = v; }
F fma(F a, F b, F c) { return a * b + c; }
F add(F a, F b) { return a + b; }
F sub(F a, F b) { return a - b; }
F mul(F a, F b) { return a * b; }
F divide(F a, F b) { return a / b; }
F larger(F a, F b) { return a > b ? a : b; }
F absolute(F v) { return std::fabs(v); }
float sum(F v) { return v; }
float largest(F v) { return v; }
template <int N>
void sums(const F (&v)[N], float* out) {
  for (int i = 0; i < N; i++) out[i] = v[i];
}
F exponent(F v) { return std::exp(v); }
void to_bf16(uint16_t* p, F v) { *p = float_to_bf16(v); }
void to_int8(int8_t* p, F v) { *p = static_cast<int8_t>(std::fmin(std::fmax(std::nearbyint(v), -127.0f), 127.0f)); }
int32_t sum32(const int8_t* p) {
  int32_t s = 0;
  for (int i = 0; i < 32; i++) s += p[i];
  return s;
}
void halves(const uint8_t* p, float* out) {
  for (int i = 0; i < 16; i++) out[i] = half_to_float(static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8));
}
void codes4(const uint8_t* p, F* out) {
  for (int i = 0; i < 8; i++) {
    out[i] = static_cast<float>((p[i] & 15) - 8);
    out[8 + i] = static_cast<float>((p[i] >> 4) - 8);
  }
}
void codes8(const uint8_t* p, F* out) {
  for (int i = 0; i < 8; i++) {
    out[i] = static_cast<float>(p[i] - 128);
    out[8 + i] = static_cast<float>(p[16 + i] - 128);
  }
}

}  // namespace
}  // namespace qn::cpu

#include "ggml-lite/cpu/generic.h"

namespace qn::cpu {
namespace {

uint64_t read(const uint8_t* p, int64_t bytes) {
  uint64_t s[4] = {};
  const uint64_t* q = reinterpret_cast<const uint64_t*>(p);
  for (int64_t i = 0; i < bytes / 8; i += 4)
    for (int j = 0; j < 4; j++) s[j] += q[i + j];
  return s[0] + s[1] + s[2] + s[3];
}

}  // namespace

const Kernels* scalar_kernels() {
  static constexpr Kernels kernels = [] {
    Kernels k = generic_kernels("scalar");
    k.read = read;
    return k;
  }();
  return &kernels;
}

}  // namespace qn::cpu
