// qnext-bench: how fast a model file runs on this machine, and how near that is to what the machine could do.
//   -p prompts, -n generated tokens, -pg both, at -d tokens of context   as llama-bench
//   --ops      each operation of a pass timed alone against the bytes it has to move
//   --verify   a pass over several tokens at once, as checking a draft takes
//   --simulate-acceptance   generating with guesses that are right by lottery, against plain steps; what its parts take
// Only the report goes to stdout. Exit codes: 0, 1 bad input, 2 bad usage, 128 + signal; what was measured before is reported all the same.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <map>
#include <set>

#include <CLI/CLI.hpp>

#include "ggml-lite/base/file.h"
#include "ggml-lite/base/json.h"
#include "ggml-lite/base/term.h"
#include "ggml-lite/base/threads.h"
#include "ggml-lite/core/limits.h"
#include "ggml-lite/core/qn.h"
#include "qnext.h"
#include "tests/measure/plot.h"

using namespace qnext;
using qn::Json;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::atomic<int> signalled;       // which signal asked for the end
std::atomic<bool> interrupted;    // the same for the engine
std::atomic<bool> measured_some;  // there is something to report
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

struct Interrupted {};
void check_interrupt() {
  if (interrupted) throw Interrupted();
}

// ---- options ----------------------------------------------------------------------------------------------------------

struct Args {
  Options options;
  std::vector<std::string> models;
  std::vector<int> prompts, gens, depths, verify, ops;
  std::vector<std::pair<int, int>> both;
  std::vector<double> acceptance;  // to simulate
  int repetitions = 5;
  double bandwidth = 0;  // bytes/s
  std::string format = "md", text, plot;
  bool no_warmup = false, verbose = false;
};

int parse_count(std::string_view s, const char* option) {
  int v = -1;
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), v);
  if (error != std::errc() || end != s.data() + s.size() || v < 0 || v > qn::kMaxContext)
    qn::fail("%s: expected whole numbers from 0 to %lld, as in 512, 1,2,3, 4-8, 0-4096+1024 or 512-8192*2; got \"%.*s\"", option,
             static_cast<long long>(qn::kMaxContext), static_cast<int>(s.size()), s.data());
  return v;
}

std::vector<std::string_view> split(std::string_view s, char at) {
  std::vector<std::string_view> out;
  for (size_t end; (end = s.find(at)) != s.npos; s.remove_prefix(end + 1)) out.push_back(s.substr(0, end));
  out.push_back(s);
  return out;
}

// "1,2,3", "first-last", "first-last+step", "first-last*factor"; each value once
std::vector<int> parse_list(const std::vector<std::string>& given, const char* option) {
  std::vector<int> out;
  const auto add = [&](int v) {
    if (std::ranges::find(out, v) == out.end()) out.push_back(v);
    if (out.size() > 1000) qn::fail("%s: more than 1000 values", option);
  };
  for (const std::string& s : given)
    for (std::string_view item : split(s, ',')) {
      const size_t dash = item.find('-'), by = item.find_first_of("+*");
      if (dash == item.npos || by < dash) {
        add(parse_count(item, option));
        continue;
      }
      const int first = parse_count(item.substr(0, dash), option);
      const int last = parse_count(item.substr(dash + 1, by - std::min(by, dash + 1)), option);
      const int step = by == item.npos ? 1 : parse_count(item.substr(by + 1), option);
      const bool times = by != item.npos && item[by] == '*';
      if (first > last || step < (times ? 2 : 1) || (times && first < 1))
        qn::fail("%s: cannot count through \"%.*s\"; expected first-last, first-last+step or first-last*factor with first <= last", option,
                 static_cast<int>(item.size()), item.data());
      for (int64_t v = first; v <= last; v = times ? v * step : v + step) add(static_cast<int>(v));
    }
  return out;
}

// Throws CLI::ParseError or Error: bad usage.
void parse_args(CLI::App& app, Args& a, int argc, char** argv) {
  std::vector<std::string> prompts, gens, both, depths, verify, ops;
  double bandwidth = 0;
  a.options.draft = 0;  // plain steps are measured unless asked otherwise
  app.get_formatter()->column_width(32);
  app.footer("Lists: 1,2,3 or ranges first-last, first-last+step, first-last*factor; 0 leaves a kind of test out.\n"
             "-pg and -ub work as in llama-bench.");
  app.add_option("-m,--model", a.models, "model file (repeatable)")->type_name("FILE")->required()->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)->allow_extra_args(false);
  const auto list = [&](const char* flags, std::vector<std::string>& to, const char* help) {
    return app.add_option(flags, to, help)->type_name("LIST")->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)->allow_extra_args(false);
  };
  list("-p,--n-prompt", prompts, "time prompts of so many tokens (default 512)");
  list("-n,--n-gen", gens, "time generating so many tokens (default 128)");
  list("--pg", both, "time a prompt of P tokens and G more (repeatable)")->type_name("P,G");
  list("-d,--n-depth", depths, "with so many tokens of context before (default 0)");
  app.add_option("-r,--repetitions", a.repetitions, "of each test, after one to warm up (default 5)")->type_name("N")
      ->check(CLI::Range(1, 10000));
  app.add_flag("--no-warmup", a.no_warmup, "without the one to warm up");
  app.add_option("-f,--file", a.text, "prompts from this text, repeated as needed (default: random tokens)")->type_name("FILE");
  list("--ops", ops, "time each operation of a pass over N tokens alone (default 1)")->type_name("[LIST]")->expected(0, 1)
      ->default_str("1");
  list("--verify,--passes", verify, "time a pass over N tokens at once, as checking a draft takes, against one over 1");
  std::string acceptance;
  app.add_option("--simulate-acceptance", acceptance, "generate with guesses of which each is right with these probabilities, as 0.6,0.7,0.8: all the work is "
                 "done, whatever is guessed; at each number of guesses up to --draft (default 7), and auto")->type_name("LIST");
  app.add_option_function<std::string>("--bandwidth", [&bandwidth](const std::string& v) { bandwidth = qn::parse_number(v, "--bandwidth", 0, 1e6); },
                                       "what this memory is known to read: % of roofline is of that, unless more is measured")->type_name("GB/s");
  app.add_option("-o,--output", a.format, "md, csv, json, jsonl or sql (default md)")->type_name("FORMAT")
      ->check(CLI::IsMember({"md", "csv", "json", "jsonl", "sql"}));
  app.add_option("--plot", a.plot, "draw prefill and decode speed")->type_name("FILE.png");
  app.add_flag("-v,--verbose", a.verbose, "progress on stderr");
  for (const OptionRow& row : options_table()) {
    if (!std::strcmp(row.flags, "--verify")) continue;  // of checksums; the name has another meaning here
    if (*row.value)
      app.add_option_function<std::string>(row.flags, [&a, &row](const std::string& v) { row.set(a.options, v); }, row.help)
          ->type_name(row.value)->group("Engine");
    else
      app.add_flag_function(row.flags, [&a, &row](int64_t) { row.set(a.options, ""); }, row.help)->group("Engine");
  }
  std::vector<const char*> args(argv, argv + argc);  // names of two letters after one dash
  for (const char*& arg : args) arg = !std::strcmp(arg, "-pg") ? "--pg" : !std::strcmp(arg, "-ub") ? "--ubatch" : arg;
  app.parse(argc, args.data());

  const auto given = [](const std::vector<std::string>& from, const char* option, std::vector<int> otherwise) {
    return from.empty() ? otherwise : parse_list(from, option);
  };
  a.prompts = given(prompts, "-p", {512}), a.gens = given(gens, "-n", {128}), a.depths = given(depths, "-d", {0});
  a.verify = given(verify, "--verify", {}), a.ops = given(ops, "--ops", {});
  std::erase(a.verify, 0);
  if (!a.verify.empty()) std::erase(a.verify, 1), a.verify.insert(a.verify.begin(), 1);  // what the others are held against
  for (const std::string& s : both) {
    const auto parts = split(s, ',');
    if (parts.size() != 2 || parse_count(parts[0], "-pg") < 1 || parse_count(parts[1], "-pg") < 1)
      qn::fail("-pg: expected two numbers of at least 1, as in 512,128; got \"%s\"", s.c_str());
    a.both.emplace_back(parse_count(parts[0], "-pg"), parse_count(parts[1], "-pg"));
  }
  for (std::string_view item : split(acceptance, ','))
    if (!acceptance.empty()) a.acceptance.push_back(qn::parse_number(std::string(item), "--simulate-acceptance", 0, 1));
  if (!a.acceptance.empty() && a.options.draft <= 0) a.options.draft = 7;
  a.bandwidth = bandwidth * 1e9;
  const auto none = [](const std::vector<int>& list) { return std::ranges::count(list, 0) == std::ssize(list); };
  if (!a.plot.empty() && none(a.prompts) && none(a.gens)) qn::fail("--plot: draws the speed of -p and -n, and both are left out; use one of them");
}

