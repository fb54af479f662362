// qnext-perplexity: how well a model file predicts.
//   --check expected.safetensors   against recorded values of the reference implementation
//   -f text                        perplexity over a text, in sliding windows
//   --against reference.qn         KL divergence and agreement of two files over the same text, position by position
// Sums and softmax are in double. Exit codes: 0, 1 bad input or beyond the bounds, 2 bad usage.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>

#include <CLI/CLI.hpp>

#include "ggml-lite/base/file.h"
#include "ggml-lite/base/json.h"
#include "ggml-lite/base/safetensors.h"
#include "ggml-lite/base/term.h"
#include "qnext.h"

using namespace qnext;
using qn::Json;

namespace {

using Floats = std::span<const float>;

struct Args {
  Options options;
  std::string model, against, against_act, against_kv_type, against_device, file;
  std::vector<std::string> checks;
  double tol = 1e-3, ppl_tol = 0.1;  // max |d logit|; percent
  bool has_tol = false, no_mtp = false, json = false;
  int window = 2048, stride = 1024, limit = 0, routing = 0;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// ---- comparing rows of logits ---------------------------------------------------------------------------------------

double log_sum(Floats x) {
  double top = -INFINITY, sum = 0;
  for (float v : x) top = std::max<double>(top, v);
  for (float v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}

// Sums over p: KL(p || q) of two rows of logits.
double divergence(Floats p, Floats q) {
  const double lp = log_sum(p), lq = log_sum(q);
  double kl = 0;
  for (size_t i = 0; i < p.size(); i++) {
    const double log_p = p[i] - lp;
    if (log_p > -700) kl += std::exp(log_p) * (log_p - (q[i] - lq));
  }
  return kl;
}

double nll(Floats logits, int32_t token) { return log_sum(logits) - logits[static_cast<size_t>(token)]; }

// The largest difference; infinite as soon as anything is not a number: comparisons with NaN would let it pass.
double max_difference(Floats a, Floats b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); i++) {
    const double d = std::abs(static_cast<double>(a[i]) - b[i]);
    if (!(d <= worst)) worst = std::isnan(d) ? INFINITY : d;
  }
  return worst;
}

size_t top(Floats x) { return static_cast<size_t>(std::ranges::max_element(x) - x.begin()); }

struct Comparison {
  double max_d = 0;
  std::vector<double> kl;
  size_t same_top = 0;

  void add(Floats expected, Floats got) {
    max_d = std::max(max_d, max_difference(expected, got));
    kl.push_back(divergence(expected, got));
    same_top += top(expected) == top(got);
  }
  double quantile(double q) {
    std::ranges::sort(kl);
    return kl[static_cast<size_t>(q * static_cast<double>(kl.size() - 1) + 0.5)];
  }
  double mean() const {
    double sum = 0;
    for (double v : kl) sum += v;
    return sum / static_cast<double>(kl.size());
  }
  double agreement() const { return 100.0 * static_cast<double>(same_top) / static_cast<double>(kl.size()); }
};

// ---- report: lines for people, or members of one object -----------------------------------------------------------------

class Report {
 public:
  explicit Report(bool json) : json_(json) {}
  void begin(const std::string& title) {
    end();
    title_ = title;
    if (!json_) std::cout << title << '\n';
  }
  void line(const std::string& text) const {
    if (!json_) std::cout << "  " << text << '\n' << std::flush;
  }
  void value(const char* key, double v) { now_.set(key, Json::number(v)); }
  void value(const char* key, const std::string& v) { now_.set(key, Json::string(v)); }
  void count(const char* key, size_t v) { now_.set(key, Json::number(static_cast<int64_t>(v))); }
  void verdict(bool ok, const std::string& why) {
    if (ok) return;
    good_ = false;
    now_.set("failed", Json::string(why));
    line("FAILED: " + why);
  }
  bool finish() {
    end();
    if (json_) std::cout << Json::object().set("ok", Json::boolean(good_)).set("results", results_).dump() << '\n';
    return good_;
  }

