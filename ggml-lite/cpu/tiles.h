// The instructions of AMX; dot_amx.cpp includes this behind Shapes. As generic.h, everything is in an anonymous namespace.
#include <cstdint>

namespace qn::cpu {
namespace {

// Instructions by name: the intrinsics of g++ 12 do not say that they read and write memory.
void set_shapes(const Shapes& s) { asm volatile("ldtilecfg %0" ::"m"(s) : "memory"); }
void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int Tile>
[[gnu::always_inline]] inline void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
[[gnu::always_inline]] inline void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
[[gnu::always_inline]] inline void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int C, int A, int B>
[[gnu::always_inline]] inline void multiply_tiles() {  // C += A B, signed bytes
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace qn::cpu