// ---- what is measured -------------------------------------------------------------------------------------------------

struct Statistic {
  double mean = NAN, sd = 0;
};
Statistic statistic(const std::vector<double>& samples) {
  if (samples.empty()) return {};
  const auto n = static_cast<double>(samples.size());
  double sum = 0, squares = 0;
  for (double v : samples) sum += v;
  for (double v : samples) squares += (v - sum / n) * (v - sum / n);
  return {sum / n, n > 1 ? std::sqrt(squares / (n - 1)) : 0};
}

struct Result {
  enum Kind { Test, Operation, Pass, Draft, Cost } kind = Test;
  std::string name;                  // "pp512 @ d4096"; of an operation its name
  int prompt = 0, gen = 0, depth = 0;
  int rows = 0, calls = 0;           // of a pass over `rows` tokens; operations of one kind in it
  std::string when;                  // ISO 8601
  std::vector<double> seconds, ttft;  // of each repetition; until the first token was there
  std::vector<int32_t> ids;          // that the last repetition generated
  int drafts = 0;                    // of a simulation: guesses per step, -1 auto
  double acceptance = NAN, per_step = NAN;  // of a simulation: asked for; tokens that a step with guesses yielded
  double bytes = NAN, flops = NAN;   // that a generated token or a pass has to move; that a repetition has to compute

  double tokens() const { return kind == Operation || kind == Cost ? NAN : kind == Pass ? rows : prompt + gen; }
  Statistic speed() const {
    std::vector<double> v;
    for (double s : seconds) v.push_back(tokens() / s);
    return statistic(v);
  }
  double moved_per_second() const { return bytes * (kind == Test ? gen : 1) / statistic(seconds).mean; }
};

// A model on its device, and what was measured there.
struct Run {
  std::string path, label;
  ModelInfo info;
  Plan plan;
  int threads = 0, attention_layers = 0;
  double open_seconds = 0, measured = 0, roof = 0;  // bytes/s: a plain read here and now; the larger of that and --bandwidth
  double peak = 0;                                  // of int8 products, in registers alone
  qn::LoadReport load;
  MemoryUse memory{};
  OffloadUse offload{};
  std::optional<Outlook> outlook;  // when experts are on the host
  uint64_t measured_in = 0;  // resident set while bandwidth was measured, if that raised it
  std::vector<Result> results;

  const Result* one_token(const Result& r) const {  // the pass that a pass is held against
    const auto at = std::ranges::find_if(results, [&](const Result& o) { return o.kind == Result::Pass && o.rows == 1 && o.depth == r.depth; });
    return r.kind == Result::Pass && at != results.end() ? &*at : nullptr;
  }
  double time_ratio(const Result& r) const { return one_token(r) ? statistic(r.seconds).mean / statistic(one_token(r)->seconds).mean : NAN; }
  double bytes_ratio(const Result& r) const { return one_token(r) ? r.bytes / one_token(r)->bytes : NAN; }
  double speed_up(const Result& r) const {  // over plain steps, of the same number of tokens in the same run
    const auto plain = std::ranges::find_if(results, [&](const Result& o) { return o.kind == Result::Draft && o.drafts == 0 && o.depth == r.depth && o.gen == r.gen; });
    return r.kind == Result::Draft && plain != results.end() ? r.speed().mean / plain->speed().mean : NAN;
  }
  double roof_percent(const Result& r) const { return 100 * r.moved_per_second() / roof; }
  uint64_t planned() const { return plan.weights + plan.kv + plan.state + plan.scratch; }
};