 private:
  void end() {
    if (!title_.empty()) results_.push(Json(now_).set("what", Json::string(title_)));
    title_.clear(), now_ = Json::object();
  }
  bool json_, good_ = true;
  std::string title_;
  Json now_ = Json::object(), results_ = Json::array();
};

void comparison(Report& r, const char* what, const char* key, Comparison& c) {
  r.line(qn::format("%-14s max |d| %.3g, KL mean %.3g, max %.3g, top-1 %.2f %% of %zu",
                    what, c.max_d, c.mean(), c.quantile(1), c.agreement(), c.kl.size()));
  const std::string k = key;
  r.value((k + "_max_d").c_str(), c.max_d), r.value((k + "_kl_mean").c_str(), c.mean()), r.value((k + "_kl_max").c_str(), c.quantile(1));
  r.value((k + "_top1_percent").c_str(), c.agreement());
}

// ---- --check ----------------------------------------------------------------------------------------------------------

class Check {
 public:
  Check(Engine& engine, const Args& args, Report& report, const std::string& path, bool f32)
      : engine_(engine), args_(args), report_(report), path_(path), data_(qn::SafeTensors::open_file(path)), session_(engine), f32_(f32) {}

  void run() {
    if (data_.find("tokens")) {
      report_.begin(path_);
      whole_sequence();
      return;
    }
    bool any = false;
    for (int i = 0; data_.find("p" + std::to_string(i) + ".tokens"); i++) {
      report_.begin(path_ + " p" + std::to_string(i));
      prompt("p" + std::to_string(i) + ".");
      any = true;
    }
    if (data_.find("ppl.tokens")) report_.begin(path_ + " ppl"), perplexity(), any = true;
    if (!any) qn::fail("%s: expected tensors \"tokens\" and \"logits\", or \"p0.tokens\" and so on, found none of them",
                       path_.c_str());
  }

 private:
  std::vector<int64_t> shape(const std::string& name, size_t rank) const {
    const qn::SafeTensor* t = data_.find(name);
    if (!t) qn::fail("%s: tensor %s is missing", path_.c_str(), name.c_str());
    if (t->shape.size() != rank) qn::fail("%s: tensor %s: expected %zu dimensions, got %zu",
                                          path_.c_str(), name.c_str(), rank, t->shape.size());
    return t->shape;
  }
  std::vector<float> floats(const std::string& name, const std::vector<int64_t>& want) const {
    const std::vector<int64_t> got = shape(name, want.size());
    for (size_t i = 0; i < want.size(); i++)
      if (got[i] != want[i])
        qn::fail("%s: tensor %s: dimension %zu: expected %lld, got %lld: recorded from another model?", path_.c_str(), name.c_str(), i,
                 static_cast<long long>(want[i]), static_cast<long long>(got[i]));
    return data_.read_f32(name);
  }
  std::vector<int32_t> tokens(const std::string& name, size_t rank) const {
    const std::vector<int64_t> dims = shape(name, rank);
    if (std::ranges::find(dims, 0) != dims.end()) qn::fail("%s: tensor %s is empty", path_.c_str(), name.c_str());
    std::vector<int32_t> ids = data_.read_i32(name);
    for (int32_t id : ids)
      if (id < 0 || id >= engine_.info().vocab) qn::fail("%s: tensor %s: token %d is outside of the vocabulary of %d",
                                                         path_.c_str(), name.c_str(), id, engine_.info().vocab);
    return ids;
  }
  static Floats row(const std::vector<float>& m, size_t i, size_t width) { return Floats(m).subspan(i * width, width); }

  void bound(const char* what, double got) {
    if (f32_ || args_.has_tol) report_.verdict(got <= args_.tol, qn::format("%s: max |d| %.3g, allowed %.3g", what, got, args_.tol));
  }

