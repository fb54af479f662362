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
  HybridState s(*device, shape(), HybridState::checkpoints_kept(shape(), 0));  // three
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
  HybridState s(*device, shape(), HybridState::checkpoints_kept(shape(), 1 << 20));
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

TEST_CASE("a place inside of a pass: settled, or a checkpoint of it; the hash sees only what will be read") {
  const auto device = make_ref_device();
  StateShape with = shape();
  with.logs = true, with.conv_slots = 16;
  const int64_t keys = with.key_heads * 32, width = keys + 2 * 36;
  CHECK(with.log_bytes() == static_cast<uint64_t>(2 * kDeltaLogRows * width * 4));
  HybridState s(*device, with, 3);
  CHECK(s.log(0).cols() == width);
  CHECK(!HybridState(*device, shape(), 3).log(0));
  const std::vector<float> tail = {1, 2, 3, 4, 5};
  const HybridState::Place place{2, {{tail.data(), 2}, {tail.data() + 2, 3}}};
  const auto fill = [&] {  // at 36, before a pass over four tokens
    for (int layer : {0, 2}) {
      std::fill_n(s.delta(layer).f32(), 2 * 32 * 32, 36.f);
      for (int p = 32; p < 40; p++) {  // S <- 2 S + 3 (p + layer) for p = 36 and 37
        float* row = s.log(layer).f32(p % kDeltaLogRows);
        std::fill_n(row, keys, 3.f);
        for (int head = 0; head < 2; head++) std::fill_n(row + keys + head * 36, 32, static_cast<float>(p + layer)), row[keys + head * 36 + 32] = 2;
      }
      for (int p = 24; p < 40; p++) std::fill_n(s.conv_ring(layer).f32(p & 15), s.conv_ring(layer).cols(), static_cast<float>(p));
    }
    std::fill_n(s.tail(), 5, -1.f);
  };
  const auto there = [&] {  // at 38
    for (int layer : {0, 2}) {
      const float* d = s.delta(layer).f32();
      CHECK(std::all_of(d, d + 2 * 32 * 32, [&](float v) { return v == static_cast<float>(2 * (2 * 36 + 3 * (36 + layer)) + 3 * (37 + layer)); }));
    }
    CHECK(std::equal(tail.begin(), tail.end(), s.tail()));
  };
  fill(), s.checkpoint(38, false, &place);
  CHECK(*s.delta(0).f32() == 36.f);  // the state itself is where it was
  s.settle(38, place), there();
  const uint64_t at_38 = s.hash(38);
  fill();
  CHECK(s.restore(39) == 38);
  there();
  CHECK(s.hash(38) == at_38);
  for (int p = 24; p < 40; p++) {
    float& x = *s.conv_ring(2).f32(p & 15);
    x += 1;
    CHECK((s.hash(38) != at_38) == (p >= 35 && p < 38));
    x -= 1;
  }
}

TEST_CASE("an INT8 cache: codes where 16-byte loads may begin, scales behind them, and the hash sees both up to the position") {
  const auto device = make_ref_device();
  StateShape shape_i8 = shape();
  shape_i8.attention = {true, false, true, true};
  shape_i8.kv_heads = 2, shape_i8.head_dim = 160, shape_i8.context = 7, shape_i8.kv_type = DType::I8, shape_i8.lagging = 1;
  CHECK(shape_i8.kv_bytes() == 3 * 2 * 2 * 7 * (160 + 2 * 2));
  HybridState s(*device, shape_i8, 3);
  std::vector<std::pair<uintptr_t, int64_t>> all;  // begin, bytes
  for (int layer : {0, 2, 3}) {
    const KvCache c = s.cache(layer);
    CHECK(c.tensors().size() == 4);
    for (const Tensor& t : c.tensors()) {
      CHECK(t.shape[0] == 2);
      CHECK(t.shape[1] == 7);
      CHECK(t.shape[2] == (t.dtype == DType::I8 ? 160 : 2));
      all.emplace_back(reinterpret_cast<uintptr_t>(t.data), t.shape[0] * t.row_stride * item_bytes(t.dtype));
      CHECK(all.back().first % (t.dtype == DType::I8 ? 16 : 4) == 0);
    }
  }
  std::ranges::sort(all);
  int64_t sum = 0;
  for (size_t i = 0; i < all.size(); i++) {
    sum += all[i].second;
    if (i) CHECK(all[i].first == all[i - 1].first + static_cast<uintptr_t>(all[i - 1].second));
  }
  CHECK(sum == static_cast<int64_t>(shape_i8.kv_bytes()));

  s.randomise(5, 1);
  const uint64_t at_5 = s.hash(5);
  for (int layer : {0, 2, 3})
    for (const Tensor& t : s.cache(layer).tensors())
      for (int64_t p = 0; p < 7; p++) {
        uint8_t* last = static_cast<uint8_t*>(t.slice(1, 1).data) + (p + 1) * t.shape[2] * item_bytes(t.dtype) - 1;  // of head 1, position p
        CHECK((*last != 0) == (p < 5));
        (*last)++;
        CHECK((s.hash(5) != at_5) == (p < (layer == 3 ? 4 : 5)));
        (*last)--;
      }
  CHECK(s.hash(5) == at_5);
  CHECK(shape().kv_bytes() == 1 * 2 * 100 * 32 * 4);
  CHECK(!HybridState(*device, shape(), 3).cache(1).k_scales);
}