// Floating point operations that `count` tokens from `position` on need in all operations of a kind ("sum": in all): two per weight and
// token, attention over what lies before, the delta rule in its recurrent form (decay is not counted), the head for the last token only.
double flops(const Run& run, const std::string& kind, double position, double count) {
  const ModelInfo& m = run.info;
  const double d = m.width, attention = run.attention_layers, delta = m.layers - attention, moe = m.layers;
  const double values = 1.0 * m.value_heads * m.value_dim, channels = 2.0 * m.key_heads * m.key_dim + values, wide = 1.0 * m.heads * m.head_dim;
  const double seen = count * position + count * (count + 1) / 2;  // keys, over all tokens
  const auto weights = [&](double each) { return 2 * count * each; };
  const std::pair<qn::Op, double> parts[] = {
      {qn::Op::NormMatmul, weights(d * (attention * 2 * (m.heads + m.kv_heads) * m.head_dim + delta * (channels + values + 2 * m.value_heads))) + 2.0 * m.vocab * d},
      {qn::Op::DeltaNet, delta * (weights(channels * m.conv) + count * 6 * values * m.key_dim)},
      {qn::Op::GatedNormMatmul, weights(delta * values * d)},
      {qn::Op::Attention, attention * 4 * wide * seen},
      {qn::Op::GateMatmul, weights(attention * wide * d)},
      {qn::Op::MoeRouter, weights(moe * d * (m.experts + 1 + 2 * m.shared_width))},
      {qn::Op::MoeGateUp, weights(moe * m.chosen * 2 * d * m.expert_width)},
      {qn::Op::MoeDown, weights(moe * d * (m.chosen * m.expert_width + m.shared_width))},
  };
  double sum = 0;
  for (const auto& [op, n] : parts)
    if (kind == "sum" || kind == qn::name(op)) sum += n;
  return sum;
}

std::string iso_time() {
  const std::time_t t = std::time(nullptr);
  char s[32];
  std::strftime(s, sizeof s, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&t));
  return s;
}

class Bench {
 public:
  Bench(Engine& engine, const Args& args, Run& run, const std::vector<int32_t>& text)
      : engine_(engine), args_(args), run_(run), text_(text), session_(engine) {
    for (int32_t id = 0; text.empty() && id < engine.info().vocab; id++)  // special tokens would mark turns, and cut passes
      if (!engine.has_tokenizer() || (engine.shown(id) && !engine.token_bytes(id).empty())) ids_.push_back(id);
    run.memory = engine.memory_use();
    if (text.empty() && ids_.empty()) qn::fail("%s: the tokenizer has no tokens to make a prompt of", run.path.c_str());
  }

  void all(const std::function<void(const Result&)>& emit) {
    const auto done = [&](Result r) {
      run_.memory.device_used = std::max(run_.memory.device_used, engine_.memory_use().device_used);
      run_.results.push_back(std::move(r));
      measured_some = true;
      emit(run_.results.back());
    };
    for (int depth : args_.depths) {
      for (int p : args_.prompts)
        if (p) done(prompt(p, 0, depth));
      for (int n : args_.gens)
        if (n && args_.acceptance.empty()) done(generate(n, depth));
      for (const auto& [p, n] : args_.both) done(prompt(p, n, depth));
      for (int rows : args_.verify) done(pass(rows, depth));
      for (int rows : args_.ops)
        if (rows)
          for (Result& r : operations(rows, depth)) done(std::move(r));
      if (args_.acceptance.empty()) continue;
      for (Result& r : costs(depth)) done(std::move(r));
      for (int n : args_.gens) {
        if (!n) continue;
        done(lottery(n, depth, 0, NAN));
        for (double acceptance : args_.acceptance)
          for (int drafts : {1, 2, 3, 4, 5, 7, -1})
            if (drafts <= args_.options.draft) done(lottery(n, depth, drafts, acceptance));
      }
      session_.speculate(args_.options.draft);
    }
  }

 private:
  // The session at `position`: by going back to the checkpoint there, or once anew. Nothing is left to do for the device.
  void go_to(int position) {
    check_interrupt();
    if (position == 0 || base_ != position || session_.rewind(position) != position) {
      session_.clear();
      if (position > 1 && text_.empty()) session_.pretend(position, 1);
      else if (position > 0) sync(following(position, 0));
      base_ = position;
    }
    session_.logits();
  }

  void sync(const std::vector<int32_t>& tokens) {
    session_.sync(tokens, {}, &interrupted);
    check_interrupt();
  }

  // The timeline of the session and `count` tokens more: others for every `turn`, but the same in every run.
  std::vector<int32_t> following(int count, int turn) const {
    std::vector<int32_t> all = session_.tokens();
    const size_t begin = all.size() + static_cast<size_t>(turn) * static_cast<size_t>(count);
    for (size_t i = begin; i < begin + static_cast<size_t>(count); i++) {
      const auto random = static_cast<size_t>(qn::counter_uniform(1, i, 0) * static_cast<double>(ids_.size()));
      all.push_back(text_.empty() ? ids_[random] : text_[i % text_.size()]);
    }
    return all;
  }

  // Generates n tokens as a user gets them and waits for the pass over the last; returns when the first one came.
  double tokens_out(int n) {
    double first = 0;
    tokens_made(n, &first);
    return first;
  }
  GenerateResult tokens_made(int n, double* first = nullptr) {
    GenerateParams p;
    p.max_tokens = n, p.stop_at_end_tokens = false, p.interrupt = &interrupted;
    const GenerateResult r = session_.generate(p, [&](const Delivery&) {
      if (first && *first == 0) *first = now();
      return true;
    });
    check_interrupt();
    if (static_cast<int>(r.ids.size()) != n) qn::fail("%s: generated %zu tokens, expected %d", run_.path.c_str(), r.ids.size(), n);
    session_.logits();
    return r;
  }

  Result begin(std::string name, int depth, Result::Kind kind = Result::Test) const {
    Result r;
    r.kind = kind, r.name = std::move(name), r.depth = depth, r.when = iso_time();
    if (depth) r.name += " @ d" + std::to_string(depth);
    if (args_.verbose) std::cerr << "qnext-bench: " << run_.label << ": " << r.name << std::endl;
    return r;
  }
  int first_turn() const { return args_.no_warmup ? 1 : 0; }

  // A prompt of p tokens, then n generated ones; n = 0: the prompt alone counts, and one token tells the time to it.
  Result prompt(int p, int n, int depth) {
    Result r = begin("pp" + std::to_string(p) + (n ? "+tg" + std::to_string(n) : ""), depth);
    r.prompt = p, r.gen = n;
    if (!n) r.flops = flops(run_, "sum", depth, p);
    for (int turn = first_turn(); turn <= args_.repetitions; turn++) {
      go_to(depth);
      const std::vector<int32_t> tokens = following(p, turn);
      const bool room = static_cast<int>(tokens.size()) < session_.context();
      const double start = now();
      sync(tokens);
      const double synced = now();
      const double first = room ? tokens_out(std::max(n, 1)) : NAN, end = n ? now() : synced;
      if (!turn) continue;
      r.seconds.push_back(end - start);
      if (room) r.ttft.push_back(first - start);
    }
    return r;
  }