  // Fed the expected tokens, whatever ours would have been: one close call does not make everything after it incomparable.
  void greedy(const std::string& prefix, bool judged) {
    const std::vector<int32_t> want = tokens(prefix + "greedy", 1);
    const std::vector<float> gap = floats(prefix + "greedy_gap", {static_cast<int64_t>(want.size())});
    const double clear = f32_ ? 1e-4 : 0.1;
    size_t equal = 0, decisive = 0, wrong = 0;
    std::string first;
    for (size_t i = 0; i < want.size(); i++) {
      const bool same = top(session_.logits()) == static_cast<size_t>(want[i]);
      equal += same;
      decisive += gap[i] >= clear;
      wrong += !same && gap[i] >= clear;
      if (!same && first.empty()) first = qn::format("; first other: %zu, where the gap is %.3g", i, gap[i]);
      if (i + 1 < want.size()) session_.step(want[i]);
    }
    report_.line(qn::format("%-14s %zu of %zu equal, %zu of %zu where the gap is at least %g%s",
                            "greedy", equal, want.size(), decisive - wrong, decisive, clear, first.c_str()));
    report_.count("greedy_tokens", want.size()), report_.count("greedy_equal", equal), report_.count("greedy_wrong", wrong);
    if (judged) report_.verdict(wrong == 0, qn::format("%zu greedy tokens differ where the gap is at least %g", wrong, clear));
  }

  // tokens (T), logits (T, V), final_norm_hidden (T, D), hidden_last_token (layers + 1, D), mtp_logits (T - 1, V)
  void whole_sequence() {
    const ModelInfo& m = engine_.info();
    const std::vector<int32_t> ids = tokens("tokens", 1);
    const auto t = static_cast<int64_t>(ids.size());
    const auto width = static_cast<size_t>(m.width), vocab = static_cast<size_t>(m.vocab), layers = static_cast<size_t>(m.layers);
    const std::vector<float> logits = floats("logits", {t, m.vocab});
    const bool mtp = args_.options.mtp && data_.find("mtp_logits");
    const std::vector<float> mtp_logits = mtp ? floats("mtp_logits", {t - 1, m.vocab}) : std::vector<float>();

    std::vector<float> last((layers + 1) * width), final_norm;  // as hidden_last_token, final_norm_hidden
    Comparison main, draft;
    size_t drafts = 0;
    engine_.trace([&](int layer, std::string_view name, Floats v, int rows, int cols) {
      if (name == "mtp_logits")
        for (int i = 0; i < rows && mtp && drafts < ids.size() - 1; i++)
          draft.add(row(mtp_logits, drafts++, vocab), v.subspan(static_cast<size_t>(i) * vocab, vocab));
      if (static_cast<size_t>(cols) != width || rows < 1) return;
      if (name == "final_norm") final_norm.insert(final_norm.end(), v.begin(), v.end());
      const int entry = name == "embed" ? 0 : name == "layer" && layer + 1 < m.layers ? layer + 1 : name == "final_norm" ? m.layers : -1;
      if (entry >= 0) std::ranges::copy(v.last(width), last.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(entry) * width));
    });
    session_.sync_all(ids, [&](int position, Floats got) { main.add(row(logits, static_cast<size_t>(position), vocab), got); });
    engine_.trace({});
    if (main.kl.size() != ids.size()) qn::fail("%zu positions have logits, expected %zu", main.kl.size(), ids.size());

    comparison(report_, "logits", "logits", main);
    bound("logits", main.max_d);
    if (mtp) {
      if (drafts + 1 != ids.size()) qn::fail("%zu positions have MTP logits, expected %zu", drafts, ids.size() - 1);
      comparison(report_, "MTP logits", "mtp", draft);
      bound("MTP logits", draft.max_d);
    }
    if (data_.find("hidden_last_token")) hidden("hidden states", "hidden_max_d", floats("hidden_last_token", {m.layers + 1, m.width}), last);
    if (data_.find("final_norm_hidden")) hidden("final norm", "final_norm_max_d", floats("final_norm_hidden", {t, m.width}), final_norm);
    if (data_.find("greedy")) greedy("", f32_);  // random weights route chaotically: rounded activations decide nothing here
  }

  void hidden(const char* what, const char* key, const std::vector<float>& want, const std::vector<float>& got) {
    if (got.size() != want.size()) qn::fail("%s: %zu values traced, expected %zu", what, got.size(), want.size());
    const double d = max_difference(want, got);
    report_.line(qn::format("%-14s max |d| %.3g", what, d));
    report_.value(key, d);
  }

