#include "ggml-lite/nn/decoder.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>

#include "ggml-lite/base/check.h"

namespace qn {

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Keys of recordings: late rows with a guess behind them, without, and a guess out of a guess; of these with a part of the head
constexpr uint64_t kLateGuess = 0, kLate = 16, kGuess = 32, kCommonOnly = 64;

// Tokens have their numbers in the order in which they were found when the tokenizer was made. Qwen's first 100,256 are those of English, code
// and European languages (of texts and sources at hand 99.3 to 100 % of the tokens), Chinese and others follow. As long as hardly any of the
// latter come up, guesses are not looked for among them: a third of the head need not be read.
constexpr int64_t kCommonIds = 100256;
constexpr double kRareEnough = 0.01, kRareRate = 0.02;
static_assert(kCommonIds % kPanelRows == 0);

constexpr int kRows = kMaxDraft + 1;

uint64_t Decoder::bytes(int64_t width) {
  return static_cast<uint64_t>(2 * kRows + 1) * static_cast<uint64_t>(width) * sizeof(float) + sizeof(StepParams) + kRows * sizeof(int32_t) + 128;
}

Decoder::Decoder(DecoderModel model, int draft)
    : m_(std::move(model)), d_(m_.pipeline->back().device), stage_(m_.pipeline->back()), warm_(m_.chooser ? 2 : 0), policy_(draft, warm_) {
  const int64_t width = m_.hidden.cols();
  QN_CHECK(m_.rows() <= kRows && m_.logits.rows() > m_.rows(), "decoder: rows of the model");
  if (!m_.layer) return;
  memory_ = d_.alloc(bytes(width), "rows on their way to the layer that predicts");
  auto* p = static_cast<uint8_t*>(memory_.data());
  step_ = reinterpret_cast<StepParams*>(p);
  late_ids_ = view(step_ + 1, DType::I32, kRows);
  late_ = view(p + 64, DType::F32, 2 * kRows, width);
  guessed_ = view(late_.f32(2 * kRows), DType::F32, 1, width);
  static_assert(sizeof(StepParams) + kRows * sizeof(int32_t) <= 64);
}

void Decoder::begin(std::vector<int32_t>& timeline, int end, const SampleParams& params, Choose choose, bool plain) {
  timeline_ = &timeline, end_ = end, choose_ = std::move(choose), plain_ = plain;
  ready_.clear(), guesses_.clear();
  rows_ = 0, collected_ = false, right_ = 0, failed_ = false;
  stats_ = {};
  stats_.plain_seconds = policy_.step_seconds(0);
  active_ = true;
  const auto position = static_cast<int32_t>(timeline.size());
  if (m_.chooser) {
    m_.chooser->begin(params, timeline);
    const StepParams at{position - 1, 1};
    d_.upload(stage_.step, &at, sizeof at);
    m_.chooser->choose(view(const_cast<float*>(last_logits()), DType::F32, 1, m_.logits.cols()), stage_.ids.slice(0, 1), stage_.step);
  }
  if (!m_.layer) return;
  d_.copy(late_.data, last_hidden(), static_cast<size_t>(late_.cols()) * sizeof(float));
  late_slot_ = position - 1, late_rows_ = 1;
}

int32_t Decoder::token(int position) const {
  const auto p = static_cast<size_t>(position);
  return p < timeline_->size() ? (*timeline_)[p] : ready_[p - timeline_->size()];
}

std::span<const float> Decoder::download(const float* logits) {
  host_.resize(static_cast<size_t>(m_.logits.cols()));
  d_.download(host_.data(), logits, host_.size() * sizeof(float));
  return host_;
}

// ---- what was chosen ----------------------------------------------------------------------------------------------------

namespace {
struct Restore {  // the timeline, which grows while one chooses
  std::vector<int32_t>& v;
  size_t size;
  ~Restore() { v.resize(size); }
};
}  // namespace

void Decoder::choose_on_host() {
  const Restore restore{*timeline_, timeline_->size()};
  for (int row = 0; row < std::max(rows_, 1); row++) {
    int32_t id;
    try {
      id = choose_(download(rows_ ? m_.logits.f32(row) : last_logits()), *timeline_, timeline_->size());
    } catch (const NoChoice&) {  // it is that token, and those before it can be had
      if (row == 0) throw;
      failed_ = true;
      return;
    }
    ready_.push_back(id);
    if (row >= static_cast<int>(guesses_.size()) || id != guesses_[static_cast<size_t>(row)]) return;
    timeline_->push_back(id);
  }
}

// Where guesses are not known here, tokens that no text has: only their number matters. Lots are even, not random (multiples of square roots of
// primes, without their integers: Kronecker's sequence in kMaxDraft dimensions), so that some hundred steps have the shares of infinitely many.
void Decoder::win_by_lottery() {
  static constexpr double kRoots[kMaxDraft] = {0.41421356237309505, 0.73205080756887729, 0.23606797749978969, 0.64575131106459059, 0.31662479035539985, 0.60555127546398929, 0.12310562561766055};
  const double lot = static_cast<double>(lots_++) + 0.5;
  const auto uniform = [this] {  // SplitMix64
    uint64_t z = drawn_++ * 0x9E3779B97F4A7C15u + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u, z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
  };
  size_t right = 0;
  while (right < guesses_.size() && lot * kRoots[right] - std::floor(lot * kRoots[right]) < lottery_) right++;
  ready_.clear();
  for (size_t i = 0; i <= right; i++)
    ready_.push_back(i < right && guesses_[i] >= 0 ? guesses_[i] : static_cast<int32_t>(uniform() * static_cast<double>(std::min(m_.logits.cols(), kCommonIds))));
}

void Decoder::collect() {
  if (failed_) throw NoChoice();
  const int at = static_cast<int>(timeline_->size());
  if (lottery_ >= 0) m_.pipeline->wait();  // mail for this position may be there from a pass whose choice did not count
  if (m_.chooser) {
    const Chosen first = m_.chooser->wait(at);
    ready_.push_back(first.id);
    for (int i = 1; i <= first.more && !failed_; i++) try {
        ready_.push_back(m_.chooser->wait(at + i).id);
      } catch (const NoChoice&) {
        failed_ = true;
      }
  } else {
    choose_on_host();
  }
  if (lottery_ >= 0) win_by_lottery();
  collected_ = true;
  const double time = now();
  right_ = static_cast<int>(ready_.size()) - 1 + failed_;
  if (rows_) {
    policy_.result(static_cast<int>(guesses_.size()), right_, time - begun_);
    stats_.passes++, stats_.drafted += guesses_.size(), stats_.accepted += static_cast<uint64_t>(right_);
    stats_.seconds += time - begun_, stats_.plain_seconds = policy_.step_seconds(0);
    if (m_.layer) {  // rows 0 ... right_ are true, and the tokens behind them known
      const int more = std::min(right_ + 1, static_cast<int>(ready_.size()));
      QN_CHECK(late_slot_ + late_rows_ == start_, "decoder: late rows end at slot %d, the pass began at %d", late_slot_ + late_rows_, start_);
      d_.copy(late_.f32(late_rows_), m_.hidden.data, static_cast<size_t>(more * late_.cols()) * sizeof(float));
      late_rows_ += more;
    }
  }
  if (m_.chooser) guess();  // before anything is shown: it touches neither the state nor the rows of the pass
}

int32_t Decoder::next() {
  if (ready_.empty()) collect();
  return ready_.front();
}

// ---- guesses ------------------------------------------------------------------------------------------------------------

// After the last token that is known, in place of the guesses of the pass before
void Decoder::guess() {
  begun_ = now();
  guesses_.clear();
  const int k = failed_ || plain_ ? 0 : policy_.choose(std::min(m_.rows() - 1, end_ - 1 - known()));
  if (m_.layer) {
    if (k > 0) return guess_with_layer(k);
    if (late_rows_ >= m_.rows()) run_late(m_.rows(), false);
    return;
  }
  if (k == 0) return;
  const size_t size = timeline_->size();
  timeline_->insert(timeline_->end(), ready_.begin(), ready_.end());
  guesses_ = suffix_.propose(*timeline_, k);
  timeline_->resize(size);
  if (!m_.chooser || guesses_.empty()) return;
  d_.upload(stage_.ids.i32() + 1, guesses_.data(), guesses_.size() * sizeof(int32_t));
  m_.chooser->assume(known(), guesses_);
}

// Row i of hidden (T, D) is joined with token ids[i]. guess_at > 0: the last row is a guess, chosen into ids[guess_at] of the next pass.
void Decoder::layer_rows(const Tensor& hidden, const Tensor& ids, int guess_at) {
  const int64_t n = hidden.rows();
  const Tensor x = m_.x.slice(0, n);
  multi_token_entry(d_, m_.mtp, ids, hidden, m_.embedded.slice(0, n), x, m_.eps, m_.act);
  m_.layer(x, step_, guess_at ? 1 : 0);
  if (!guess_at) return;
  NormMatmulArgs h;
  h.w = common_ ? m_.mtp.head.slice(0, kCommonIds) : m_.mtp.head;
  const Tensor logits = view(m_.logits.f32(m_.rows()), DType::F32, 1, h.w.rows());
  h.h = x.slice(n - 1, 1), h.norm = m_.mtp.norm, h.eps = m_.eps, h.act = m_.act, h.y = logits, h.normed = guessed_;
  d_.norm_matmul(h);
  if (m_.chooser) m_.chooser->guess(logits, stage_.ids.slice(guess_at, 1), step_);
}

// The first `rows` late rows through the layer
void Decoder::run_late(int rows, bool guess) {
  struct {
    StepParams step;
    int32_t ids[kRows];
  } about{{late_slot_, rows}, {}};
  for (int i = 0; i < rows; i++) about.ids[i] = token(late_slot_ + i + 1);
  d_.upload(step_, &about, sizeof about);
  recorded((guess ? kLateGuess + (common_ ? kCommonOnly : 0) : kLate) + static_cast<uint64_t>(rows),
                      [&] { layer_rows(late_.slice(0, rows), late_ids_.slice(0, rows), guess ? 1 : 0); });
  late_slot_ += rows, late_rows_ -= rows;
  if (late_rows_) d_.copy(late_.data, late_.f32(rows), static_cast<size_t>(late_rows_ * late_.cols()) * sizeof(float));
}

int32_t Decoder::host_guess(int index) {  // the token known() + index
  std::vector<int32_t>& history = *timeline_;
  const Restore restore{history, history.size()};
  history.insert(history.end(), ready_.begin(), ready_.end());
  history.insert(history.end(), guesses_.begin(), guesses_.end());
  int32_t id = 0;
  try {
    id = choose_(download(m_.logits.f32(m_.rows())), history, static_cast<uint64_t>(known() + index));
  } catch (const NoChoice&) {  // a guess like any other
  }
  return id;
}

bool Decoder::common_only() const { return m_.chooser && m_.mtp.head.rows() > kCommonIds && rare_ < kRareEnough; }

void Decoder::guess_with_layer(int k) {
  common_ = common_only();
  while (late_rows_ > m_.rows()) run_late(m_.rows(), false);
  run_late(late_rows_, true);
  for (int i = 0; i < k; i++) {
    if (i > 0) {
      const StepParams at{late_slot_ + i - 1, 1};
      if (!m_.chooser) d_.upload(step_, &at, sizeof at);
      recorded(kGuess + (common_ ? kCommonOnly : 0) + static_cast<uint64_t>(i), [&] { layer_rows(guessed_, stage_.ids.slice(i, 1), i + 1); });
    }
    guesses_.push_back(m_.chooser ? -1 : host_guess(i));
    if (!m_.chooser) d_.upload(stage_.ids.i32() + i + 1, &guesses_.back(), sizeof(int32_t));
  }
}

// ---- passes -------------------------------------------------------------------------------------------------------------

void Decoder::take(int32_t id) {
  QN_CHECK(!ready_.empty() && ready_.front() == id, "decoder: token %d is not what was chosen", id);
  ready_.erase(ready_.begin());
  timeline_->push_back(id);
  stats_.tokens++;
  rare_ += ((id >= kCommonIds ? 1.0 : 0.0) - rare_) * kRareRate;
  if (!ready_.empty() || failed_) return;
  try {
    begin_pass(id);
  } catch (...) {
    timeline_->pop_back();  // the model has not seen it, and what the pass before left still counts
    throw;
  }
}

void Decoder::begin_pass(int32_t id) {
  if (!m_.chooser) guess();
  const int before = rows_ ? right_ + 1 : 0, n = 1 + static_cast<int>(guesses_.size());
  const StepParams at{static_cast<int32_t>(timeline_->size()) - 1, n, rows_ > 1 ? before : 0};
  if (!m_.chooser) {
    guesses_.insert(guesses_.begin(), id);
    m_.pipeline->prepare({at, {}}, guesses_, false);
    guesses_.erase(guesses_.begin());
  } else {
    if (lottery_ >= 0) {  // the device goes on from what it chose, and that was not it
      m_.chooser->assume(at.pos, {&id, 1});
      d_.upload(stage_.ids.data, &id, sizeof id);
    }
    if (n > 1 || lottery_ >= 0) d_.upload(stage_.step, &at, sizeof at);
    m_.pipeline->hand_back(n);
  }
  run_pass(n);
  start_ = at.pos, rows_ = n, collected_ = false, right_ = 0;
}

void Decoder::run_pass(int n) {
  m_.pipeline->run(n, plain_ ? 0 : m_.key + static_cast<uint64_t>(n), [&](size_t stage) {
    m_.pass(stage, n);
    if (m_.chooser && stage == m_.pipeline->size() - 1) m_.chooser->choose(m_.logits.slice(0, n), stage_.ids.slice(0, 1), stage_.step);
  });
}

HybridState::Place Decoder::place() const {
  const int kept = static_cast<int>(timeline_->size()) - start_;
  QN_CHECK(kept >= 1 && kept <= rows_, "decoder: %d tokens of a pass over %d", kept, rows_);
  return {rows_ > 1 ? kept : 0, {{m_.hidden.f32(kept - 1), m_.hidden.cols()}, {m_.logits.f32(kept - 1), m_.logits.cols()}}};
}

void Decoder::checkpoint() {
  const auto position = static_cast<int>(timeline_->size());
  if (!rows_) return m_.pipeline->checkpoint(position, true);
  const HybridState::Place here = place();
  m_.pipeline->checkpoint(position, true, &here);
}

void Decoder::abandon() noexcept {
  try {
    if (active_) finish();
  } catch (...) {  // what was thrown before says more
  }
}

void Decoder::finish() {
  active_ = false;
  m_.pipeline->wait();
  if (rows_ && !collected_) stats_.seconds += now() - begun_;
  const auto position = static_cast<int>(timeline_->size());
  if (rows_) m_.pipeline->settle(position, place());
  late_rows_ = std::min(late_rows_, position - 1 - late_slot_);  // what is true of the timeline; its last slot waits for a token
  ready_.clear();
  while (late_rows_ > 0) run_late(std::min(late_rows_, m_.rows()), false);
  late_rows_ = 0, rows_ = 0;
}

// ---- for benchmarks -----------------------------------------------------------------------------------------------------

double Decoder::time_of(const std::function<void()>& body) {  // median
  std::array<double, 9> seconds{};
  for (int i = -3; i < static_cast<int>(seconds.size()); i++) {
    m_.pipeline->wait();
    const double start = now();
    body();
    m_.pipeline->wait();
    if (i >= 0) seconds[static_cast<size_t>(i)] = now() - start;
  }
  std::ranges::nth_element(seconds, seconds.begin() + 4);
  return seconds[4];
}

DraftCosts Decoder::costs(const std::vector<int32_t>& timeline, int context) {
  const auto position = static_cast<int32_t>(timeline.size());
  if (position < 1 || position + m_.rows() > context) fail("measuring guesses at position %d: expected 1 to %d", position, context - m_.rows());
  DraftCosts c;
  plain_ = false;
  if (m_.chooser) {  // greedy, and nobody reads the mail
    SampleParams greedy{};
    greedy.top_p = greedy.repetition_penalty = 1;
    m_.chooser->begin(greedy, timeline);
  }
  std::vector<int32_t> ids(timeline.end() - std::min<int32_t>(position, kRows), timeline.end());
  ids.resize(kRows, ids[0]);
  const auto pass = [&](int n, int from) {
    return time_of([&] {
      m_.pipeline->prepare({{position, n, from}, {}}, std::span(ids).first(static_cast<size_t>(n)), true);
      run_pass(n);
    });
  };
  const int before = std::min(position, m_.rows());  // tokens of the pass before, as a rule all of them count
  for (int n = 1; n <= m_.rows(); n++) c.passes.emplace_back(n, pass(n, n > 1 ? std::min(before, n) : 0));
  if (m_.rows() > 1) {
    c.replay = c.passes.back().second - pass(m_.rows(), 0);
    c.settle = time_of([&] { m_.pipeline->settle(position, {before, {{m_.hidden.f32(), m_.hidden.cols()}, {m_.logits.f32(), m_.logits.cols()}}}); });
  }
  if (!m_.layer) return c;
  const StepParams at{position, 1};
  d_.upload(late_ids_.data, ids.data(), sizeof(int32_t));
  const auto guess = [&](uint64_t key, const Tensor& from, const Tensor& id, int guess_at) {
    return time_of([&] {
      d_.upload(step_, &at, sizeof at);
      recorded(key, [&] { layer_rows(from, id, guess_at); });
      if (!m_.chooser) download(m_.logits.f32(m_.rows()));
    });
  };
  common_ = common_only();
  const uint64_t of = common_ ? kCommonOnly : 0;
  c.first = guess(of + kLateGuess + 1, late_.slice(0, 1), late_ids_.slice(0, 1), 1);
  if (m_.rows() > 2) c.next = guess(of + kGuess + 1, guessed_, stage_.ids.slice(1, 1), 2);
  return c;
}

}  // namespace qn