  Result generate(int n, int depth) {
    Result r = begin("tg" + std::to_string(n), depth);
    r.gen = n;
    for (int turn = first_turn(); turn <= args_.repetitions; turn++) {
      go_to(std::max(depth, 1));
      const auto before = static_cast<double>(session_.bytes_per_token());
      const double start = now();
      GenerateResult made = tokens_made(turn ? n : std::min(n, 32));
      if (!turn) continue;
      r.seconds.push_back(now() - start), r.ids = std::move(made.ids);
      r.bytes = (before + static_cast<double>(session_.bytes_per_token())) / 2;  // the cache grows evenly in between
    }
    return r;
  }

  Result pass(int rows, int depth) {
    Result r = begin("verify" + std::to_string(rows), depth, Result::Pass);
    r.rows = rows, r.bytes = 0;
    for (int turn = 1; turn <= args_.repetitions; turn++) {
      go_to(depth);
      const std::vector<int32_t> tokens = following(rows, turn);
      const PassTime t = session_.pass(std::span(tokens).last(static_cast<size_t>(rows)));
      r.seconds.push_back(t.seconds), r.bytes += static_cast<double>(t.bytes) / args_.repetitions;
    }
    return r;
  }

  // Generates n tokens with guesses that are right by lottery. What a device records on the way, and the plain step it is compared with by the
  // session, come before.
  Result lottery(int n, int depth, int drafts, double acceptance) {
    const std::string guesses = drafts < 0 ? "auto" : std::to_string(drafts);
    Result r = begin(drafts ? qn::format("draft %s, %g right", guesses.c_str(), acceptance) : "plain steps", depth, Result::Draft);
    r.gen = n, r.drafts = drafts, r.acceptance = acceptance;
    session_.speculate(drafts, drafts ? acceptance : -1);
    int steps = 0;
    for (int turn = 0; turn <= args_.repetitions; turn++) {
      go_to(std::max(depth, 1));
      const double start = now();
      const GenerateResult made = tokens_made(turn ? n : std::max(n, 64));
      if (!turn) continue;
      r.seconds.push_back(now() - start);
      steps += n - static_cast<int>(made.accepted);
      r.per_step = static_cast<double>(n * turn) / steps;
    }
    return r;
  }

  std::vector<Result> costs(int depth) {
    go_to(std::max(depth, 1));
    const DraftCosts c = session_.draft_costs();
    std::vector<Result> out;
    const auto add = [&](const std::string& name, double seconds, int rows) {
      Result r = begin(name, depth, Result::Cost);
      r.seconds = {seconds}, r.rows = rows;
      out.push_back(std::move(r));
    };
    if (c.first > 0) add("first guess", c.first, 0);
    if (c.next > 0) add("next guess", c.next, 0);
    for (const auto& [rows, seconds] : c.passes)
      if (rows <= 4 || rows % 2 == 0) add("pass of " + std::to_string(rows), seconds, rows);
    add("of that: replay of the last pass", c.replay, 0);
    add("end inside of the last pass", c.settle, 0);
    return out;
  }

  std::vector<Result> operations(int rows, int depth) {
    const Result proto = begin("operations of " + std::to_string(rows), depth, Result::Operation);
    std::vector<Result> out;
    go_to(std::max(depth, 1));
    const std::vector<int32_t> tokens = following(rows, 1);
    for (const OpTime& op : session_.profile(std::span(tokens).last(static_cast<size_t>(rows)))) {
      Result r = proto;
      r.name = op.name, r.rows = rows, r.calls = op.calls;
      r.seconds = {op.seconds}, r.bytes = static_cast<double>(op.bytes), r.flops = flops(run_, op.name, std::max(depth, 1), rows);
      out.push_back(std::move(r));
    }
    return out;
  }

  Engine& engine_;
  const Args& args_;
  Run& run_;
  const std::vector<int32_t>& text_;
  std::vector<int32_t> ids_;  // to draw from
  Session session_;
  int base_ = 0;              // position that go_to() prepared
};

// ---- the report for programs --------------------------------------------------------------------------------------------

struct Field {
  const char *name, *type;  // type: of a column in SQL
  Json value;               // null: means nothing for this kind of test
};

Json number(double v) { return std::isfinite(v) ? Json::number(v) : Json(); }
Json whole(double v) { return std::isfinite(v) ? Json::number(static_cast<int64_t>(std::llround(v))) : Json(); }

// One list for every format; the same names in the same order for every test.
std::vector<Field> fields(const Run& run, const Result& r) {
  static const char* const kinds[] = {"test", "operation", "pass", "draft", "cost"};
  const Statistic ns = statistic(r.seconds), ts = r.speed(), ttft = statistic(r.ttft);
  const bool gpu = run.memory.device_total > 0, decode = r.kind == Result::Test && r.gen && !r.prompt;
  const auto text = [](const std::string& s) { return Json::string(s); };
  const auto bytes = [](uint64_t v) { return Json::number(static_cast<int64_t>(v)); };
  return {
      {"model_filename", "TEXT", text(run.path)}, {"model_name", "TEXT", text(run.info.name)},
      {"model_size", "INTEGER", bytes(run.info.file_bytes)},
      {"experts_format", "TEXT", text(run.info.experts_format)}, {"rest_format", "TEXT", text(run.info.rest_format)},
      {"device", "TEXT", text(run.plan.device)}, {"act", "TEXT", text(run.plan.act)}, {"kv_type", "TEXT", text(run.plan.kv_type)},
      {"n_ctx", "INTEGER", whole(run.plan.ctx)}, {"n_ubatch", "INTEGER", whole(run.plan.ubatch)},
      {"n_threads", "INTEGER", whole(run.threads)},
      {"kind", "TEXT", text(kinds[r.kind])}, {"test", "TEXT", text(r.name)},
      {"n_prompt", "INTEGER", whole(r.prompt)}, {"n_gen", "INTEGER", whole(r.gen)}, {"n_depth", "INTEGER", whole(r.depth)},
      {"n_rows", "INTEGER", whole(r.rows)}, {"n_calls", "INTEGER", whole(r.calls)},
      {"test_time", "TEXT", text(r.when)},
      {"avg_ns", "INTEGER", whole(1e9 * ns.mean)}, {"stddev_ns", "INTEGER", whole(1e9 * ns.sd)},
      {"avg_ts", "REAL", number(ts.mean)}, {"stddev_ts", "REAL", number(std::isfinite(ts.mean) ? ts.sd : NAN)},
      {"avg_us_per_token", "REAL", number(decode ? 1e6 * ns.mean / r.gen : NAN)},
      {"bytes_moved", "INTEGER", whole(r.bytes)}, {"gb_per_second", "REAL", number(r.moved_per_second() / 1e9)},
      {"n_drafts", "INTEGER", r.kind == Result::Draft ? Json::number(static_cast<int64_t>(r.drafts)) : Json()}, {"acceptance", "REAL", number(r.acceptance)},
      {"tokens_per_step", "REAL", number(r.per_step)}, {"speed_up", "REAL", number(run.speed_up(r))},
      {"time_ratio", "REAL", number(run.time_ratio(r))}, {"bytes_ratio", "REAL", number(run.bytes_ratio(r))},
      {"roofline_gb_per_second", "REAL", number(run.roof / 1e9)}, {"roofline_percent", "REAL", number(run.roof_percent(r))},
      {"tflop_per_second", "REAL", number(r.flops / ns.mean / 1e12)},
      {"avg_ttft_ns", "INTEGER", whole(1e9 * ttft.mean)}, {"stddev_ttft_ns", "INTEGER", whole(r.ttft.empty() ? NAN : 1e9 * ttft.sd)},
      {"open_seconds", "REAL", number(run.open_seconds)}, {"load_seconds", "REAL", number(gpu ? run.load.seconds : NAN)},
      {"load_gb_per_second", "REAL", number(static_cast<double>(run.load.bytes) / run.load.seconds / 1e9)},
      {"vram_bytes", "INTEGER", gpu ? bytes(run.memory.device_used) : Json()}, {"planned_bytes", "INTEGER", bytes(run.planned())},
      {"rss_peak_bytes", "INTEGER", bytes(qn::peak_rss())},
  };
}