  void prompt(const std::string& p) {
    session_.clear();
    session_.sync(tokens(p + "tokens", 1));
    const std::vector<float> want = floats(p + "logits_last", {engine_.info().vocab});
    Comparison c;
    c.add(want, session_.logits());
    comparison(report_, "last logits", "logits", c);
    bound("last logits", c.max_d);
    greedy(p, true);
  }

  void perplexity() {
    const std::vector<int32_t> ids = tokens("ppl.tokens", 2);
    const std::vector<int64_t> dims = shape("ppl.tokens", 2);
    const std::vector<float> want = floats("ppl.nll", {dims[0], dims[1] - 1});
    const auto n = static_cast<size_t>(dims[1]);
    std::vector<float> got;
    qn::ProgressBar bar("perplexity", "tokens");
    const double start = now();
    for (size_t r = 0; r < static_cast<size_t>(dims[0]); r++) {
      const std::span<const int32_t> row(ids.data() + r * n, n);
      session_.clear();
      session_.sync_all(row, [&](int position, Floats logits) {
        const auto next = static_cast<size_t>(position) + 1;
        if (next < n) got.push_back(static_cast<float>(nll(logits, row[next])));
        bar.update(r * n + next, ids.size());
      });
    }
    bar.finish();
    auto mean = [](Floats v) {
      double sum = 0;
      for (float x : v) sum += x;
      return sum / static_cast<double>(v.size());
    };
    if (got.size() != want.size() || got.empty()) qn::fail("%zu positions scored, expected %zu", got.size(), want.size());
    const double ppl = std::exp(mean(got)), expected = std::exp(mean(want)), percent = 100 * (ppl / expected - 1);
    const double worst = max_difference(want, got);
    report_.line(qn::format("%-14s %.6f, expected %.6f: %+.4f %%, max |d nll| %.3g, %.0f tokens/s",
                            "perplexity", ppl, expected, percent, worst,
                            static_cast<double>(ids.size()) / (now() - start)));
    report_.value("ppl", ppl), report_.value("ppl_expected", expected), report_.value("ppl_percent", percent), report_.value("nll_max_d", worst);
    report_.verdict(std::abs(percent) <= args_.ppl_tol, qn::format("perplexity is %+.4f %% off, allowed %g %%",
                                                            percent, args_.ppl_tol));
  }

  Engine& engine_;
  const Args& args_;
  Report& report_;
  std::string path_;
  qn::SafeTensors data_;
  Session session_;
  bool f32_;
};

// ---- over a text ------------------------------------------------------------------------------------------------------

// A stretch of the text that is read from an empty state; its last `scored` tokens count.
struct Window {
  std::span<const int32_t> ids;
  size_t scored;
};

// As the Hugging Face recipe: windows begin every `stride` tokens; each scores what the last one did not reach. The very first
// token has nothing before it and does not count. (The recipe weighs windows by one token less than they score; we do not.)
std::vector<Window> windows(std::span<const int32_t> ids, const Args& a) {
  std::vector<Window> out;
  const auto window = static_cast<size_t>(a.window), stride = static_cast<size_t>(a.stride);
  for (size_t begin = 0, scored_to = 1;; begin += stride) {
    const size_t end = std::min(begin + window, ids.size());
    out.push_back({ids.subspan(begin, end - begin), end - scored_to});
    scored_to = end;
    if (end == ids.size()) return out;
  }
}

struct Score {
  double sum = 0;
  size_t n = 0;
  double mean() const { return sum / static_cast<double>(n); }
};

