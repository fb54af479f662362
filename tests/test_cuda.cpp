// Parts of the CUDA device that the table of operations (test_ops.cpp) does not reach. Where there is no GPU every case says SKIPPED.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "cuda/cuda.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/core/codec.h"
#include "ggml-lite/core/device.h"
#include "ggml-lite/text/sampler.h"

using namespace qn;

namespace {

using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;
using Random = std::mt19937;

bool no_gpu() {
  if (!list_cuda_devices().empty()) return false;
  MESSAGE("SKIPPED: no GPU");
  return true;
}

std::unique_ptr<Device> make_device(int64_t vocab) {
  auto d = make_cuda_device(0);
  OpLimits l;
  l.tokens = 16, l.width = 512, l.experts = 8, l.chosen = 2, l.expert_width = 64, l.model_width = 128, l.vocab = vocab;
  l.heads = 4, l.context = 512, l.value_heads = 4, l.key_heads = 2, l.key_dim = 128, l.value_dim = 128;
  d->reserve(l);
  return d;
}

double uniform(Random& r) { return std::uniform_real_distribution<double>()(r); }
int below(Random& r, int n) { return static_cast<int>(r() % static_cast<uint32_t>(n)); }

// ---- choosing tokens ------------------------------------------------------------------------------------------------

SampleParams on_device(const SamplerParams& p, int answer) {
  SampleParams d{};
  d.temperature = p.temperature, d.top_p = p.top_p, d.min_p = p.min_p, d.top_k = p.top_k, d.seed = p.seed;
  d.repetition_penalty = p.repetition_penalty, d.presence_penalty = p.presence_penalty, d.frequency_penalty = p.frequency_penalty;
  d.penalty_window = p.penalty_window, d.answer = answer;
  return d;
}

// What sample() works on, at fixed addresses.
class Choice {
 public:
  Choice(Device& d, int vocab, int context, bool masks)
      : device_(d), vocab_(vocab), context_(context), logits_(d.alloc(static_cast<size_t>(vocab) * 4 * 8, "logits")),
        allowed_(d.alloc(static_cast<size_t>(vocab), "allowed")), history_(d.alloc(static_cast<size_t>(context + 1) * 4, "history")),
        ids_(d.alloc(8, "ids")), params_(d.alloc(sizeof(SampleParams), "params")), step_(d.alloc(sizeof(StepParams), "step")), mail_(d.alloc_mail()) {
    args_.logits = view(logits_.data(), DType::F32, 1, vocab);
    if (masks) args_.allowed = view(allowed_.data(), DType::U8, vocab);
    args_.history = view(history_.data(), DType::I32, context);
    args_.ids = view(ids_.data(), DType::I32, 1);
    args_.params = static_cast<const SampleParams*>(params_.data()), args_.step = static_cast<StepParams*>(step_.data()), args_.mail = mail_;
  }
  void logits(const Floats& v) { device_.upload(logits_.data(), v.data(), v.size() * 4); }
  void allowed(const std::vector<uint8_t>& v) { device_.upload(allowed_.data(), v.data(), v.size()); }
  void params(const SamplerParams& p, int answer) {
    const SampleParams d = on_device(p, answer);
    device_.upload(params_.data(), &d, sizeof d);
  }
  // The model has seen `tokens`, the last n of them in the last call.
  void seen(const Ids& tokens, int n, const Ids& drafts = {}) {
    Ids h(static_cast<size_t>(context_ + 1), kGuard);
    std::copy_n(tokens.begin(), std::min<size_t>(tokens.size(), static_cast<size_t>(context_)), h.begin());
    std::copy(drafts.begin(), drafts.end(), h.begin() + static_cast<std::ptrdiff_t>(tokens.size()));
    device_.upload(history_.data(), h.data(), h.size() * 4);
    const StepParams s{static_cast<int32_t>(tokens.size()) - n, n + static_cast<int32_t>(drafts.size())};
    device_.upload(step_.data(), &s, sizeof s);
    const int32_t guards[2] = {kGuard, kGuard};
    device_.upload(ids_.data(), guards, 8);
  }
  void run(int rows = 1) {
    args_.logits = view(logits_.data(), DType::F32, rows, vocab_);
    device_.sample(args_);
  }
  // Tokens by mail from position p on, as many as the first says; what the next step reads is checked, for a call of `rows`.
  Ids all_chosen(int p, int rows) {
    device_.sync();
    Ids out;
    for (uint32_t i = 0, more = 0; i <= more; i++) {
      const uint64_t message = mail_->slot[(p + static_cast<int>(i)) % kMailSlots];
      CHECK((message >> 32) == static_cast<uint64_t>(p) + i);
      const auto text = static_cast<uint32_t>(message);
      if (i == 0) more = text == UINT32_MAX ? 0 : text >> kMailIdBits;
      else if (text != UINT32_MAX) CHECK((text >> kMailIdBits) == more - i);
      out.push_back(text == UINT32_MAX ? -1 : static_cast<int32_t>(text & ((1u << kMailIdBits) - 1)));
    }
    const int end = p + static_cast<int>(out.size()) - 1, kept = static_cast<int>(out.size());
    StepParams s;
    device_.download(&s, step_.data(), sizeof s);
    CHECK((s.pos == end && s.n_tok == 1 && s.from == (rows > 1 ? kept : 0)));
    Ids h(static_cast<size_t>(context_ + 1));
    device_.download(h.data(), history_.data(), h.size() * 4);
    CHECK(h[static_cast<size_t>(end)] == std::max(out.back(), 0));
    return out;
  }
  // The id of position p by mail; what else was to be written is checked. -1: none could be chosen.
  int32_t chosen(int p) {
    device_.sync();
    const uint64_t message = mail_->slot[p % kMailSlots];
    CHECK((message >> 32) == static_cast<uint64_t>(p));
    const auto id = static_cast<int32_t>(message);
    int32_t ids[2];
    device_.download(ids, ids_.data(), 8);
    CHECK(ids[0] == std::max(id, 0));
    CHECK(ids[1] == kGuard);
    StepParams s;
    device_.download(&s, step_.data(), sizeof s);
    CHECK(s.pos == p);
    CHECK(s.n_tok == 1);
    Ids h(static_cast<size_t>(context_ + 1));
    device_.download(h.data(), history_.data(), h.size() * 4);
    CHECK(h.back() == kGuard);
    if (p < context_) {
      CHECK(h[static_cast<size_t>(p)] == ids[0]);
      CHECK(h[static_cast<size_t>(p) + 1] == kGuard);
    }
    return id;
  }

