// Grouped-query attention with a KV cache (model-spec 3.8, without the gate).
//
// The unit of work is a pair (token, KV head) and one block of kKeys keys: all query heads of the group pass over the block
// together, so K and V are read once. A block yields its largest score, its sum of exponentials and its weighted sum of V; the
// blocks of a pair are merged in order. Block boundaries are multiples of kKeys from position 0, so a row's bits depend neither
// on the number of tokens nor on that of threads. With few pairs (decode) blocks are shared out, else whole pairs are.
#include <cmath>
#include <cstring>

#include "ggml-lite/core/codec.h"
#include "ggml-lite/cpu/cpu_device.h"

namespace qn::cpu {

struct CpuDevice::AttentionCall {
  int64_t tokens, heads, group, width, part;  // query heads in all and per KV head; floats of one partial result
  Rows q;                                     // (T, H * DH) normed, rotated, scaled
};

static void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float lo = x[i], hi = x[i + half];
    x[i] = lo * cosines[i] - hi * sines[i];
    x[i + half] = hi * cosines[i] + lo * sines[i];
  }
}

// The scales of a position: of the caches of codes; null for the others
static uint16_t* scales_at(const Tensor& scales, int64_t head, int64_t pos) {
  return scales ? scales.bf16(head) + pos * scales.shape[2] : nullptr;
}

static void append(const Tensor& cache, const Tensor& scales, int64_t head, int64_t pos, const float* x) {
  const int64_t width = cache.shape[2];
  if (cache.dtype == DType::I8) {
    quantize_kv({x, static_cast<size_t>(width)}, cache.i8(head) + pos * width, scales_at(scales, head, pos));
  } else if (cache.dtype == DType::F32) {
    std::memcpy(cache.f32(head) + pos * width, x, width * 4);
  } else {
    uint16_t* to = cache.bf16(head) + pos * width;
    for (int64_t i = 0; i < width; i++) to[i] = float_to_bf16(x[i]);
  }
}

static const void* key_row(const Tensor& cache, int64_t head, int64_t pos) {
  return cache.bytes() + (head * cache.row_stride + pos * cache.shape[2]) * item_bytes(cache.dtype);
}

// Keys [first, first + kKeys) or what there is of them, for token t and KV head g
Attend CpuDevice::block(const AttentionArgs& a, const AttentionCall& c, int64_t t, int64_t g, int64_t first, float* scores,
                        float* part) {
  Attend b;
  b.q = reinterpret_cast<const float*>(c.q[t]) + g * c.group * c.width;
  b.k = key_row(a.k_cache, g, first), b.v = key_row(a.v_cache, g, first), b.cache = a.k_cache.dtype;
  b.k_scales = scales_at(a.k_scales, g, first), b.v_scales = scales_at(a.v_scales, g, first);
  b.heads = static_cast<int>(c.group), b.width = static_cast<int>(c.width), b.groups = static_cast<int>(kv_groups(c.width));
  b.keys = static_cast<int>(std::min<int64_t>(kKeys, a.step->pos + t + 1 - first));
  b.scores = scores, b.part = part;
  return b;
}

// Norm and RoPE of queries and keys; keys and values go to the cache. Items are the heads of all tokens.
void CpuDevice::append_and_rotate(const AttentionArgs& a, AttentionCall& c, int thread) {
  const int64_t heads = a.heads, kv = a.kv_heads, width = c.width, half = a.inv_freq.rows(), per_token = heads + 2 * kv;
  float *cosines = local(thread), *sines = cosines + half, *key = sines + half;
  const Range mine = share(c.tokens * per_token, thread, threads_.size());
  int64_t angles_of = -1;
  for (int64_t item = mine.begin; item < mine.end; item++) {
    const int64_t t = item / per_token, j = item % per_token, pos = a.step->pos + t;
    if (t != angles_of) {  // in double: positions reach a million
      for (int64_t i = 0; i < half; i++) {
        const double phi = static_cast<double>(pos) * a.inv_freq.f32()[i];
        cosines[i] = static_cast<float>(std::cos(phi)) * a.rope_scale;
        sines[i] = static_cast<float>(std::sin(phi)) * a.rope_scale;
      }
      angles_of = t;
    }
    const float* row = a.qgkv.f32(t);
    if (j < heads) {
      float* q = reinterpret_cast<float*>(c.q[t]) + j * width;
      norm(row + j * width, a.q_norm, a.eps, width, q);
      rotate(q, cosines, sines, half);
      kernels_.scale(q, nullptr, 1.f / std::sqrt(static_cast<float>(width)), width, q);
    } else if (j < heads + kv) {
      norm(row + (heads + j) * width, a.k_norm, a.eps, width, key);
      rotate(key, cosines, sines, half);
      append(a.k_cache, a.k_scales, j - heads, pos, key);
    } else {
      append(a.v_cache, a.v_scales, j - heads - kv, pos, row + (heads + j) * width);
    }
  }
}

