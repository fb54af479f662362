// Decoding, one or several tokens a pass: guesses, one pass that checks them, and back to the last token that was right. Lossless to the bit.
//
// A pass over the token x at position W and k guesses behind it gives 1 + k rows of logits. Row j chooses the token at W + 1 + j as plain
// decoding would: rows have the bits of single steps, random numbers depend on seed and position alone, and the history is that of plain
// decoding as long as the guesses before were right. The first row that chooses otherwise than the guess behind it has chosen the next token;
// rows behind it are void. Guesses are chosen in the same way (same seed, same position) from the logits of the layer that predicts, which
// draws the model's own token more often than the likeliest one would be right.
//
// A layer for multi-token prediction: its slot i joins the final norm of position i with the embedding of token i + 1 and predicts token
// i + 2. When tokens up to position P are known and those before it were seen by the model:
//
//   slots of the last pass that were right, and before    final norms of the model (late rows): run together, the last one guesses P + 1
//   slot P, P + 1, ...                                     what the layer itself gave for the slot before, and its guess
//
// Where the vocabulary is large guesses are looked for among the common tokens only, while the text has hardly any others.
//
// The next time the cache rows of the latter are overwritten by true ones. When nothing is guessed late rows wait until there are enough of
// them, so that plain steps are as fast as without the layer.
//
//          tokens known to the outside (the timeline)      seen by the model
//   ... ---------------------------------------------|x  g  g  g|     x: start_, the pass has rows_ tokens
//                                    ready_: chosen, not yet taken, [x] c c c
//
// On a device that chooses, the host waits for mail alone: then it asks for guesses, hands out what was chosen, and asks for the next pass.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "ggml-lite/core/device.h"
#include "ggml-lite/core/measure.h"  // DraftCosts
#include "ggml-lite/nn/chooser.h"
#include "ggml-lite/nn/draft.h"
#include "ggml-lite/nn/multi_token.h"
#include "ggml-lite/nn/pipeline.h"

namespace qn {

// What a model does for it, and where its tensors lie: all of them on the last device of its pipeline.
struct DecoderModel {
  Pipeline* pipeline = nullptr;
  Chooser* chooser = nullptr;                         // one that can, or null: the host chooses
  std::function<void(size_t stage, int n)> pass;      // a stage's part of a pass over n tokens, logging them if n > 1; the
                                                      // last stage leaves final norms in `hidden`, logits in `logits`
  // The decoder layer of multi-token prediction; the results of the last `wanted` rows are. Empty: there is none
  std::function<void(const Tensor& x, const StepParams*, int wanted)> layer;
  uint64_t key = 0;                                   // of recordings of passes: key + n
  Tensor hidden;                                      // (R, D); R: most tokens of a pass
  Tensor logits;                                      // (> R, V): of the pass, then of a guess
  Tensor embedded, x;                                 // (>= R, D) scratch
  MultiTokenWeights mtp;
  float eps = 1e-6f;
  Act act = Act::F32;
  int rows() const { return static_cast<int>(hidden.rows()); }
};

struct DecoderStats {
  uint64_t drafted = 0, accepted = 0, passes = 0, tokens = 0;  // tokens: taken
  double seconds = 0;        // of passes and guesses
  double plain_seconds = 0;  // of a plain step; 0: not known
};

class Decoder {
 public:
  using Choose = std::function<int32_t(std::span<const float> logits, std::span<const int32_t> history, uint64_t position)>;

  static uint64_t bytes(int64_t width);  // of memory that it takes
  // draft: how many guesses, see DraftPolicy; of more than there are rows those
  Decoder(DecoderModel model, int draft);
  ~Decoder() { d_.forget(this); }
  Decoder(const Decoder&) = delete;

  // A generation begins: the model has seen exactly `timeline`, which grows by what is taken and ends before position `end`. A device that
  // chooses does so by `params`, otherwise `choose` is asked. plain: nothing is guessed and nothing recorded.
  void begin(std::vector<int32_t>& timeline, int end, const SampleParams& params, Choose choose, bool plain);
  int32_t next();              // the token at the end of the timeline; waits for it
  void take(int32_t id);       // what next() gave, into the timeline
  void checkpoint();           // of the state at the end of the timeline
  void finish();               // the model has seen exactly the timeline
  void abandon() noexcept;     // the same when something was thrown, if it can be done

  bool failed() const { return failed_; }
  const DecoderStats& stats() const { return stats_; }  // since begin()
  const DraftPolicy& policy() const { return policy_; }

  // ---- for benchmarks: a guess is right by lottery, whatever the model chooses; negative: no more
  void simulate(double acceptance) { lottery_ = acceptance; }
  DraftCosts costs(const std::vector<int32_t>& timeline, int context);  // leaves the state anywhere
  void set_draft(int draft) { policy_ = DraftPolicy(draft, warm_); }

 private:
  void collect();
  void choose_on_host();
  void win_by_lottery();
  void begin_pass(int32_t id);
  void run_pass(int n);
  double time_of(const std::function<void()>& body);
  void guess();
  void guess_with_layer(int k);
  void run_late(int rows, bool guess);
  bool common_only() const;
  void layer_rows(const Tensor& hidden, const Tensor& ids, int guess_at);
  void recorded(uint64_t key, const std::function<void()>& body) { plain_ ? body() : d_.recorded(this, key, body); }
  int32_t host_guess(int index);
  HybridState::Place place() const;
  int32_t token(int position) const;
  int known() const { return static_cast<int>(timeline_->size() + ready_.size()); }  // tokens
  std::span<const float> download(const float* logits);
  const float* last_hidden() const { return stage_.state.tail(); }
  const float* last_logits() const { return stage_.state.tail() + m_.hidden.cols(); }

  DecoderModel m_;
  Device& d_;                       // the last one
  PipelineStage& stage_;
  int warm_;
  DraftPolicy policy_;
  SuffixDraft suffix_;
  DecoderStats stats_;

  std::vector<int32_t>* timeline_ = nullptr;
  int end_ = 0;
  Choose choose_;
  std::vector<int32_t> ready_;      // in order, from the end of the timeline on
  std::vector<int32_t> guesses_;    // of the next pass, or of this one; on a device that chooses and has the layer, only their number counts
  int start_ = 0, rows_ = 0;        // the last pass; rows_ 0: there was none in this generation
  bool collected_ = false;          // what it chose is known
  int right_ = 0;                   // its guesses that were right
  bool failed_ = false;
  bool active_ = false, plain_ = false;  // between begin() and finish()
  double begun_ = 0;                // when the step began
  double lottery_ = -1;
  uint64_t drawn_ = 0, lots_ = 0;

  Buffer memory_;
  Tensor late_, guessed_;           // (2R, D): final norms for slots late_slot_ ..., late_rows_ of them; (1, D): what the layer gave last
  StepParams* step_ = nullptr;      // of the layer; behind it
  Tensor late_ids_;                 // (R) the tokens its rows join
  int late_slot_ = 0, late_rows_ = 0;
  double rare_ = 0;                 // of the tokens taken lately: how many the common ones lack
  bool common_ = false;             // of the guesses under way: among the common tokens only
  std::vector<float> host_;
};

class DecoderScope {  // leaves no generation unfinished
 public:
  explicit DecoderScope(Decoder& d) : d_(d) {}
  ~DecoderScope() { d_.abandon(); }
  DecoderScope(const DecoderScope&) = delete;

 private:
  Decoder& d_;
};

}  // namespace qn
