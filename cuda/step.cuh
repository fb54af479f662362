// A step of few tokens (decode, verification) as ONE kernel: a list of phases, and between two phases a barrier over the whole GPU.
//
// Why one kernel. A phase of a layer moves 4 to 50 MB, one to sixteen microseconds, and begins with a chain that moves nothing: all
// blocks must have ended the phase before, activations come from the L2 cache, a norm is summed up. Separate kernels, overlapping as
// the hardware lets them, read at 60 % of what memory gives (measured); here the weights of later phases stream in meanwhile, because
// what will be read is known for all but the experts:
//
//   phases    D1 ......... D2 . D3 .. D4 . D5 (experts) . D6 (experts) . D1 of the next layer
//   stream    [D1 weights      ][D3   ][D4 ]             [D6 shared    ][D1 weights ...        always as far ahead as the ring has room
//
//   stream    the dense weights of all phases in the order of their use, cut into tasks (16 rows, or 8 exact rows); block b has tasks
//             b, b + grid, ... of each product, and each of its 8 warps a slice of K of every task.
//   ring      per warp, in shared memory: units of 4 KB (BF16 128 k, INT8 256 k with its scales, of 16 rows), copied by the lanes that
//             will use them. It runs ahead over the borders of tasks, phases and layers.
//
//   shared    [ control ][ level 0: a unit for each warp ][ level 1 ] ... [ level n-1 ][ work: what the phase needs ]
//   memory                '------------- ring ------------------------------------'
//             Attention wants memory for keys and values: at the product before it the stream pauses, starts again at level 0 and
//             keeps to `low` levels until attention has ended; everything behind those is attention's.
//
// The barrier. A block's writes are made visible (release) when it adds one to the counter, and the thread that has seen the counter
// reach phase * grid (acquire) leads the others on; so a phase may read what any block wrote in an earlier one, and may overwrite what
// was read in an earlier one. What a phase reads before its barrier is: weights; the recurrent state and the convolution inputs, which
// only the same block wrote, in an earlier launch; cached keys and values of earlier launches, or of an earlier phase behind a barrier.
// All blocks are resident at once: one a multiprocessor, and nothing else stays on the GPU for ever.
//
// Every sum has an order that depends on neither the number of tokens nor the number of blocks.
#pragma once
#include <type_traits>

#include "cuda/attn_few.cuh"
#include "cuda/gdn.cuh"
#include "cuda/matvec.cuh"

namespace qn::cuda {

constexpr int kStepWarps = 8, kStepThreads = 32 * kStepWarps;  // that compute; one more speaks for them
constexpr int kUnitBytes = 4096 + 256;
constexpr int kLevelBytes = kStepWarps * kUnitBytes;
constexpr int kStepChosen = 16;     // most experts a token chooses
constexpr int kWarpGroups = 2;      // of 128 columns, that a warp has of K: at most 2048
constexpr int kDownGroups = 4;      // of K of down: at most 512
constexpr int kDownTasks = 3;       // halves of K of an expert that a warp loads at once: 10 experts are 2.5 for each of 8 warps

// Weights whose addresses are known: a product, and rows that see unrounded activations
struct alignas(16) Stream {
  const uint8_t* w;            // panels (INT8) or rows (BF16)
  int64_t stride;              // bytes of a panel; of a row
  const uint8_t* exact[2];     // rows of K BF16
  int32_t exact_rows[2];
  int32_t k, rows, panels, tasks;
  int32_t step, pair;          // BF16: the first row of panel p is p * step, its row 8 + g lies `pair` rows behind its row g
  int32_t tiles, scale_bytes, shift;  // INT8
  int32_t pause;               // attention comes first: see above
};
static_assert(sizeof(Stream) % 16 == 0 && sizeof(Stream) <= 96);

struct ProductPhase {
  Input in;
  Store store;
  float* y;
  int64_t ldy;
  float* exact_y[2];
  int64_t exact_ldy[2];
  int32_t squash[2];
  float* normed;               // x (T, K), or null
  int32_t keep;                // leave x for the experts of the next phase
};
struct GateUpPhase {           // shapes as in MoeGateUpArgs; INT4 in groups of 128
  const float *x, *logits;
  const uint8_t* w;            // gate_up of expert 0
  int64_t stride;              // bytes from expert to expert
  int32_t experts, chosen, k, f, shift, panel_bytes, scale_bytes;  // 1 << shift panels
  int32_t kept;                // x is there
  int32_t* ids;
  float *weights, *inner;
};
struct DownPhase {
  const int32_t* ids;
  const float *weights, *inner;
  const uint8_t* w;
  int64_t stride;
  int32_t experts, chosen, k, d, panel_bytes, scale_bytes;
  int32_t known;               // the choice is there
  int32_t shared_k, group_shift, unused;  // 1 << group_shift groups of 128 in k
  const float *shared, *shared_scale;
  float* h;
};
struct AttentionPhase {
  Attn a;
  Few f;
  int32_t blocks;              // per key head
};

enum class Kind : int32_t { Product, Delta, Attention, Combine, GateUp, Down };
struct alignas(16) Phase {
  Kind kind;
  int32_t tokens;
  int32_t stream;              // index of the first stream that no earlier phase has used up
  int32_t resume;              // the last attention of its layer has ended
  union {
    ProductPhase product;
    Delta delta;
    AttentionPhase attention;
    GateUpPhase gate_up;
    DownPhase down;
  };
  Phase() : kind(Kind::Product), tokens(0), stream(0), resume(0), delta{} {}
};
constexpr int kPhaseBytes = 384;
static_assert(sizeof(Phase) <= kPhaseBytes && std::is_trivially_copyable_v<Phase>);

// A launch. One phase travels in the arguments, several lie in device memory, kPhaseBytes apart.
struct StepArgs {
  const uint8_t* phases;       // null: `one`, and `one_stream`
  const Stream* streams;
  int32_t count, stream_count;
  uint32_t* counter;           // zero before and after
  int32_t levels, low;         // of the ring
  int32_t tokens;
  Phase one;
  Stream one_stream;
};

}  // namespace qn::cuda