// A string literal in which `quote` is doubled; other values as JSON writes them, null as `null`.
std::string literal(const Json& v, char quote, const char* null) {
  if (v.is_null()) return null;
  if (!v.is_string()) return v.dump();
  std::string s(1, quote);
  for (char c : v.as_string("")) s.append(c == quote ? 2 : 1, c);
  return s + quote;
}

std::string record(const Run& run, const Result& r) {
  Json o = Json::object(), ns = Json::array(), ts = Json::array();
  for (Field& f : fields(run, r)) o.set(f.name, std::move(f.value));
  for (double s : r.seconds) ns.push(whole(1e9 * s)), ts.push(number(r.tokens() / s));
  o.set("samples_ns", std::move(ns)).set("samples_ts", std::move(ts));
  if (r.ids.empty()) return o.dump();
  Json ids = Json::array();
  for (int32_t id : r.ids) ids.push(whole(id));
  return o.set("ids", std::move(ids)).dump();
}

// ---- the report for people ----------------------------------------------------------------------------------------------

struct Column {
  const char* title;
  int width;
  bool left = false;
};

void table_row(const std::vector<Column>& columns, const std::vector<std::string>& cells) {
  std::string s = "|";
  for (size_t i = 0; i < columns.size(); i++) {
    const int free = columns[i].width - qn::text_columns(cells[i]);
    const std::string pad(static_cast<size_t>(std::max(free, 0)), ' ');
    s += " " + (columns[i].left ? cells[i] + pad : pad + cells[i]) + " |";
  }
  std::cout << s << std::endl;
}

void table_head(const std::vector<Column>& columns) {
  std::vector<std::string> titles, rules;
  for (const Column& c : columns) {
    titles.push_back(c.title);
    rules.push_back(std::string(static_cast<size_t>(c.width) - !c.left, '-') + (c.left ? "" : ":"));
  }
  table_row(columns, titles), table_row(columns, rules);
}

std::string fixed(double v, int digits) { return std::isfinite(v) ? qn::format("%.*f", digits, v) : ""; }

std::vector<Column> test_columns(const Run& first) {
  return {{"model", std::max(24, qn::text_columns(first.label)), true}, {"size", 9},
          {"device", std::max(6, qn::text_columns(first.plan.device)), true}, {"act", 4, true}, {"kv", 4, true},
          {"test", 16}, {"t/s", 19}, {"us/token", 9}, {"GB/token", 8}, {"GB/s", 7}, {"% roof", 6}, {"TFLOP/s", 7}, {"TTFT ms", 9}};
}

void test_row(const std::vector<Column>& columns, const Run& run, const Result& r) {
  const Statistic ts = r.speed();
  const double mean = statistic(r.seconds).mean;
  table_row(columns, {run.label, qn::human_gib(run.info.file_bytes), run.plan.device, run.plan.act, run.plan.kv_type, r.name,
                      fixed(ts.mean, 2) + " ± " + fixed(ts.sd, 2), r.prompt ? "" : fixed(1e6 * mean / r.gen, 1), fixed(r.bytes / 1e9, 3),
                      fixed(r.moved_per_second() / 1e9, 1), fixed(run.roof_percent(r), 1), fixed(r.flops / mean / 1e12, 2),
                      fixed(1e3 * statistic(r.ttft).mean, 1)});
}

// A pass over N tokens is as good as its bytes when the last column is 1.
void pass_table(const Run& run, int depth) {
  if (std::ranges::none_of(run.results, [&](const Result& r) { return r.kind == Result::Pass && r.depth == depth; })) return;
  std::cout << '\n' << run.label << ": passes over several tokens at once (verify), depth " << depth << "\n\n";
  const std::vector<Column> columns = {{"tokens", 6}, {"ms", 17}, {"GB", 8}, {"GB/s", 7}, {"% roof", 6}, {"t/s", 10}, {"x time", 7}, {"x bytes", 7},
                                       {"x time / x bytes", 16}};
  table_head(columns);
  for (const Result& r : run.results)
    if (r.kind == Result::Pass && r.depth == depth) {
      const Statistic s = statistic(r.seconds);
      table_row(columns, {std::to_string(r.rows), fixed(1e3 * s.mean, 3) + " ± " + fixed(1e3 * s.sd, 3), fixed(r.bytes / 1e9, 3),
                          fixed(r.moved_per_second() / 1e9, 1), fixed(run.roof_percent(r), 1), fixed(r.speed().mean, 1), fixed(run.time_ratio(r), 3),
                          fixed(run.bytes_ratio(r), 3), fixed(run.time_ratio(r) / run.bytes_ratio(r), 3)});
    }
}