// Whole pairs, one block after the other
void CpuDevice::attend_pairs(const AttentionArgs& a, AttentionCall& c, int thread) {
  float *total = local(thread), *part = total + c.part, *scores = part + c.part;
  for (int64_t pair; (pair = threads_.next_task()) < c.tokens * a.kv_heads;) {
    const int64_t t = pair / a.kv_heads, g = pair % a.kv_heads, keys = a.step->pos + t + 1;
    for (int64_t begin = 0; begin < keys; begin += kKeys) {
      kernels_.attend(block(a, c, t, g, begin, scores, begin ? part : total));
      for (int64_t h = 0; begin && h < c.group; h++)
        kernels_.merge(total + h * (c.width + kPartExtra), part + h * (c.width + kPartExtra), static_cast<int>(c.width));
    }
    for (int64_t h = 0; h < c.group; h++) {
      const float* v = total + h * (c.width + kPartExtra);
      kernels_.scale(v, nullptr, 1.f / v[c.width + 1], c.width, a.o.f32(t) + (g * c.group + h) * c.width);
    }
  }
}

// Blocks of as many pairs at a time as the scratch holds, then merged head by head
void CpuDevice::attend_blocks(const AttentionArgs& a, AttentionCall& c, int thread) {
  const int64_t pairs = c.tokens * a.kv_heads, blocks = (a.step->pos + c.tokens - 1) / kKeys + 1;
  const int64_t round = std::min(pairs, parts_floats_ / (blocks * c.part));
  for (int64_t begin = 0; begin < pairs; begin += round) {
    const int64_t now = std::min(round, pairs - begin);
    for (int64_t task; (task = threads_.next_task()) < now * blocks;) {
      const int64_t pair = begin + task / blocks, t = pair / a.kv_heads, g = pair % a.kv_heads;
      const int64_t first = task % blocks * kKeys;
      if (first <= a.step->pos + t) kernels_.attend(block(a, c, t, g, first, local(thread), parts_ + task * c.part));
    }
    threads_.barrier(thread);
    if (thread == 0) threads_.reset_tasks();
    const Range mine = share(now * c.group, thread, threads_.size());
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const int64_t pair = begin + i / c.group, h = i % c.group, t = pair / a.kv_heads, g = pair % a.kv_heads;
      float* total = parts_ + i / c.group * blocks * c.part + h * (c.width + kPartExtra);
      for (int64_t b = 1; b * kKeys <= a.step->pos + t; b++) kernels_.merge(total, total + b * c.part, static_cast<int>(c.width));
      kernels_.scale(total, nullptr, 1.f / total[c.width + 1], c.width, a.o.f32(t) + (g * c.group + h) * c.width);
    }
    threads_.barrier(thread);
  }
}

void CpuDevice::do_attention(const AttentionArgs& a) {
  AttentionCall c;
  c.tokens = a.qgkv.rows(), c.heads = a.heads, c.group = a.heads / a.kv_heads, c.width = a.q_norm.rows();
  c.part = c.group * (c.width + kPartExtra);
  const int64_t end = a.step->pos + c.tokens;
  QN_CHECK(a.step->pos >= 0 && end <= a.k_cache.shape[1], "attention: positions to %lld, cache %lld", static_cast<long long>(end),
           static_cast<long long>(a.k_cache.shape[1]));
  check_local("attention", std::max(2 * c.part + c.group * kKeys, 3 * c.width));
  reset_scratch();
  c.q = take_rows(c.tokens, a.heads * c.width * 4);
  const int64_t blocks = (end - 1) / kKeys + 1, pairs = c.tokens * a.kv_heads;
  const bool by_block = blocks > 1 && threads_.size() > 1 && pairs < 2 * threads_.size() && blocks * c.part <= parts_floats_;
  threads_.run([&](int thread) {
    append_and_rotate(a, c, thread);
    threads_.barrier(thread);
    if (by_block) attend_blocks(a, c, thread);
    else attend_pairs(a, c, thread);
  });
}

}  // namespace qn::cpu
