// Asking for weights while others are multiplied (Many). As generic.h, everything is in an anonymous namespace.
#include "ggml-lite/cpu/kernels.h"

namespace qn::cpu {
namespace {

struct Ahead {
  const uint8_t* at;
  const uint8_t* end;
  void ask(int64_t bytes) {
    for (; bytes > 0 && at < end; at += 64, bytes -= 64) __builtin_prefetch(at, 0, 2);
  }
};

}  // namespace
}  // namespace qn::cpu