void draft_tables(const Run& run, int depth) {
  const auto any = [&](Result::Kind kind) { return std::ranges::any_of(run.results, [&](const Result& r) { return r.kind == kind && r.depth == depth; }); };
  if (any(Result::Cost)) {
    std::cout << '\n' << run.label << ": what guessing ahead takes, depth " << depth << "\n\n";
    const std::vector<Column> columns = {{"", 30, true}, {"ms", 8}, {"x pass of 1", 11}};
    table_head(columns);
    double one = NAN;
    for (const Result& r : run.results)
      if (r.kind == Result::Cost && r.depth == depth && r.rows == 1) one = r.seconds[0];
    for (const Result& r : run.results)
      if (r.kind == Result::Cost && r.depth == depth)
        table_row(columns, {r.name.substr(0, r.name.find(" @ d")), fixed(1e3 * r.seconds[0], 3), fixed(r.seconds[0] / one, 3)});
  }
  if (!any(Result::Draft)) return;
  std::cout << '\n' << run.label << ": generating with guesses that are right by lottery, depth " << depth << "\n\n";
  const std::vector<Column> columns = {{"right", 5}, {"guesses", 7}, {"tokens/step", 11}, {"t/s", 19}, {"x plain", 7}};
  table_head(columns);
  for (const Result& r : run.results)
    if (r.kind == Result::Draft && r.depth == depth)
      table_row(columns, {fixed(r.acceptance, 2), r.drafts < 0 ? "auto" : std::to_string(r.drafts), fixed(r.per_step, 2),
                          fixed(r.speed().mean, 2) + " ± " + fixed(r.speed().sd, 2), fixed(run.speed_up(r), 3)});
}

void operation_table(const Run& run, int depth, int rows) {
  Result sum;
  sum.kind = Result::Operation, sum.name = "sum", sum.bytes = sum.flops = 0, sum.seconds = {0};
  std::vector<const Result*> list;
  double token = NAN;  // seconds of a whole decoded token or pass, if that was measured
  for (const Result& r : run.results) {
    const double mean = statistic(r.seconds).mean;
    if (r.depth != depth) continue;
    if (r.kind == Result::Test && rows == 1 && r.gen && !r.prompt) token = mean / r.gen;
    if (r.kind == Result::Pass && r.rows == rows && rows > 1) token = mean;
    if (r.kind != Result::Operation || r.rows != rows) continue;
    list.push_back(&r);
    sum.calls += r.calls, sum.bytes += r.bytes, sum.flops += r.flops, sum.seconds[0] += mean;
  }
  if (list.empty()) return;
  list.push_back(&sum);
  std::cout << '\n' << run.label
            << qn::format(": each operation of a pass over %d token%s alone, depth %d", rows, rows == 1 ? "" : "s", depth) << "\n\n";
  const std::vector<Column> columns = {{"operation", 20, true}, {"calls", 5}, {"us", 10}, {"MB", 10}, {"GB/s", 7}, {"% roof", 6},
                                       {"TFLOP/s", 7}, {"% of sum", 8}};
  table_head(columns);
  for (const Result* r : list)
    table_row(columns, {r->name, std::to_string(r->calls), fixed(1e6 * r->seconds[0], 1), fixed(r->bytes / 1e6, 2),
                        fixed(r->moved_per_second() / 1e9, 1), fixed(run.roof_percent(*r), 1),
                        fixed(r->flops / r->seconds[0] / 1e12, 2), fixed(100 * r->seconds[0] / sum.seconds[0], 1)});
  if (std::isfinite(token)) std::cout << '\n' << qn::format("all together %.1f us, measured as a whole", 1e6 * token) << '\n';
}

void notes(const Run& run) {
  const qn::LoadReport& l = run.load;
  const Plan& p = run.plan;
  const auto line = [](const char* what, const std::string& text) { std::cout << qn::format("  %-10s ", what) << text << '\n'; };
  const auto gib = [](uint64_t v) { return qn::human_gib(v); };
  std::cout << '\n' << run.label << " (" << run.path << "), "
            << qn::format("%d positions, passes of up to %d, %d threads", p.ctx, p.ubatch, run.threads) << '\n';
  std::string load = qn::human_bytes(run.info.file_bytes) + " mapped";
  if (l.bytes) {
    const double all = l.seconds * l.threads / 100;
    load = qn::format("%s in %.2f s, %.1f GB/s by %d threads", qn::human_bytes(l.bytes).c_str(), l.seconds, static_cast<double>(l.bytes) / l.seconds / 1e9, l.threads);
    if (l.read > 0) load += qn::format(": reading %.0f %%, checksums %.0f %%, waiting for a buffer %.0f %%", l.read / all, l.check / all, l.wait / all);
  }
  line("load", load + qn::format("; ready after %.2f s", run.open_seconds));
  line("bandwidth", (run.measured > 0 ? qn::format("%.1f GB/s measured by a plain read", run.measured / 1e9) : "not measured: not on this device, or no memory to spare for it") +
                        (run.roof > 0 ? qn::format("; %% roof is of %.1f GB/s", run.roof / 1e9) : ""));
  if (run.peak > 0) {
    std::string prompts;
    for (const Result& r : run.results)
      if (const double speed = r.flops / statistic(r.seconds).mean; r.kind == Result::Test && r.gen == 0)
        prompts += qn::format("; %s %.2f, %.1f %%", r.name.c_str(), speed / 1e12, 100 * speed / run.peak);
    line("peak", qn::format("%.2f TFLOP/s of int8 products in registers%s", run.peak / 1e12, prompts.c_str()));
  }
  line("memory", qn::format("planned %s: weights %s, cache %s, state %s, scratch %s", gib(run.planned()).c_str(), gib(p.weights).c_str(),
                            gib(p.kv).c_str(), gib(p.state).c_str(), gib(p.scratch).c_str()));
  const double used = static_cast<double>(run.memory.device_used), planned = static_cast<double>(run.planned());
  if (run.memory.device_total)
    line("", qn::format("VRAM in use %s of %s, %+.1f %% against the plan", gib(run.memory.device_used).c_str(),
                        gib(run.memory.device_total).c_str(), 100 * (used / planned - 1)));
  for (const qnext::DevicePlan& d : p.devices)
    if (d.slots) line("experts", qn::format("%s: %d of %d of every layer", d.device.c_str(), d.slots, run.info.experts));
  if (const OffloadUse& o = run.offload; o.steps)
    line("", qn::format("the CPU computed %.1f in each of %llu steps of a layer, %.0f %% of them read ahead, in %.1f us%s",
                        static_cast<double>(o.experts) / static_cast<double>(o.steps), static_cast<unsigned long long>(o.steps),
                        100 * static_cast<double>(o.ahead) / static_cast<double>(o.experts), 1e6 * o.seconds / static_cast<double>(o.steps), o.pinned ? "" : "; the GPU cannot fetch: memory is not pinned"));
  if (run.outlook) {
    const qn::Forecast& f = run.outlook->forecast;
    line("", qn::format("%.1f experts of a token and layer have no slot; host memory %.1f GB/s, bus %.1f GB/s: at these speeds and nothing waiting %.1f tok/s", f.misses,
                        run.outlook->speeds.host / 1e9, run.outlook->speeds.bus / 1e9, f.bound));
    const auto decode = std::ranges::find_if(run.results, [](const Result& r) { return r.kind == Result::Test && r.prompt == 0; });
    if (decode != run.results.end() && run.offload.steps) {
      const double layer = 1e6 / decode->speed().mean / run.info.layers, cpu = 1e6 * run.offload.seconds / static_cast<double>(run.offload.steps);
      line("", qn::format("%s, %.0f %% of that: %.1f %% of the chosen have a slot, %.0f of a token do not; of %.1f us a layer the CPU computes in %.1f, beside the GPU,",
                          decode->name.c_str(), 100 * decode->speed().mean / f.bound, 100 - 100 * f.misses / run.info.chosen, f.misses * run.info.layers, layer, cpu));
      if (layer > cpu) line("", qn::format("and reads ahead in the others, %.1f, while the GPU is at what comes before the experts", layer - cpu));
    }
    for (const Result& r : run.results) {
      if (r.kind != Result::Test || r.gen || r.prompt < 512 || f.stream == 0) continue;  // short prompts do not bring all
      const double allowed = r.prompt / (f.stream * ((r.prompt + p.ubatch - 1) / p.ubatch));
      line("", qn::format("%s, %.0f %% of %.1f tok/s, which bringing experts without a slot to the GPU allows", r.name.c_str(), 100 * r.speed().mean / allowed, allowed));
    }
    line("", qn::format("--plan expects %.1f tok/s, prompts of 2048 at %.0f, of 8192 at %.0f", f.decode, f.prefill[0], f.prefill[1]));
  }
  line("", "resident set of the process " + gib(qn::peak_rss()) + " at its peak" +
               (run.measured_in ? ", which was while measuring bandwidth unless it is above " + gib(run.measured_in) : ""));
}

