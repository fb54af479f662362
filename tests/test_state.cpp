// The memory of a sequence: checkpoints restore exactly what was there, whichever were dropped to make room.
#include <doctest/doctest.h>

#include <algorithm>

#include "ggml-lite/nn/hybrid_state.h"
#include "ggml-lite/ref/ref.h"

using namespace qn;

static StateShape shape() {
  StateShape s;
  s.attention = {false, true, false};
  s.key_heads = 1, s.value_heads = 2, s.key_dim = 32, s.value_dim = 32;
  s.kv_heads = 1, s.head_dim = 32, s.context = 100, s.kv_type = DType::F32;
  s.tail = 5;
  return s;
}

// What the recurrent part looks like at a position
static void write(HybridState& s, int position) {
  for (int layer : {0, 2}) {
    const Tensor d = s.delta(layer), ring = s.conv_ring(layer);
    std::fill_n(d.f32(), 2 * 32 * 32, static_cast<float>(position + layer));
    std::fill_n(ring.f32(), 4 * ring.cols(), static_cast<float>(position + layer + 1));
  }
  std::fill_n(s.tail(), 5, static_cast<float>(-position));
}
static void check(HybridState& s, int position) {
  CAPTURE(position);
  for (int layer : {0, 2}) {
    const float* d = s.delta(layer).f32();
    const Tensor ring = s.conv_ring(layer);
    CHECK(std::all_of(d, d + 2 * 32 * 32, [&](float v) { return v == (position ? static_cast<float>(position + layer) : 0.f); }));
    CHECK(std::all_of(ring.f32(), ring.f32() + 4 * ring.cols(), [&](float v) { return v == (position ? static_cast<float>(position + layer + 1) : 0.f); }));
  }
  CHECK(std::all_of(s.tail(), s.tail() + 5, [&](float v) { return v == (position ? static_cast<float>(-position) : 0.f); }));
}

TEST_CASE("every checkpoint that is kept restores its position") {
  const auto device = make_ref_device();
  HybridState s(*device, shape(), 0);  // room for three
  for (int p : {10, 20, 21, 22, 50, 60, 61}) {
    write(s, p);
    s.checkpoint(p);
    CHECK(s.checkpoints().size() <= 3);
    CHECK(s.checkpoints().back() == p);
  }
  const std::vector<int> kept = s.checkpoints();
  for (auto p = kept.rbegin(); p != kept.rend(); ++p) {
    write(s, 99);
    CHECK(s.restore(*p) == *p);
    check(s, *p);
  }
  write(s, 99);
  CHECK(s.restore(kept.front() - 1) == 0);
  check(s, 0);
  CHECK(s.checkpoints().empty());
}

TEST_CASE("a passing checkpoint is replaced by the next and outlived by the others") {
  const auto device = make_ref_device();
  HybridState s(*device, shape(), 1 << 20);
  write(s, 5), s.checkpoint(5);
  write(s, 7), s.checkpoint(7, true);
  write(s, 9), s.checkpoint(9, true);
  CHECK(s.checkpoints() == std::vector<int>{5, 9});
  write(s, 12);
  CHECK(s.restore(11) == 9);
  check(s, 9);
  CHECK(s.restore(8) == 5);
  check(s, 5);
  s.checkpoint(5);  // again at the same place: nothing new
  CHECK(s.checkpoints() == std::vector<int>{5});
}