// Perplexity of the model over the windows; with a reference, both are run chunk by chunk beside each other, so that only the
// logits of one chunk are ever kept.
void measure(Engine& engine, Engine* reference, const std::vector<Window>& all, Report& report) {
  Session session(engine);
  std::optional<Session> other;
  if (reference) other.emplace(*reference);
  const auto vocab = static_cast<size_t>(engine.info().vocab);
  const size_t chunk = reference ? std::clamp<size_t>((64 << 20) / sizeof(float) / vocab, 1, 512) : SIZE_MAX;
  std::vector<float> kept;
  Score mine, theirs;
  Comparison c;
  size_t total = 0, done = 0;
  for (const Window& w : all) total += w.ids.size();
  qn::ProgressBar bar("perplexity", "tokens");
  const double start = now();
  for (const Window& w : all) {
    session.clear();
    if (other) other->clear();
    const size_t n = w.ids.size();
    auto scored = [&](size_t position) { return position + 1 < n && position + 1 >= n - w.scored; };  // its logits are for the next token
    for (size_t begin = 0, end; begin < n; begin = end) {
      end = begin + std::min(chunk, n - begin);
      kept.clear();
      if (other)
        other->sync_all(w.ids.first(end), [&](int position, Floats logits) {
          const auto p = static_cast<size_t>(position);
          kept.insert(kept.end(), logits.begin(), logits.end());
          if (scored(p)) theirs.sum += nll(logits, w.ids[p + 1]), theirs.n++;
        });
      session.sync_all(w.ids.first(end), [&](int position, Floats logits) {
        const auto p = static_cast<size_t>(position);
        if (scored(p)) mine.sum += nll(logits, w.ids[p + 1]), mine.n++;
        if (other && scored(p)) c.add(Floats(kept).subspan((p - begin) * vocab, vocab), logits);
        bar.update(++done, total);
      });
    }
  }
  bar.finish();
  if (mine.n == 0) qn::fail("the text has too few tokens to score any");
  const double seconds = now() - start;
  report.line(qn::format("perplexity     %.6f (nll %.6f) over %zu tokens in %zu windows, %.0f tokens/s",
                         std::exp(mine.mean()), mine.mean(), mine.n, all.size(),
                         static_cast<double>(total) / seconds));
  report.value("ppl", std::exp(mine.mean())), report.value("nll", mine.mean()), report.count("tokens", mine.n), report.count("windows", all.size());
  report.value("tokens_per_second", static_cast<double>(total) / seconds);
  report.verdict(std::isfinite(mine.mean()), "logits that are not numbers");
  if (!other) return;
  report.verdict(std::isfinite(c.mean()), "KL divergences that are not numbers");
  report.line(qn::format("reference      %.6f (nll %.6f)", std::exp(theirs.mean()), theirs.mean()));
  report.line(qn::format("KL divergence  mean %.6g, median %.3g, 99 %% %.3g, max %.3g",
                         c.mean(), c.quantile(0.5), c.quantile(0.99), c.quantile(1)));
  report.line(qn::format("top-1 equal    %.3f %%, max |d logit| %.3g", c.agreement(), c.max_d));
  report.value("reference_ppl", std::exp(theirs.mean())), report.value("kl_mean", c.mean()), report.value("kl_median", c.quantile(0.5));
  report.value("kl_99", c.quantile(0.99)), report.value("kl_max", c.quantile(1));
  report.value("top1_percent", c.agreement()), report.value("max_d", c.max_d);
}

void over_text(Engine& engine, Engine* reference, const Args& a, Report& report) {
  if (a.window > engine.plan().ctx) qn::fail("--window: %d tokens do not fit into the context of %d positions",
                                             a.window, engine.plan().ctx);
  const std::string text = qn::read_text(a.file, 4ull << 30);
  std::vector<int32_t> ids = engine.tokenize(text, true);  // as the Hugging Face tokenizer does
  if (reference && reference->has_tokenizer() && reference->tokenize(std::string_view(text).substr(0, 100000), true) !=
                                                     engine.tokenize(std::string_view(text).substr(0, 100000), true))
    qn::fail("%s and %s split text into different tokens: they cannot be compared", a.model.c_str(), a.against.c_str());
  if (a.limit && ids.size() > static_cast<size_t>(a.limit)) ids.resize(static_cast<size_t>(a.limit));
  if (ids.size() < 2) qn::fail("%s: expected a text of at least two tokens", a.file.c_str());
  report.begin(a.file);
  measure(engine, reference, windows(ids, a), report);
}