// ---- both -----------------------------------------------------------------------------------------------------------------

class Output {
 public:
  explicit Output(const std::string& format) : format_(format) {}

  void add(const Run& run, const Result& r) {
    const bool first = count_++ == 0;
    if (format_ == "md") {
      if (r.kind != Result::Test) return;
      if (columns_.empty()) columns_ = test_columns(run), table_head(columns_);
      return test_row(columns_, run, r);
    }
    if (format_ == "json") std::cout << (first ? "[\n  " : ",\n  ") << record(run, r) << std::flush;
    if (format_ == "jsonl") std::cout << record(run, r) << std::endl;
    if (format_ != "csv" && format_ != "sql") return;
    const bool sql = format_ == "sql";
    std::string names, types, values;
    for (const Field& f : fields(run, r)) {
      const char* comma = names.empty() ? "" : sql ? ", " : ",";
      names += std::string(comma) + f.name;
      types += std::string(comma) + f.name + " " + f.type;
      values += comma + literal(f.value, sql ? '\'' : '"', sql ? "NULL" : "");
    }
    if (first) std::cout << (sql ? "CREATE TABLE IF NOT EXISTS qnext_bench (" + types + ");\n" : names + "\n");
    std::cout << (sql ? "INSERT INTO qnext_bench (" + names + ") VALUES (" + values + ");" : values) << std::endl;
  }

  // `whole`: nothing went wrong; else nothing but JSON is said when nothing was measured.
  void end(const std::vector<Run>& runs, const Args& a, bool whole) const {
    if (!whole && !count_ && format_ != "json") return;
    if (format_ == "json") std::cout << (count_ ? "\n]\n" : "[]\n");
    if (format_ == "md")
      for (const Run& run : runs) {
        for (int depth : std::set<int>(a.depths.begin(), a.depths.end())) {
          pass_table(run, depth);
          draft_tables(run, depth);
          for (int rows : std::set<int>(a.ops.begin(), a.ops.end())) operation_table(run, depth, rows);
        }
        notes(run);
      }
  }

 private:
  std::string format_;
  std::vector<Column> columns_;
  size_t count_ = 0;
};

// Prefill over the size of the prompt (over depth, when there is one size), decode over depth.
std::vector<plot::Panel> panels(const std::vector<Run>& runs, const Args& a) {
  const std::set<int> sizes(a.prompts.begin(), a.prompts.end()), gens(a.gens.begin(), a.gens.end());
  const std::set<int> depths(a.depths.begin(), a.depths.end());
  const bool over_depth = sizes.size() == 1 && depths.size() > 1;
  if (runs.empty()) return {};
  const bool one_device = std::ranges::all_of(runs, [&](const Run& r) { return r.plan.device == runs[0].plan.device; });
  const std::string where = one_device ? ", " + runs[0].plan.device : "";
  std::vector<plot::Panel> out = {{(over_depth ? "prefill of " + std::to_string(*sizes.begin()) : "prefill") + where,
                                   over_depth ? "tokens before it" : "tokens of the prompt", "tokens/s", {}},
                                  {"decode" + where, "tokens before it", "tokens/s", {}}};
  for (const Run& run : runs) {
    std::string name = run.label;
    for (const Run& other : runs)
      if (&other != &run && other.label == run.label) name = run.path;
    if (!one_device) name += ", " + run.plan.device;
    std::map<int, plot::Series> prefill, decode;  // by depth; by tokens generated
    for (const Result& r : run.results) {
      const double speed = r.speed().mean;
      if (r.kind != Result::Test || (r.prompt && r.gen)) continue;
      if (r.gen) decode[r.gen].points.push_back({static_cast<double>(r.depth), speed});
      else if (over_depth) prefill[0].points.push_back({static_cast<double>(r.depth), speed});
      else prefill[r.depth].points.push_back({static_cast<double>(r.prompt), speed});
    }
    for (auto* lines : {&prefill, &decode})
      for (auto& [key, series] : *lines) {
        series.name = name;
        if (lines == &prefill && !over_depth && depths.size() > 1) series.name += " @ d" + std::to_string(key);
        if (lines == &decode && gens.size() > 1) series.name += " tg" + std::to_string(key);
        std::ranges::sort(series.points, {}, &plot::Point::x);
        out[lines == &prefill ? 0 : 1].series.push_back(series);
      }
  }
  std::erase_if(out, [](const plot::Panel& p) { return p.series.empty(); });
  return out;
}

