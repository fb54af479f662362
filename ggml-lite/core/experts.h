// Experts of a layer of which only some fit the memory of a device ("slots"); all of them lie in memory of the host. Shared with nvcc.
//
// Steps of at most kPlacedTokens tokens (decode). An operation of the device, place_experts, looks up the chosen experts. Hits are computed
// from their slots. Of the misses the device fetches some over the bus into slots whose experts have been out of use the longest, and
// computes them as well; the others it asks the host for, through a box. No decision waits for the host.
//
//   call: distinct experts in order of their first choice (token by token, best first)
//     1. hits      are used now: last_use = ++clock, one after the other
//     2. misses    the first `fetched_misses(n)` of n go into the slots of the least last_use that this call does not use, as long as there
//                  are any; last_use = ++clock
//     3.           the others are the host's
//
// Which expert is where depends on the experts chosen so far alone, never on timing: the same tokens give the same places.
//
// What a layer will choose shows early: its router, given what the router of the layer before is given, names four of five experts right
// (Qwen3-Next's shape with random weights, and the test model; without that layer's experts and its own mixer, that is). So with what it asks
// for a device tells what it will likely ask for in the next layer, and when the host has answered it brings these experts into its caches
// until the next request is there. That is advice: it changes no place and no number, and may come late or not at all.
//
// Longer calls (prefill) read every expert: the device brings those without a slot into staging memory, a layer ahead of the computation.
// Slots stay as they are.
#pragma once
#include <cstdint>

#include "ggml-lite/core/blocks.h"

namespace qn {

constexpr int kPlacedTokens = 8;

struct ExpertHome {  // pointers to memory of the device, but for what says otherwise
  uint8_t* slots = nullptr;          // S records
  int32_t count = 0;                 // S
  const uint8_t* host = nullptr;     // E records in memory of the host, where the device can read it; null: it cannot
  const uint8_t** at = nullptr;      // (E) the slot of an expert; null: none
  int32_t* slot_of = nullptr;        // (E) -1: none
  int32_t* expert_in = nullptr;      // (S)
  int64_t* last_use = nullptr;       // (S) no two alike
  int64_t* clock = nullptr;          // (1) the largest last_use
  int32_t layer = 0;                 // by which number the host knows these experts
  int32_t fetch_percent = 0;         // of misses
};

// Of n misses, how many the device fetches: a share as the bus is to the host's own reading of its memory, but the first in any case, for
// a cache that never takes anything in is worth nothing.
QN_HD constexpr int fetched_misses(int n, int percent) {
  const int share = (n * percent + 50) / 100;
  return percent <= 0 || n == 0 ? 0 : share > 0 ? share : 1;
}

// What the device asks of the host, and the answer: pinned memory of the host.
//
//   byte 0     request  by the device, when all else is written (release): number of the request, from 1
//   byte 64    done     by the host, when out is written (release): number of the request it has answered
//   byte 128   layer, tokens, pairs
//   then       token (P), expert (P), weight (P): P = kPlacedTokens * K;  x (kPlacedTokens, D), out (kPlacedTokens, D)
//   then       likely  by the device, when the rest is written (release): number of the advice; its layer, how many; 64 bytes on: expert (P)
//
// The next advice may be written while the host reads one: it may find a mixture, so it takes no number for granted.
// One request is under way at a time: the device does not ask again before it has used the answer. Pairs are sorted by nothing; those of
// one expert may lie apart. out[t] = sum over pairs of token t of weight * down(silu(gate) * up), in order of the experts' numbers.
struct ExpertBox {
  uint32_t *request = nullptr, *done = nullptr;
  int32_t *layer = nullptr, *tokens = nullptr, *pairs = nullptr;
  int32_t *token = nullptr, *expert = nullptr;
  float *weight = nullptr, *x = nullptr, *out = nullptr;
  uint32_t* likely = nullptr;
  int32_t *likely_layer = nullptr, *likely_count = nullptr, *likely_expert = nullptr;
  uint32_t* pending = nullptr;  // memory of the device (4): the request whose answer is awaited, 0: none; the last number given; that of advice; blocks that are
                                // done with advice
};
inline int64_t expert_box_bytes(int64_t chosen, int64_t d) { return 192 + kPlacedTokens * (chosen * 16 + d * 8) + 256; }
inline ExpertBox expert_box(void* memory, int64_t chosen, int64_t d, uint32_t* pending) {
  uint8_t* p = static_cast<uint8_t*>(memory);
  const int64_t pairs = kPlacedTokens * chosen, lists = 192 + (pairs * 12 + 63) / 64 * 64;
  ExpertBox b;
  b.request = reinterpret_cast<uint32_t*>(p), b.done = reinterpret_cast<uint32_t*>(p + 64);
  b.layer = reinterpret_cast<int32_t*>(p + 128), b.tokens = b.layer + 1, b.pairs = b.layer + 2;
  b.token = reinterpret_cast<int32_t*>(p + 192), b.expert = b.token + pairs, b.weight = reinterpret_cast<float*>(b.expert + pairs);
  b.x = reinterpret_cast<float*>(p + lists), b.out = b.x + kPlacedTokens * d;
  uint8_t* const advice = reinterpret_cast<uint8_t*>(b.out) + (kPlacedTokens * d * 4 + 63) / 64 * 64;
  b.likely = reinterpret_cast<uint32_t*>(advice), b.likely_expert = reinterpret_cast<int32_t*>(advice + 64);
  b.likely_layer = reinterpret_cast<int32_t*>(advice + 4), b.likely_count = b.likely_layer + 1;
  b.pending = pending;
  return b;
}

}  // namespace qn