// The token rows of a --check file as the text.
void over_check_tokens(Engine& engine, Engine& reference, const std::string& path, Report& report) {
  const qn::SafeTensors data = qn::SafeTensors::open_file(path);
  const qn::SafeTensor* t = data.find("ppl.tokens") ? data.find("ppl.tokens") : data.find("tokens");
  if (!t || t->shape.empty() || t->shape.back() < 2) qn::fail("%s: expected token rows \"ppl.tokens\" or \"tokens\"", path.c_str());
  const std::vector<int32_t> ids = data.read_i32(data.find("ppl.tokens") ? "ppl.tokens" : "tokens");
  const auto n = static_cast<size_t>(t->shape.back());
  std::vector<Window> rows;
  for (size_t i = 0; i + n <= ids.size(); i += n) rows.push_back({std::span(ids).subspan(i, n), n - 1});
  for (int32_t id : ids)
    if (id < 0 || id >= engine.info().vocab) qn::fail("%s: token %d is outside of the vocabulary of %d",
                                                      path.c_str(), id, engine.info().vocab);
  report.begin(path);
  measure(engine, &reference, rows, report);
}

// How evenly a model spreads random tokens over its experts, in sequences of 500.
void routing(Engine& engine, int tokens, Report& report) {
  const ModelInfo& info = engine.info();
  std::vector<std::vector<uint32_t>> counts(static_cast<size_t>(info.layers), std::vector<uint32_t>(static_cast<size_t>(info.experts)));
  engine.trace([&](int layer, std::string_view name, Floats ids, int, int) {
    if (name != "experts" || layer >= info.layers) return;
    for (float id : ids) counts[static_cast<size_t>(layer)][static_cast<size_t>(id)]++;
  });
  qn::ProgressBar bar("routing", "tokens");
  Session session(engine);
  const int length = std::min(500, engine.plan().ctx);
  for (int done = 0; done < tokens; done += length) {
    std::vector<int32_t> ids;
    for (int i = done; i < std::min(tokens, done + length); i++)
      ids.push_back(static_cast<int32_t>(qn::counter_uniform(1, static_cast<uint64_t>(i), 0) * info.vocab));
    session.clear();
    session.sync(ids);
    bar.update(static_cast<uint64_t>(done + static_cast<int>(ids.size())), static_cast<uint64_t>(tokens));
  }
  bar.finish();
  engine.trace({});
  const double mean = static_cast<double>(tokens) * info.chosen / info.experts;
  double least = INFINITY, most = 0;
  int unused = 0;
  for (const auto& layer : counts)
    for (uint32_t n : layer) {
      least = std::min<double>(least, n), most = std::max<double>(most, n);
      unused += n == 0;
    }
  report.begin(qn::format("routing of %d random tokens", tokens));
  report.line(qn::format("experts        %d unused of %d in each of %d layers; chosen %.0f to %.0f times, mean %.1f: busiest %.2f times the mean", unused,
                         info.experts, info.layers, least, most, mean, most / mean));
  report.value("unused_experts", unused), report.value("busiest_over_mean", most / mean), report.value("rarest_over_mean", least / mean);
}

// ---- the program --------------------------------------------------------------------------------------------------------

int run(Args a) {
  a.options.mtp = false, a.options.draft = 0;  // nothing is generated
  if (a.against.empty() && !a.no_mtp)
    for (const std::string& path : a.checks) a.options.mtp |= qn::SafeTensors::open_file(path).find("mtp_logits") != nullptr;
  Engine engine = Engine::open(a.model, a.options, qn::progress_bars("B"));
  std::optional<Engine> reference;
  if (!a.against.empty()) {
    Options other = a.options;
    if (!a.against_act.empty()) other.act = a.against_act;
    if (!a.against_kv_type.empty()) other.kv_type = a.against_kv_type;
    if (!a.against_device.empty()) other.device = a.against_device, other.split.clear();
    reference.emplace(Engine::open(a.against, other, qn::progress_bars("B")));
    if (reference->info().vocab != engine.info().vocab)
      qn::fail("%s has %d tokens, %s has %d: they cannot be compared",
               a.model.c_str(), engine.info().vocab, a.against.c_str(), reference->info().vocab);
  }
  const bool f32 = engine.plan().act == "f32";
  Report report(a.json);
  for (const std::string& path : a.checks) {
    if (reference) over_check_tokens(engine, *reference, path, report);
    else Check(engine, a, report, path, f32).run();
  }
  if (!a.file.empty()) over_text(engine, reference ? &*reference : nullptr, a, report);
  if (a.routing) routing(engine, a.routing, report);
  return report.finish() ? 0 : 1;
}