 private:
  static constexpr int32_t kGuard = -77;
  Device& device_;
  const int vocab_, context_;
  Buffer logits_, allowed_, history_, ids_, params_, step_;
  Mail* mail_;
  SampleArgs args_;
};

Floats some_logits(Random& r, int vocab, int kind) {
  Floats v(static_cast<size_t>(vocab));
  std::normal_distribution<float> normal;
  const float spread[] = {3, 0.01f, 12, 2, 0, 40}, centre[] = {0, 5, -30, 0, 1.5f, 0};
  for (float& x : v) x = centre[kind] + spread[kind] * normal(r);
  if (kind == 3)
    for (float& x : v) x = std::round(x);  // many ties, +0 and -0
  if (kind == 5) v[static_cast<size_t>(below(r, vocab))] = 300;  // one that has everything
  for (int i = 0; i < vocab / 20; i++) v[static_cast<size_t>(below(r, vocab))] = i % 2 ? NAN : -INFINITY;
  v[static_cast<size_t>(below(r, vocab))] = 1;
  return v;
}

// filters: a bit per filter; kind of top_k by the next bits
SamplerParams some_params(Random& r, int filters, int vocab) {
  SamplerParams p;
  p.seed = static_cast<uint64_t>(r()) << 32 | r();
  if (!(filters & 1)) p.temperature = static_cast<float>(0.05 + 3 * uniform(r) * uniform(r));
  if (filters & 2) p.top_p = static_cast<float>(1 - 0.9 * uniform(r) * uniform(r));
  if (filters & 4) p.min_p = static_cast<float>(uniform(r) * uniform(r) * uniform(r));
  if (filters & 8) {
    p.repetition_penalty = static_cast<float>(0.5 + uniform(r)), p.presence_penalty = static_cast<float>(2 * uniform(r) - 1);
    p.frequency_penalty = static_cast<float>(uniform(r) - 0.5);
    if (below(r, 2)) p.penalty_window = 1 + below(r, 60);
  }
  const int ks[] = {0, 1, 20, 64, 65, 1 + below(r, 64), 65 + below(r, 3000), vocab + below(r, 2)};
  p.top_k = ks[filters >> 4 & 7];
  return p;
}

void compare_with_cpu(int vocab, int rounds, uint32_t seed) {
  const auto device = make_device(vocab);
  Random r(seed);
  Choice plain(*device, vocab, 200, false), masked(*device, vocab, 200, true);
  for (int round = 0; round < rounds; round++) {
    const int kind = round % 6;
    const SamplerParams p = some_params(r, round * 37 % 128, vocab);
    const Floats logits = some_logits(r, vocab, kind);
    const bool mask = below(r, 2);
    std::vector<uint8_t> allowed;
    if (mask) {
      allowed.assign(static_cast<size_t>(vocab), 1);
      for (auto& a : allowed) a = below(r, 10) != 0;
      std::fill(allowed.end() - vocab / 50, allowed.end(), 0);
    }
    bool possible = false;
    for (size_t i = 0; i < logits.size(); i++) possible |= logits[i] > -INFINITY && (!mask || allowed[i]);

    Ids history(static_cast<size_t>(1 + below(r, 180)));
    for (auto& id : history) id = below(r, 3) ? below(r, vocab) : below(r, std::min(vocab, 5));
    if (kind == 0) history[0] = -1, history.back() = vocab;  // ids without a logit
    const int n = static_cast<int>(history.size()), answer = below(r, n + 1), n_tok = 1 + below(r, n);
    Choice& c = mask ? masked : plain;
    if (mask) c.allowed(allowed);
    c.logits(logits), c.params(p, n - answer), c.seen(history, n_tok), c.run();
    const int32_t id = c.chosen(n);
    const int32_t want = possible ? Sampler(p, allowed).next(logits, history, static_cast<size_t>(answer), static_cast<uint64_t>(n)) : -1;
    CHECK_MESSAGE(id == want, "V ", vocab, " round ", round, " temperature ", p.temperature, " top_k ", p.top_k, " top_p ", p.top_p, " min_p ", p.min_p,
                  " penalties ", p.repetition_penalty, " ", p.presence_penalty, " ", p.frequency_penalty, " window ", p.penalty_window);
  }
}

}  // namespace

