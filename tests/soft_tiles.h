// What ggml-lite/cpu/tiles.h has, without AMX. Rows and bytes count as the shapes say, and operands that do not fit each other end the program.
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace qn::cpu {
namespace {

thread_local Shapes shapes;
thread_local bool configured = false;
alignas(64) thread_local uint8_t tiles[8][16][64];

void must(bool ok) {
  if (!ok) std::abort();  // where the processor would raise a fault
}
void set_shapes(const Shapes& s) { shapes = s, configured = true, std::memset(tiles, 0, sizeof tiles); }
void release_tiles() { configured = false; }
template <int Tile>
void clear() {
  must(configured);
  std::memset(tiles[Tile], 0, 1024);
}
template <int Tile>
void load_tile(const void* p, int64_t stride) {
  clear<Tile>();
  for (int r = 0; r < shapes.rows[Tile]; r++) std::memcpy(tiles[Tile][r], static_cast<const uint8_t*>(p) + r * stride, shapes.row_bytes[Tile]);
}
template <int Tile>
void store_tile(void* p, int64_t stride) {
  must(configured);
  for (int r = 0; r < shapes.rows[Tile]; r++) std::memcpy(static_cast<uint8_t*>(p) + r * stride, tiles[Tile][r], shapes.row_bytes[Tile]);
}
template <int C, int A, int B>
void multiply_tiles() {
  must(configured && shapes.rows[C] == shapes.rows[A] && shapes.row_bytes[A] == 4 * shapes.rows[B] && shapes.row_bytes[C] == shapes.row_bytes[B]);
  const __m512i offset = _mm512_set1_epi8(-128);  // signed bytes as vpdpbusd takes them: a + 128
  for (int m = 0; m < shapes.rows[C]; m++) {
    __m512i sum = _mm512_load_si512(tiles[C][m]), of_offset = _mm512_setzero_si512();
    for (int k = 0; k < shapes.rows[B]; k++) {
      int32_t four;
      std::memcpy(&four, tiles[A][m] + 4 * k, 4);
      const __m512i b = _mm512_load_si512(tiles[B][k]);
      sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(_mm512_set1_epi32(four), offset), b);
      of_offset = _mm512_dpbusd_epi32(of_offset, offset, b);
    }
    _mm512_store_si512(tiles[C][m], _mm512_sub_epi32(sum, of_offset));
  }
}

}  // namespace
}  // namespace qn::cpu