// ---- the program --------------------------------------------------------------------------------------------------------

// Positions that the tests need; what generates at depth 0 has one token before it.
int positions(const Args& a) {
  int read = 1, made = 0;
  for (int v : a.prompts) read = std::max(read, v);
  for (const auto* list : {&a.gens, &a.verify, &a.ops})
    for (int v : *list) made = std::max(made, v);
  for (const auto& [p, n] : a.both) read = std::max(read, p + n);
  const int depth = *std::ranges::max_element(a.depths);
  if (!a.acceptance.empty()) made = std::max(made, 64);
  return std::max(depth + read, std::max(depth, 1) + made);
}

void run_model(const std::string& path, const Args& a, std::vector<Run>& runs, Output& output) {
  Run& run = runs.emplace_back();
  run.path = path;
  Options options = a.options;
  const int need = positions(a);
  {
    const qn::QnFile file = qn::QnFile::open(path);
    if (!file.has("model.layer_kinds")) Engine::open(path, options);  // which says what this file is instead
    for (int64_t kind : file.integers("model.layer_kinds", qn::kMaxLayers, 0, 1)) run.attention_layers += kind == 1;
    const auto most = static_cast<int>(file.integer("model.context", 1, qn::kMaxContext));
    if (!options.ctx) options.ctx = std::min((need + 256) / 256 * 256, most);
    if (need > options.ctx)
      qn::fail("%s: the tests need %d positions, but %s; use smaller -p, -n or -d", path.c_str(), need,
               a.options.ctx ? qn::format("--ctx gives %d", options.ctx).c_str() : qn::format("the model was made for %d", most).c_str());
  }
  const double start = now();
  check_interrupt();
  Engine engine = Engine::open(path, options, [bars = a.verbose ? qn::progress_bars("B") : qn::Progress()](std::string_view what, uint64_t done, uint64_t all) {
    check_interrupt();  // of what came before; loading alone is simply ended
    if (bars) bars(what, done, all);
  });
  run.open_seconds = now() - start;
  run.info = engine.info(), run.plan = engine.plan(), run.load = engine.load_report();
  run.label = (run.info.name.empty() ? path : run.info.name) + " " + run.info.experts_format + "/" + run.info.rest_format;
  run.threads = options.threads ? options.threads : qn::default_threads();
  const uint64_t before = qn::peak_rss();
  run.measured = engine.read_bandwidth();
  if (qn::peak_rss() > before + (64 << 20)) run.measured_in = qn::peak_rss();
  else if (runs.size() > 1) run.measured_in = runs[runs.size() - 2].measured_in;
  run.roof = std::max(run.measured, a.bandwidth);
  if (run.plan.act == "int8") run.peak = engine.int8_peak();
  const int most_rows = std::min(run.plan.ubatch, run.plan.ctx);
  for (const auto* list : {&a.verify, &a.ops})
    for (int rows : *list)
      if (rows > most_rows)
        qn::fail("--verify and --ops: a pass takes at most %d tokens here, got %d; use a larger --ubatch", most_rows, rows);
  std::vector<int32_t> text;
  if (!a.text.empty()) {
    if (!engine.has_tokenizer())
      qn::fail("%s: the file has no tokenizer, so -f cannot be read; leave it out for random tokens", path.c_str());
    text = engine.tokenize(qn::read_text(a.text, 1 << 30), false);
    if (text.empty()) qn::fail("%s: the text is empty", a.text.c_str());
  }
  Bench(engine, a, run, text).all([&](const Result& r) { output.add(run, r); });
  run.offload = engine.offload_use();
  if (!run.offload.steps) return;
  try {
    run.outlook = engine.outlook();
  } catch (const qn::Error&) {  // no room to measure in: the results stand without it
  }
}

// A chart must not take the place of what is measured.
void check_chart(const Args& a) {
  const auto same = [&](const std::string& other) {
    std::error_code none;  // a file that is not there is none of ours
    if (std::filesystem::equivalent(a.plot, other, none)) qn::fail("--plot: %s is read by this run; name another file", a.plot.c_str());
  };
  for (const std::string& m : a.models) same(m);
  if (!a.text.empty()) same(a.text);
}

int run(const Args& a) {
  if (!a.plot.empty()) check_chart(a);
  std::optional<qn::OutFile> picture;  // refused before, not after hours of measuring
  if (!a.plot.empty() && plot::can_write_png()) picture.emplace(a.plot);
  else if (!a.plot.empty())
    std::cerr << "qnext-bench: --plot: nothing is drawn: stb_image_write.h was missing; install libstb-dev and build again\n";
  std::vector<Run> runs;
  runs.reserve(a.models.size());
  Output output(a.format);
  const auto report = [&](bool whole) {
    if (!whole) std::erase_if(runs, [](const Run& r) { return r.results.empty(); });
    output.end(runs, a, whole);
    const std::vector<plot::Panel> p = panels(runs, a);
    if (!picture || p.empty()) return;
    picture->write(0, plot::png(plot::draw(p)));
    picture->commit();
  };
  try {
    for (const std::string& path : a.models) run_model(path, a, runs, output);
  } catch (...) {  // hours of measuring may lie before it
    report(false);
    throw;
  }
  report(true);
  return 0;
}

// The first asks, when there is something to report; a second one, or one before there is, ends at once.
void stop(int signal) {
  if (measured_some && !signalled.exchange(signal)) {
    interrupted = true;
    return;
  }
  qn::remove_unfinished_files();
  _exit(128 + signal);
}

}  // namespace

int main(int argc, char** argv) {
  Args args;
  CLI::App app("How fast a model runs here, and how near to what the machine could do.", "qnext-bench");
  try {
    parse_args(app, args, argc, argv);
  } catch (const CLI::Success& e) {
    return qn::exit_code("qnext-bench", app.exit(e));
  } catch (const std::exception& e) {
    std::cerr << "qnext-bench: " << e.what() << " (see qnext-bench --help)\n";
    return 2;
  }
  for (const int s : {SIGINT, SIGTERM, SIGHUP})
    if (std::signal(s, stop) == SIG_IGN) std::signal(s, SIG_IGN);
  try {
    return qn::exit_code("qnext-bench", run(args));
  } catch (const Interrupted&) {
    std::cerr << "qnext-bench: interrupted; the report holds what was measured before\n";
    return 128 + signalled;
  } catch (const std::exception& e) {
    std::cerr << "qnext-bench: " << qn::format("%s", e.what()) << '\n';
    return 1;
  }
}