// The final norms of some rows of a pass come with logits, those of others alone; the layer that predicts must not see which
TEST_CASE("CUDA: norms have the same bits with a product and without, of one row and of several") {
  if (no_gpu()) return;
  const auto d = make_device(64);
  for (Act act : {Act::BF16, Act::INT8, Act::F32})
    for (int64_t k : {256, 512, 480}) {
      CAPTURE(k);
      Random random(3);
      Floats h(static_cast<size_t>(5 * k)), norm(static_cast<size_t>(k));
      std::vector<uint16_t> w(static_cast<size_t>(64 * k));
      for (float& v : h) v = static_cast<float>(4 * uniform(random) - 2);
      for (float& v : norm) v = static_cast<float>(0.5 + uniform(random));
      for (uint16_t& v : w) v = float_to_bf16(static_cast<float>(uniform(random) - 0.5));
      Buffer on_h = d->alloc(h.size() * 4, "h"), on_norm = d->alloc(norm.size() * 4, "norm"), on_w = d->alloc(w.size() * 2, "w"), y = d->alloc(5 * 64 * 4, "y"),
             normed = d->alloc(h.size() * 4, "normed");
      d->upload(on_h.data(), h.data(), h.size() * 4), d->upload(on_norm.data(), norm.data(), norm.size() * 4), d->upload(on_w.data(), w.data(), w.size() * 2);
      const auto norms = [&](int64_t rows, bool product) {  // so many rows at a time
        for (int64_t at = 0; at < 5; at += rows) {
          NormMatmulArgs a;
          a.h = view(on_h.data(), DType::F32, 5, k).slice(at, rows), a.normed = view(normed.data(), DType::F32, 5, k).slice(at, rows);
          a.norm = view(on_norm.data(), DType::F32, k), a.act = act;
          if (product) a.w = view(on_w.data(), DType::BF16, 64, k), a.y = view(y.data(), DType::F32, 5, 64).slice(at, rows);
          d->norm_matmul(a);
        }
        Floats out(h.size());
        d->download(out.data(), normed.data(), out.size() * 4);
        return out;
      };
      const Floats want = norms(1, true);
      CHECK(norms(5, true) == want);
      CHECK(norms(5, false) == want);
      CHECK(norms(1, false) == want);
    }
}

TEST_CASE("CUDA: the token chosen is the one the CPU chooses") {
  if (no_gpu()) return;
  compare_with_cpu(7, 400, 1);
  compare_with_cpu(1000, 600, 2);
  compare_with_cpu(2049, 200, 3);  // a slice with a single id
  compare_with_cpu(151936, 130, 4);
}