void parse_args(CLI::App& app, Args& a, int argc, char** argv) {
  app.add_option("-m,--model", a.model, "model file")->type_name("FILE")->required();
  app.add_option("--check", a.checks, "compare with recorded values (repeatable); exit code 1 beyond the bounds")
      ->type_name("FILE")->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  auto* tol = app.add_option_function<std::string>("--tol", [&a](const std::string& v) { a.tol = qn::parse_number(v, "--tol", 0, 1e6); },
                                                   "allowed max |d logit| (default 1e-3 with --act f32; else not judged)")->type_name("X");
  app.add_option_function<std::string>("--ppl-tol", [&a](const std::string& v) { a.ppl_tol = qn::parse_number(v, "--ppl-tol", 0, 1e6); },
                                       "allowed difference of perplexity in percent (default 0.1)")->type_name("X");
  app.add_flag("--no-mtp", a.no_mtp, "do not check MTP logits");
  app.add_option("-f,--file", a.file, "perplexity over this text")->type_name("FILE");
  app.add_option("--window", a.window, "tokens of a window (default 2048)")->type_name("N")->check(CLI::Range(2, 1 << 24));
  app.add_option("--stride", a.stride, "from one window to the next (default 1024)")->type_name("N")->check(CLI::Range(1, 1 << 24));
  app.add_option("--limit", a.limit, "only the first N tokens")->type_name("N")->check(CLI::Range(2, 1 << 30));
  app.add_option("--against", a.against, "reference file: KL divergence and agreement over the same tokens (-f, or those of --check)")
      ->type_name("FILE");
  app.add_option("--against-act", a.against_act, "rounding of activations in the reference (default: as --act)")
      ->type_name("FORMAT")->check(CLI::IsMember({"f32", "bf16", "int8"}));
  app.add_option("--against-kv-type", a.against_kv_type, "KV cache of the reference (default: as --kv-type)")
      ->type_name("FORMAT")->check(CLI::IsMember({"f32", "bf16", "int8"}));
  app.add_option("--against-device", a.against_device, "where the reference runs (default: as --device)")->type_name("WHERE");
  app.add_option("--routing", a.routing, "count how N random tokens spread over the experts")->type_name("N")->check(CLI::Range(1, 1 << 30));
  app.add_flag("--json", a.json, "one JSON object");
  for (const OptionRow& row : options_table()) {
    if (*row.value)
      app.add_option_function<std::string>(row.flags, [&a, &row](const std::string& v) { row.set(a.options, v); }, row.help)
          ->type_name(row.value)->group("Engine");
    else
      app.add_flag_function(row.flags, [&a, &row](int64_t) { row.set(a.options, ""); }, row.help)->group("Engine");
  }
  app.parse(argc, argv);
  a.has_tol = tol->count() > 0;
  if (a.checks.empty() && a.file.empty() && !a.routing) throw CLI::RequiredError("--check FILE, -f FILE or --routing N");
  if (a.stride > a.window) throw CLI::ValidationError("--stride", "expected at most --window, or tokens would be skipped");
}

}  // namespace

int main(int argc, char** argv) {
  Args args;
  CLI::App app("Perplexity, and comparison with recorded values or with another file.", "qnext-perplexity");
  try {
    parse_args(app, args, argc, argv);
  } catch (const CLI::Success& e) {
    return qn::exit_code("qnext-perplexity", app.exit(e));
  } catch (const std::exception& e) {
    std::cerr << "qnext-perplexity: " << e.what() << " (see qnext-perplexity --help)\n";
    return 2;
  }
  try {
    return qn::exit_code("qnext-perplexity", run(std::move(args)));
  } catch (const std::exception& e) {
    std::cerr << "qnext-perplexity: " << qn::format("%s", e.what()) << '\n';
    return 1;
  }
}