TEST_CASE("CUDA: of several rows, the tokens that the CPU chooses one after the other while they are the drafts") {
  if (no_gpu()) return;
  for (const int vocab : {50, 5000}) {
    const auto device = make_device(vocab);
    Random r(31);
    Choice c(*device, vocab, 200, false);
    int ends[9] = {};
    for (int round = 0; round < 300; round++) {
      const int rows = 1 + below(r, 8);
      const SamplerParams p = some_params(r, round * 37 % 128, vocab);
      Floats logits;
      for (int i = 0; i < rows; i++) {
        const Floats row = some_logits(r, vocab, (round + i) % 6);
        logits.insert(logits.end(), row.begin(), row.end());
      }
      if (round % 29 == 0 && rows > 1) std::fill(logits.begin() + vocab, logits.begin() + 2 * vocab, NAN);  // nothing to choose in the second
      Ids history(static_cast<size_t>(1 + below(r, 150)));
      for (auto& id : history) id = below(r, vocab);
      const int n = static_cast<int>(history.size()), answer = below(r, n + 1), wrong = below(r, 2 * rows);  // the draft that is not what is chosen
      Sampler sampler(p, {});
      Ids drafts, want, seen = history;
      for (int i = 0; i < rows; i++) {
        const bool possible = round % 29 || i != 1;
        const auto row = std::span(logits).subspan(static_cast<size_t>(i) * static_cast<size_t>(vocab), static_cast<size_t>(vocab));
        const int32_t id = possible ? sampler.next(row, seen, static_cast<size_t>(answer + i), static_cast<uint64_t>(n + i)) : -1;
        if (static_cast<int>(want.size()) == i && (i == 0 || drafts.back() == want.back())) want.push_back(id);
        if (i + 1 < rows) drafts.push_back(possible && i != wrong ? id : (id + 1) % vocab), seen.push_back(drafts.back());
      }
      c.logits(logits), c.params(p, n - answer), c.seen(history, 1, drafts), c.run(rows);
      CHECK(c.all_chosen(n, rows) == want);
      ends[want.size()]++;
    }
    for (int i = 1; i <= 8; i++) CHECK(ends[i] > 0);
  }
}

TEST_CASE("CUDA: one recorded choice serves all parameters, and positions follow each other") {
  if (no_gpu()) return;
  constexpr int kVocab = 5000, kStart = 90, kContext = 160, kSteps = 100;  // beyond the context, and once around the mail
  const auto device = make_device(kVocab);
  Random r(9);
  const Floats logits = some_logits(r, kVocab, 3);
  Choice c(*device, kVocab, kContext, false);
  Ids history(kStart, 3);
  c.logits(logits), c.seen(history, kStart);
  for (int i = 0; i < kSteps; i++) {
    const int p = kStart + i;
    SamplerParams params = some_params(r, i * 37 % 128, kVocab);
    if (p > kContext) params.penalty_window = 0, params.repetition_penalty = 1, params.presence_penalty = params.frequency_penalty = 0;
    c.params(params, kStart);
    device->recorded(&c, 1, [&] { c.run(); });
    const int32_t id = c.chosen(p);
    CHECK(id == Sampler(params, {}).next(logits, history, history.size() - kStart, static_cast<uint64_t>(p)));
    history.push_back(id);
  }
  device->forget(&c);
}

TEST_CASE("CUDA: nothing to choose, and infinite logits") {
  if (no_gpu()) return;
  for (const int vocab : {7, 3000}) {
    const auto device = make_device(vocab);
    Choice c(*device, vocab, 16, true);
    std::vector<uint8_t> allowed(static_cast<size_t>(vocab), 1);
    allowed[2] = 0;
    c.allowed(allowed);
    for (const int k : {0, 20, 100})
      for (const float temperature : {0.f, 0.7f, 1e-30f}) {
        SamplerParams p;
        p.temperature = temperature, p.top_k = k, p.top_p = 0.8f;
        Floats logits(static_cast<size_t>(vocab), -INFINITY);
        logits[1] = NAN, logits[2] = 5;
        c.params(p, 0);
        c.logits(logits), c.seen({1, 2, 3}, 3), c.run();
        CHECK(c.chosen(3) == -1);
        for (const float high : {INFINITY, -3e38f}) {
          logits[4] = high, logits[static_cast<size_t>(vocab) - 1] = high;
          for (const uint64_t seed : {1, 2, 3, 4}) {
            p.seed = seed;
            c.params(p, 0), c.logits(logits), c.seen({1, 2, 3}, 1), c.run();
            CHECK(c.chosen(3) == Sampler(p, allowed).next(logits, Ids{1, 2, 3}, 3, 3));
          }
        }
      }
  }
}

// Leaves the GPU unusable to the process, so it runs by itself
TEST_CASE("a fault of a GPU is reported in one line that names it" * doctest::skip()) {
  const auto gpus = list_cuda_devices();
  REQUIRE(!gpus.empty());
  const auto device = make_cuda_device(static_cast<int>(gpus.size()) - 1);
  const Buffer ids = device->alloc(sizeof(int32_t), "ids"), h = device->alloc(64 * sizeof(float), "h");
  const int32_t zero = 0;
  device->upload(ids.data(), &zero, sizeof zero);
  EmbedArgs a;
  a.ids = view(ids.data(), DType::I32, 1), a.h = view(h.data(), DType::F32, 1, 64);
  a.table = view(reinterpret_cast<void*>(uintptr_t{1} << 52), DType::BF16, 16, 64);  // no memory of anybody
  std::string said;
  try {
    device->embed(a);
    device->sync();
  } catch (const DeviceLost& e) {
    said = e.what();
  }
  MESSAGE(said);
  CHECK(said.starts_with("cuda:" + std::to_string(gpus.size() - 1)));
  CHECK(said.find('\n') == std::string::npos);
}
