// qnext-cli: one answer, a plain continuation, or a conversation. Only the model's words go to stdout; everything else (prompts,
// progress, statistics, errors) goes to stderr. Exit codes: 0, 1 bad input, 2 bad usage, 130 stopped by Ctrl-C.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <concepts>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <iostream>
#include <random>

#include <CLI/CLI.hpp>

#include "ggml-lite/base/file.h"  // read_text, read_stdin
#include "ggml-lite/base/json.h"  // Json
#include "ggml-lite/base/term.h"  // LineEditor, exit_code, progress_bars, style_on
#include "qnext.h"

using namespace qnext;
using qn::Json;
using qn::Style;

namespace {

constexpr const char* kVersion = "0.1.0";
constexpr uint64_t kMaxPrompt = 64 << 20;  // bytes of a prompt, from wherever it comes

struct ClosedOutput {};  // whoever read our stdout has gone: end quietly

std::atomic<bool> interrupted;
std::atomic<int64_t> interrupted_at;

// The first Ctrl-C asks; a pass through the model may take seconds to hear it. One that comes later than that means something hangs.
void on_interrupt(int) {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  if (!interrupted.exchange(true)) interrupted_at = t.tv_sec;
  else if (t.tv_sec - interrupted_at > 10) _exit(130);
}

// From here on Ctrl-C asks an answer to end. While a prompt is read that may never come it ends the program.
void hear_interrupts() {
  struct sigaction action {};
  action.sa_handler = on_interrupt;  // no SA_RESTART: reading a line shall end, too
  sigaction(SIGINT, &action, nullptr);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void words(std::string_view s) {
  if (std::fwrite(s.data(), 1, s.size(), stdout) == s.size() && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw ClosedOutput();
  qn::fail("standard output: %s", std::strerror(errno));
}

Json whole(std::integral auto v) { return Json::number(static_cast<int64_t>(v)); }

void note(std::string_view s, Style style = Style::Dim) {
  std::cerr << qn::style_on(style) << s << qn::style_off() << '\n' << std::flush;
}

// ---- options --------------------------------------------------------------------------------------------------------

// Sampling parameters: flags of the program and names of /set.
struct SamplerRow {
  const char *name, *value, *help;
  void (*set)(SamplerParams&, const std::string&);
  std::string (*get)(const SamplerParams&);
};

template <class T>
T parse_number(const std::string& text, const char* kind) {
  T v{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), v);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) qn::fail("expected %s, got \"%s\"",
                                                            kind, text.c_str());
  return v;
}

template <auto Member>
constexpr SamplerRow sampler_row(const char* name, const char* value, const char* help) {
  using T = std::remove_cvref_t<decltype(SamplerParams{}.*Member)>;
  return {name, value, help,
          [](SamplerParams& p, const std::string& s) {
            if constexpr (std::is_floating_point_v<T>) p.*Member = parse_number<T>(s, "a number");
            else p.*Member = static_cast<T>(parse_number<std::conditional_t<std::is_same_v<T, int>, int, int64_t>>(s, "a whole number"));
            if constexpr (std::is_unsigned_v<T>)
              if (static_cast<int64_t>(p.*Member) < 0) qn::fail("expected a number of at least 0, got \"%s\"", s.c_str());
          },
          [](const SamplerParams& p) {
            if constexpr (std::is_floating_point_v<T>) return qn::format("%g", p.*Member);
            else return std::to_string(p.*Member);
          }};
}

constexpr SamplerRow kSamplerRows[] = {
    sampler_row<&SamplerParams::temperature>("temp", "X", "temperature; 0 always takes the likeliest token"),
    sampler_row<&SamplerParams::top_k>("top-k", "N", "keep the N likeliest tokens; 0: all"),
    sampler_row<&SamplerParams::top_p>("top-p", "X", "keep the likeliest tokens that reach probability X; 1: all"),
    sampler_row<&SamplerParams::min_p>("min-p", "X", "keep tokens at least X times as likely as the likeliest; 0: all"),
    sampler_row<&SamplerParams::repetition_penalty>("repeat-penalty", "X", "divides the logits of tokens seen before; 1: none"),
    sampler_row<&SamplerParams::presence_penalty>("presence-penalty", "X", "subtracted from the logits of tokens seen before"),
    sampler_row<&SamplerParams::frequency_penalty>("frequency-penalty", "X", "subtracted once for each time a token was seen"),
    sampler_row<&SamplerParams::penalty_window>("penalty-window", "N", "how many of the last tokens count as seen; 0: all"),
    sampler_row<&SamplerParams::seed>("seed", "N", "the same seed gives the same text; default: random"),
};

void set_sampler(SamplerParams& params, const std::string& name, const std::string& value) {
  for (const SamplerRow& row : kSamplerRows)
    if (name == row.name) {
      SamplerParams changed = params;
      try {
        row.set(changed, value);
      } catch (const Error& e) {
        qn::fail("--%s: %s", row.name, e.what());
      }
      check(changed);
      params = changed;
      return;
    }
  std::string all;
  for (const SamplerRow& row : kSamplerRows) all += std::string(all.empty() ? "" : ", ") + row.name;
  qn::fail("unknown setting \"%s\": expected one of %s", name.c_str(), all.c_str());
}

struct Args {
  Options options;
  std::string model, prompt, file, system, tools_file;
  std::vector<std::string> stop;
  std::vector<std::pair<std::string, std::string>> sampling;  // name, value: on top of what the file recommends
  int max_tokens = -1;
  bool has_prompt = false, has_file = false, raw = false, chat = false, json = false, tokenize = false, detokenize = false;
  bool plan = false, info = false, devices = false, show_prompt = false, verbose = false, no_colour = false;
};

// Throws CLI::ParseError or Error: bad usage.
void parse_args(CLI::App& app, Args& a, int argc, char** argv) {
  app.set_version_flag("--version", std::string("qnext-cli ") + kVersion);
  app.get_formatter()->column_width(32);
  app.footer("Without -p, -f or piped input a conversation begins; /help lists its commands.");
  app.add_option("-m,--model", a.model, "model file made by qnext-convert or qnext-quantize")->type_name("FILE");

  std::string group = "Prompt";
  auto* prompt = app.add_option("-p,--prompt", a.prompt, "answer this and end")->type_name("TEXT")->group(group);
  auto* file = app.add_option("-f,--file", a.file, "answer the text of this file and end")->type_name("FILE")->group(group);
  auto* raw = app.add_flag("--raw", a.raw, "continue the text as it stands, without the chat template")->group(group);
  auto* system = app.add_option("--system", a.system, "system message")->type_name("TEXT")->group(group);
  auto* tools = app.add_option("--tools", a.tools_file, "functions the model may call: a JSON array as in the OpenAI API")
      ->type_name("FILE")->group(group);
  auto* chat = app.add_flag("--chat", a.chat, "a conversation even when input is piped: one turn a line")->group(group);
  app.add_flag("--show-prompt", a.show_prompt, "print the rendered prompt to stderr")->group(group);

  group = "Answer";
  auto* tokens = app.add_option("-n,--tokens", a.max_tokens, "at most N tokens; default: until the context is full")
      ->type_name("N")->group(group);
  app.add_option("--stop", a.stop, "end before this text comes (repeatable)")
      ->type_name("TEXT")->group(group)->expected(1)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_flag("--json", a.json, "one JSON object instead of text: answer, tool calls, token counts, timings")->group(group);
  app.add_flag("-v,--verbose", a.verbose, "more on stderr: thoughts and statistics of one-shot answers")->group(group);
  app.add_flag("--no-color,--no-colour", a.no_colour, "no colours")->group(group);

  group = "Sampling (defaults come from the model file)";
  for (const SamplerRow& row : kSamplerRows)
    app.add_option_function<std::string>(
           std::string("--") + row.name, [&a, &row](const std::string& v) { a.sampling.emplace_back(row.name, v); }, row.help)
        ->type_name(row.value)->group(group);

  group = "Engine";
  for (const OptionRow& row : options_table()) {
    if (*row.value)
      app.add_option_function<std::string>(row.flags, [&a, &row](const std::string& v) { row.set(a.options, v); }, row.help)
          ->type_name(row.value)->group(group);
    else
      app.add_flag_function(row.flags, [&a, &row](int64_t) { row.set(a.options, ""); }, row.help)->group(group);
  }

  group = "Instead of an answer";
  auto* tokenize = app.add_flag("--tokenize", a.tokenize, "JSON lines {\"text\": ...} on stdin to {\"ids\": [...]}; needs no weights")->group(group);
  auto* detokenize = app.add_flag("--detokenize", a.detokenize, "the reverse")->group(group);
  auto* info = app.add_flag("--info", a.info, "facts about the model and the memory plan (also with --json)")->group(group);
  auto* plan = app.add_flag("--plan", a.plan, "where everything would go and how fast that would be, from two seconds of measuring; allocates nothing for the model (also with --json)")->group(group);
  app.add_flag("--list-devices", a.devices, "what --device can name here")->group(group);

  app.parse(argc, argv);

  const std::pair<CLI::Option*, CLI::Option*> conflicts[] = {{prompt, file}, {prompt, chat}, {file, chat}, {raw, chat}, {raw, system}, {raw, tools},
                                                             {tokenize, detokenize}, {tokenize, info}, {tokenize, plan}, {detokenize, info},
                                                             {detokenize, plan}, {info, plan}};
  for (const auto& [one, other] : conflicts)
    if (one->count() && other->count()) throw CLI::ExcludesError(one->get_name(), other->get_name());
  if (std::ranges::count(a.stop, "")) throw CLI::ValidationError("--stop", "expected a text that is not empty");
  if (a.max_tokens < 0 && tokens->count()) throw CLI::ValidationError("--tokens", "expected a number of at least 0");
  a.has_prompt = prompt->count() > 0, a.has_file = file->count() > 0;
  if (a.model.empty() && !a.devices) throw CLI::RequiredError("-m MODEL.qn");
  SamplerParams trial;
  for (const auto& [name, value] : a.sampling) set_sampler(trial, name, value);
}

// Some models think of their own accord where their template does not ask them to: that is set apart, too.
qn::Answer parse(const Engine& engine, std::string_view text, const Json* tools) {
  static constexpr std::string_view open = "<think>", close = "</think>";
  if (engine.info().chat == qn::ChatStyle::Thinking || !text.starts_with(open)) return engine.parse_answer(text, tools);
  const size_t end = std::min(text.find(close), text.size());
  auto trim = [](std::string_view s) {
    while (s.starts_with('\n')) s.remove_prefix(1);
    while (s.ends_with('\n')) s.remove_suffix(1);
    return s;
  };
  qn::Answer a = engine.parse_answer(trim(text.substr(std::min(end + close.size(), text.size()))), tools);
  a.reasoning = trim(text.substr(open.size(), end - open.size()));
  return a;
}

// ---- showing an answer ----------------------------------------------------------------------------------------------

// Splits streamed text into thoughts, answer and tool calls as it comes. What may become a tag is held back; so are newlines
// until more of the same part follows, so that parts can be set apart neatly.
class AnswerView {
 public:
  AnswerView(const Engine& engine, const Json* tools, bool plain, bool show_thoughts)
      : engine_(engine), tools_(tools), plain_(plain), show_thoughts_(show_thoughts), terminal_(qn::stdout_is_terminal()) {
    if (!plain && engine.info().chat == qn::ChatStyle::Thinking) part_ = Part::Thought;
  }

  void feed(std::string_view text) {
    if (plain_) return emit(text);
    held_ += text;
    while (step()) {
    }
  }

  void end() {
    if (part_ == Part::Call) call(held_);
    else emit(held_);
    held_.clear();
    if (part_ == Part::Answer && newlines_ > 0) words(std::string(newlines_, '\n')), line_open_ = false;
    if (line_open_) words("\n");
    if (thought_on_stderr_) std::cerr << '\n';
  }

 private:
  enum class Part { Thought, Answer, Call };
  struct Tag {
    const char *begin, *end;
  };
  // The second form without <tool_call> round it: some models forget that line.
  static constexpr Tag kCalls[] = {{"<tool_call>", "</tool_call>"}, {"<function=", "</function>"}};

  static size_t held_for(std::string_view text, std::string_view tag) {  // longest end of text that begins tag
    for (size_t n = std::min(text.size(), tag.size() - 1); n > 0; n--)
      if (text.ends_with(tag.substr(0, n))) return n;
    return 0;
  }

  bool step() {
    size_t at = held_.npos, hold = 0;
    if (part_ == Part::Call) {
      at = held_.find(call_end_);
      if (at == held_.npos) return false;
      at += std::strlen(call_end_);
      call(held_.substr(0, at));
      held_.erase(0, at);
      return begin(Part::Answer);
    }
    if (start_ && part_ == Part::Answer) {
      if (held_.size() < 7 && std::string_view("<think>").starts_with(held_)) return false;
      start_ = false;
      if (held_.starts_with("<think>")) return held_.erase(0, 7), begin(Part::Thought);
    }
    if (part_ == Part::Thought) {
      at = held_.find("</think>");
      hold = held_for(held_, "</think>");
    } else {
      for (const Tag& tag : kCalls) {
        if (const size_t p = held_.find(tag.begin); p < at) at = p, call_end_ = tag.end;
        hold = std::max(hold, held_for(held_, tag.begin));
      }
    }
    const bool found = at != held_.npos;
    const size_t out = found ? at : held_.size() - hold;
    emit(std::string_view(held_).substr(0, out));
    held_.erase(0, out + (found && part_ == Part::Thought ? std::strlen("</think>") : 0));
    return found && begin(part_ == Part::Thought ? Part::Answer : Part::Call);
  }

  bool begin(Part part) {
    if (line_open_ && (part_ == Part::Thought || part == Part::Call)) words(part_ == Part::Thought ? "\n\n" : "\n"), line_open_ = false;
    if (thought_on_stderr_) std::cerr << '\n', thought_on_stderr_ = false;
    part_ = part, fresh_ = true, newlines_ = 0;
    return true;
  }

  void emit(std::string_view text) {
    if (fresh_) text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
    if (text.empty()) return;
    const size_t solid = text.find_last_not_of('\n') + 1;
    std::string s;
    if (solid > 0) s = std::string(newlines_, '\n') + std::string(text.substr(0, solid)), newlines_ = 0;
    newlines_ += text.size() - solid;
    fresh_ = false;
    if (s.empty()) return;
    if (part_ != Part::Thought) return words(s), void(line_open_ = true);
    if (!show_thoughts_) return;
    if (terminal_) words(std::string(qn::style_on(Style::Dim, 1)) + s + std::string(qn::style_off(1))), line_open_ = true;
    else std::cerr << s << std::flush, thought_on_stderr_ = true;
  }

  // A whole call; what cannot be parsed is text like any other.
  void call(const std::string& text) {
    const qn::Answer a = engine_.parse_answer((engine_.info().chat == qn::ChatStyle::Thinking ? "</think>" : "") + text, tools_);
    if (a.calls.empty() || !terminal_) return words(text + "\n");
    for (const qn::ToolCall& c : a.calls)
      words(std::string(qn::style_on(Style::Cyan, 1)) + "call " + c.name + " " + c.arguments.dump_python() + std::string(qn::style_off(1)) + "\n");
  }

  const Engine& engine_;
  const Json* tools_;
  bool plain_, show_thoughts_, terminal_;
  Part part_ = Part::Answer;
  std::string held_;
  const char* call_end_ = "";
  size_t newlines_ = 0;
  bool start_ = true;               // nothing has been shown
  bool fresh_ = false;              // at the start of a part whose leading newlines are dropped
  bool line_open_ = false;          // stdout is not at the start of a line
  bool thought_on_stderr_ = false;
};

// ---- one answer -----------------------------------------------------------------------------------------------------

const char* name(Finish f) {
  switch (f) {
    case Finish::EndToken: return "end";
    case Finish::StopString: return "stop";
    case Finish::Length: return "length";
    case Finish::Interrupted: return "interrupted";
    case Finish::ContextFull: return "context";
  }
  return "";
}

double rate(double n, double seconds) { return seconds > 0 ? n / seconds : 0; }

struct Reply {
  SyncResult sync;
  GenerateResult made;
  qn::Answer answer;
};

// Engine, session and how to show what they say: what one-shot runs and conversations share.
class Speaker {
 public:
  Speaker(Engine& engine, const Args& args, double load_seconds) : engine(engine), args(args), session_(engine), load_seconds_(load_seconds) {
    sampling = engine.info().sampling;
    sampling.seed = std::random_device()();
    for (const auto& [name, value] : args.sampling) set_sampler(sampling, name, value);
    if (!args.tools_file.empty()) tools_ = Json::parse(qn::read_text(args.tools_file, 16 << 20), args.tools_file);
  }

  const Json* tools() const { return tools_.is_null() ? nullptr : &tools_; }
  std::vector<int32_t> chat_tokens(std::span<const Message> messages) const {
    return engine.chat_tokens(messages, {.tools = tools(), .generation_prompt = true});
  }

  // `stats`: the line after the answer. Sync interrupted: nothing was generated, nothing shown.
  Reply say(const std::vector<int32_t>& prompt, bool plain, uint64_t seed, bool stats) {
    if (args.show_prompt) note(engine.detokenize(prompt), Style::Plain);
    Reply r;
    const double start = now();
    r.sync = session_.sync(prompt, qn::progress_bars("tokens"), &interrupted);
    const double prompt_seconds = now() - start;
    if (r.sync.interrupted) return r;

    GenerateParams p;
    p.sampling = sampling;
    p.sampling.seed = seed;
    p.max_tokens = args.max_tokens, p.stop = args.stop, p.interrupt = &interrupted;
    AnswerView view(engine, tools(), plain, qn::stdout_is_terminal() || args.verbose);
    r.made = session_.generate(p, [&](const Delivery& d) {
      if (!args.json) view.feed(d.text);
      return true;
    });
    if (!args.json) view.end();
    r.answer.content = r.made.text;
    if (!plain) r.answer = parse(engine, r.made.text, tools());
    if (args.json) words(json(r, prompt.size(), seed, prompt_seconds).dump() + "\n");
    if (stats) {
      auto per_second = [](double n, double seconds) { return n > 0 ? qn::format(", %.1f/s", rate(n, seconds)) : ""; };
      const double weights = static_cast<double>(engine.info().bytes_per_token) / 1e9;
      const double generated = static_cast<double>(r.made.ids.size());
      note(qn::format("prompt %zu tokens (%d reused)", prompt.size(), r.sync.reused) + per_second(r.sync.prefilled, prompt_seconds) +
           qn::format("; answer %.0f tokens", generated) + per_second(generated, r.made.seconds) +
           (generated > 0 ? qn::format(", %.1f GB/s of weights", rate(generated * weights, r.made.seconds)) : "") +
           drafts(r.made) + (r.made.finish == Finish::Length ? "; length" : "") +
           (r.made.finish == Finish::ContextFull ? "; the context is full" : r.made.finish == Finish::Interrupted ? "; stopped" : ""));
    }
    return r;
  }

  void forget() { session_.clear(); }

  Engine& engine;
  const Args& args;
  SamplerParams sampling;

 private:
  // How many times as fast as with plain steps, which were measured on the way
  static double speed_up(const GenerateResult& r) { return rate(static_cast<double>(r.ids.size()) * r.plain_seconds, r.seconds); }
  static std::string drafts(const GenerateResult& r) {
    if (!r.drafted) return "";
    return qn::format("; accepted %llu/%llu drafts", static_cast<unsigned long long>(r.accepted), static_cast<unsigned long long>(r.drafted)) +
           (r.plain_seconds > 0 ? qn::format(", %.2f x the plain speed", speed_up(r)) : "");
  }

  Json json(const Reply& r, size_t prompt_tokens, uint64_t seed, double prompt_seconds) const {
    Json calls = Json::array();
    for (const qn::ToolCall& c : r.answer.calls) calls.push(Json::object().set("name", Json::string(c.name)).set("arguments", c.arguments));
    const double generated = static_cast<double>(r.made.ids.size());
    return Json::object()
        .set("text", Json::string(r.answer.content))
        .set("reasoning", Json::string(r.answer.reasoning))
        .set("tool_calls", calls)
        .set("finish", Json::string(name(r.made.finish)))
        .set("prompt_tokens", whole(prompt_tokens))
        .set("reused_tokens", whole(r.sync.reused))
        .set("generated_tokens", whole(r.made.ids.size()))
        .set("drafted_tokens", whole(r.made.drafted))
        .set("accepted_tokens", whole(r.made.accepted))
        .set("seed", whole(seed))
        .set("model", Json::string(engine.info().name))
        .set("device", Json::string(engine.device_name()))
        .set("timings", Json::object()
                            .set("load_seconds", Json::number(load_seconds_))
                            .set("prompt_seconds", Json::number(prompt_seconds))
                            .set("prompt_tokens_per_second", Json::number(rate(r.sync.prefilled, prompt_seconds)))
                            .set("generate_seconds", Json::number(r.made.seconds))
                            .set("generate_tokens_per_second", Json::number(rate(generated, r.made.seconds)))
                            .set("plain_step_seconds", Json::number(r.made.plain_seconds))
                            .set("weight_bytes_per_token", whole(engine.info().bytes_per_token))
                            .set("weight_gb_per_second", Json::number(rate(generated * static_cast<double>(engine.info().bytes_per_token) / 1e9, r.made.seconds))));
  }

  Session session_;
  Json tools_;
  double load_seconds_;
};

// ---- a conversation -------------------------------------------------------------------------------------------------

class Chat {
 public:
  explicit Chat(Speaker& speaker) : speaker_(speaker) { set_system(speaker.args.system); }

  int run() {
    const bool terminal = qn::stdin_is_terminal();
    if (terminal)
      note(speaker_.engine.info().name + ", " + speaker_.engine.device_name() + ", " + std::to_string(speaker_.engine.plan().ctx) +
           " positions. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.");
    bool asked = false;
    for (std::string line; !done_;) {
      bool stopped = false;
      interrupted = false;
      if (!editor_.read_line("> ", line, stopped)) break;
      if (stopped || interrupted) {
        if (asked || !terminal) return 130;
        note("Ctrl-C again ends; so do /exit and Ctrl-D.");
        asked = true;
        continue;
      }
      asked = false;
      try {
        if (!command(line) && line.find_first_not_of(" \t\n") != line.npos) turn({"user", line});
      } catch (const qn::DeviceLost&) {
        throw;
      } catch (const Error& e) {
        note(std::string("qnext-cli: ") + e.what(), Style::Red);
      }
    }
    return 0;
  }

 private:
  static Message message(const char* role, const std::string& text) {
    Message m;
    m.role = role, m.content = text;
    return m;
  }

  void set_system(const std::string& text) {
    if (!messages_.empty() && messages_[0].role == "system") messages_.erase(messages_.begin());
    if (!text.empty()) messages_.insert(messages_.begin(), message("system", text));
  }

  void turn(const std::pair<const char*, std::string>& said) {
    messages_.push_back(message(said.first, said.second));
    attempt_ = 0;
    try {
      if (!answer()) messages_.pop_back(), note("stopped before the first word; the turn is dropped");
    } catch (...) {
      messages_.pop_back();
      throw;
    }
  }

  // false: stopped before the first word; the conversation is as before.
  bool answer() {
    const Reply r = speaker_.say(speaker_.chat_tokens(messages_), false, (speaker_.sampling.seed + attempt_) & INT64_MAX, true);
    if (r.sync.interrupted || (r.made.ids.empty() && r.made.finish == Finish::Interrupted)) return false;
    Message m = message("assistant", r.answer.content);
    if (speaker_.engine.info().chat == qn::ChatStyle::Thinking) m.reasoning = r.answer.reasoning;
    m.calls = r.answer.calls, m.ids = r.made.ids;
    messages_.push_back(std::move(m));
    if (!r.answer.calls.empty() && qn::stdin_is_terminal()) note("/tool RESULT answers the call");
    return true;
  }

  void regenerate() {
    if (messages_.empty() || messages_.back().role != "assistant") return note("there is no answer to make again");
    Message old = std::move(messages_.back());
    messages_.pop_back();
    attempt_++;  // another seed, or the answer would be the same
    try {
      if (answer()) return;
      note("stopped before the first word; the answer stays as it was");
    } catch (...) {
      messages_.push_back(std::move(old));
      throw;
    }
    messages_.push_back(std::move(old));
  }

  void undo() {
    size_t n = messages_.size();
    while (n > 0 && messages_[n - 1].role != "user" && messages_[n - 1].role != "tool") n--;
    if (n == 0) return note("there is nothing to undo");
    note("undone: " + beginning(messages_[n - 1].content));
    messages_.resize(n - 1);
    attempt_ = 0;
  }

  static std::string beginning(const std::string& s) {
    size_t end = std::min<size_t>(s.size(), 60);
    while (end > 0 && end < s.size() && (s[end] & 0xc0) == 0x80) end--;  // not inside a character
    return qn::format("%s", s.substr(0, end).c_str()) + (end < s.size() ? "..." : "");
  }

  void settings() const {
    for (const SamplerRow& row : kSamplerRows) note(qn::format("%-18s %s", row.name, row.get(speaker_.sampling).c_str()));
  }

  void help() const {
    note("/regen           answer the last turn again\n"
         "/undo            take back the last turn\n"
         "/clear           start over (the system message stays)\n"
         "/system TEXT     set the system message; without TEXT remove it\n"
         "/read FILE       say the text of a file\n"
         "/tool RESULT     give the result of a tool call\n"
         "/set NAME VALUE  change a sampling parameter; without NAME show them, the seed too\n"
         "/exit            end (also Ctrl-D)\n"
         "Ctrl-C stops an answer. A line ending in \\ goes on with the next one.");
  }

  // false: no command but something to say. A path such as /etc/hosts is no command.
  bool command(const std::string& line) {
    if (!line.starts_with('/')) return false;
    const size_t end = line.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", 1);
    const std::string word = line.substr(1, end - 1);
    if (word.empty() || (end != line.npos && line[end] != ' ')) return false;
    const std::string rest = end == line.npos ? "" : line.substr(end + 1);
    const size_t first = rest.find_first_not_of(' '), last = rest.find_last_not_of(' ');
    const std::string name = first == rest.npos ? "" : rest.substr(first, last + 1 - first);  // of a file; of a setting, and its value
    if (word == "help") help();
    else if (word == "clear") messages_.resize(!messages_.empty() && messages_[0].role == "system"), speaker_.forget(), attempt_ = 0;
    else if (word == "regen") regenerate();
    else if (word == "undo") undo();
    else if (word == "exit" || word == "quit") done_ = true;
    else if (word == "system") set_system(rest);
    else if (word == "read") turn({"user", qn::read_text(name, kMaxPrompt)});
    else if (word == "tool") turn({"tool", rest});
    else if (word == "set" && name.empty()) settings();
    else if (word == "set") {
      const size_t gap = std::min(name.find(' '), name.size()), value = name.find_first_not_of(' ', gap);
      set_sampler(speaker_.sampling, name.substr(0, gap), value == name.npos ? "" : name.substr(value));
    }
    else note("unknown command /" + word + "; /help lists them");
    return true;
  }

  Speaker& speaker_;
  qn::LineEditor editor_;
  std::vector<Message> messages_;
  uint64_t attempt_ = 0;
  bool done_ = false;
};

// ---- the other things it does -----------------------------------------------------------------------------------------

// One JSON object a line from stdin, one a line to stdout.
int convert_lines(const Engine& engine, bool to_ids) {
  std::string line;
  for (int64_t n = 1; std::getline(std::cin, line); n++) {
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    const std::string where = "standard input, line " + std::to_string(n);
    const Json in = Json::parse(line, where);
    const char* key = to_ids ? "text" : "ids";
    const Json* v = in.find(key);
    if (!v || (to_ids ? !v->is_string() : !v->is_array()))
      qn::fail("%s: expected an object such as %s", where.c_str(), to_ids ? "{\"text\": \"Hello\"}" : "{\"ids\": [9707, 1879]}");
    Json out = Json::object();
    if (to_ids) {
      Json ids = Json::array();
      for (int32_t id : engine.tokenize(v->as_string(key), true)) ids.push(Json::number(static_cast<int64_t>(id)));
      out.set("ids", std::move(ids));
    } else {
      std::vector<int32_t> ids;
      for (const Json& id : v->items()) {
        const int64_t i = id.as_int(where + ": ids");
        if (i < 0 || i > INT32_MAX || engine.token_bytes(static_cast<int32_t>(i)).empty())
          qn::fail("%s: id %lld has no token", where.c_str(), static_cast<long long>(i));
        ids.push_back(static_cast<int32_t>(i));
      }
      out.set("text", Json::string(engine.detokenize(ids)));
    }
    words(out.dump() + "\n");
  }
  return 0;
}

Json devices_json(const Plan& p) {
  Json parts = Json::array();
  for (const DevicePlan& d : p.devices)
    parts.push(Json::object().set("device", Json::string(d.device)).set("first_layer", whole(d.begin)).set("layers", whole(d.end - d.begin))
                   .set("weights_bytes", whole(d.weights)).set("kv_bytes", whole(d.kv)).set("state_bytes", whole(d.state))
                   .set("scratch_bytes", whole(d.scratch)).set("budget_bytes", whole(d.budget)).set("expert_slots", whole(d.slots)));
  return parts;
}

Json plan_json(const qnext::Outlook& o) {
  const qn::Forecast& f = o.forecast;
  return Json::object()
      .set("devices", devices_json(o.plan))
      .set("planned_context", whole(o.plan.ctx)).set("kv_type", Json::string(o.plan.kv_type)).set("ubatch", whole(o.plan.ubatch))
      .set("host_experts_bytes", whole(o.plan.host)).set("pinned", Json::boolean(o.plan.pinned)).set("ram_bytes", whole(o.plan.ram))
      .set("measured_bytes_per_second", Json::object().set("gpu", Json::number(o.speeds.gpu)).set("bus", Json::number(o.speeds.bus))
                                            .set("host", Json::number(o.speeds.host)).set("disk", Json::number(o.speeds.disk)))
      .set("decode_tokens_per_second", Json::number(f.decode)).set("prefill_2048_tokens_per_second", Json::number(f.prefill[0]))
      .set("prefill_8192_tokens_per_second", Json::number(f.prefill[1])).set("missing_experts", Json::number(f.misses))
      .set("seconds_of_a_token", Json::object().set("device", Json::number(f.seconds[0])).set("bus", Json::number(f.seconds[1])).set("host", Json::number(f.seconds[2])))
      .set("faster_with", Json::string(o.advice));
}

int print_plan(const std::string& path, const Options& options, bool json) {
  const qnext::Outlook o = Engine::outlook(path, options);
  if (json) return words(plan_json(o).dump() + "\n"), 0;
  const auto row = [](const std::string& what, const std::string& text) { words(qn::format("%-12s %s", what.c_str(), text.c_str()) + "\n"); };
  const auto gib = [](uint64_t v) { return qn::human_gib(v); };
  for (const DevicePlan& d : o.plan.devices) {
    row(d.device.substr(0, d.device.find(' ')), qn::format("layers %d to %d: weights %s, KV cache %s, state %s, scratch %s; %s of %s", d.begin, d.end - 1, gib(d.weights).c_str(),
                                                          gib(d.kv).c_str(), gib(d.state).c_str(), gib(d.scratch).c_str(), gib(d.weights + d.kv + d.state + d.scratch).c_str(), gib(d.budget).c_str()));
    if (d.slots) row("", qn::format("%d experts of every layer at a time, the others in memory of the host", d.slots));
  }
  row("context", qn::format("%d positions, cache %s, passes of up to %d tokens", o.plan.ctx, o.plan.kv_type.c_str(), o.plan.ubatch));
  if (o.plan.host)
    row("host", qn::format("experts %s, %s %s", gib(o.plan.host).c_str(), o.plan.pinned ? "pinned in" : "pages of the file, not pinned: there are", gib(o.plan.ram).c_str()) + " of memory");
  row("measured", (o.speeds.gpu > 0 ? qn::format("GPU memory %.0f GB/s, bus %.1f GB/s, ", o.speeds.gpu / 1e9, o.speeds.bus / 1e9) : std::string()) +
                      qn::format("memory of the host %.1f GB/s", o.speeds.host / 1e9) + (o.speeds.disk > 0 ? qn::format(", disk %.1f GB/s: not all experts fit in memory", o.speeds.disk / 1e9) : std::string()));
  const qn::Forecast& f = o.forecast;
  row("decode", qn::format("about %.1f tokens/s", f.decode) + (f.misses > 0 ? qn::format(": %.1f ms on the device, then %.1f ms by the CPU beside %.1f ms of fetching; %.1f experts of a token and layer missing, if it chooses evenly",
                                                                                        1e3 * f.seconds[0], 1e3 * f.seconds[2], 1e3 * f.seconds[1], f.misses) : std::string()));
  row("prefill", qn::format("about %.0f tokens/s of 2048, %.0f of 8192", f.prefill[0], f.prefill[1]));
  if (!o.advice.empty()) row("faster", "decode with " + o.advice);
  return 0;
}

int print_info(const Engine& engine, bool json) {
  const ModelInfo& m = engine.info();
  const Plan& p = engine.plan();
  static const char* const styles[] = {"none", "instruct", "thinking", "coder"};
  Json o = Json::object();
  auto text = [&](const char* key, const std::string& v) { o.set(key, Json::string(v)); };
  auto number = [&](const char* key, auto v) {
    if constexpr (std::is_floating_point_v<decltype(v)>) o.set(key, Json::number(v));
    else o.set(key, Json::number(static_cast<int64_t>(v)));
  };
  text("name", m.name), text("source", m.source), text("chat", styles[static_cast<int>(m.chat)]);
  number("layers", m.layers), number("width", m.width), number("vocab", m.vocab), number("context", m.context);
  number("attention_heads", m.heads), number("kv_heads", m.kv_heads), number("head_dim", m.head_dim), number("rotary_dim", m.rotary_dim);
  number("rope_theta", m.rope_theta), number("yarn_factor", m.yarn_factor);
  number("delta_key_heads", m.key_heads), number("delta_value_heads", m.value_heads);
  number("delta_key_dim", m.key_dim), number("delta_value_dim", m.value_dim);
  number("experts", m.experts), number("experts_per_token", m.chosen);
  number("expert_width", m.expert_width), number("shared_width", m.shared_width);
  o.set("multi_token_prediction", Json::boolean(m.mtp));
  text("experts_format", m.experts_format), text("rest_format", m.rest_format);
  number("file_bytes", m.file_bytes), number("read_per_token_bytes", m.bytes_per_token);
  for (const SamplerRow& row : kSamplerRows)
    if (row.name != std::string_view("seed")) o.set(std::string("default_") + row.name, Json::parse(row.get(m.sampling), row.name));
  text("device", p.device), text("activations", p.act), text("kv_type", p.kv_type), number("planned_context", p.ctx), number("ubatch", p.ubatch);
  number("weights_bytes", p.weights), number("kv_bytes", p.kv), number("state_bytes", p.state);
  number("scratch_bytes", p.scratch), number("budget_bytes", p.budget);
  if (json) return words(o.set("devices", devices_json(p)).dump() + "\n"), 0;
  for (auto [key, value] : o.members()) {
    const bool bytes = key.ends_with("_bytes");
    const std::string shown = value.is_string() ? value.as_string(key) : bytes ? qn::human_gib(static_cast<uint64_t>(value.as_int(key))) : value.dump();
    if (bytes) key.resize(key.size() - 6);
    std::replace(key.begin(), key.end(), '_', ' ');
    words(qn::format("%-26s %s", key.c_str(), shown.c_str()) + "\n");
  }
  for (const DevicePlan& d : p.devices) {
    if (p.devices.size() == 1) break;
    const std::string layers = qn::format("layers %d to %d", d.begin, d.end - 1);
    words(qn::format("%-26s %s: weights %s, cache %s, state %s, scratch %s of %s", layers.c_str(), d.device.c_str(), qn::human_gib(d.weights).c_str(),
                     qn::human_gib(d.kv).c_str(), qn::human_gib(d.state).c_str(), qn::human_gib(d.scratch).c_str(), qn::human_gib(d.budget).c_str()) + "\n");
  }
  return 0;
}

int one_shot(Speaker& speaker, const Args& a, bool raw) {
  std::string text = a.has_prompt ? a.prompt : a.has_file ? qn::read_text(a.file, kMaxPrompt) : qn::read_stdin(kMaxPrompt);
  if (!raw && !a.has_prompt && text.ends_with('\n')) text.erase(text.size() - (text.ends_with("\r\n") ? 2 : 1));  // the end of the file, not of the sentence
  if (text.empty()) qn::fail("the prompt is empty");
  hear_interrupts();
  std::vector<int32_t> prompt;
  if (raw) {
    prompt = speaker.engine.tokenize(text, false);
  } else {
    std::vector<Message> messages(a.system.empty() ? 1 : 2);
    messages.front().role = "system", messages.front().content = a.system;
    messages.back().role = "user", messages.back().content = text;
    prompt = speaker.chat_tokens(messages);
  }
  const Reply r = speaker.say(prompt, raw, speaker.sampling.seed, a.verbose || qn::stderr_is_terminal());
  if (!a.json && !a.verbose && !qn::stdout_is_terminal() && r.made.finish == Finish::Length && r.answer.content.empty() && !r.answer.reasoning.empty())
    note("-n ended the answer in the midst of a thought, which -v shows");
  return r.sync.interrupted || r.made.finish == Finish::Interrupted ? 130 : 0;
}

int run(const Args& a) {
  if (a.devices) {
    for (const std::string& d : list_devices()) words(d + "\n");
    return 0;
  }
  if (a.tokenize || a.detokenize) return convert_lines(Engine::open_tokenizer(a.model), a.tokenize);
  if (a.plan) return print_plan(a.model, a.options, a.json);
  const double start = now();
  if (a.info) return print_info(Engine::open(a.model, a.options, qn::progress_bars("B")), a.json);
  // What can be said without the weights is said before they are read: that takes a tenth of a second, they many
  const bool base = Engine::open_tokenizer(a.model).info().chat == qn::ChatStyle::None;
  const bool chat = a.chat || (!a.has_prompt && !a.has_file && qn::stdin_is_terminal());
  if (chat && (base || a.raw)) qn::fail("%s: text is continued, not answered, %s; give it with -p, -f or standard input",
                                        a.model.c_str(), a.raw ? "with --raw" : "by a base model");
  if (base && (!a.system.empty() || !a.tools_file.empty())) qn::fail("%s: a base model has no chat template: --system and --tools mean nothing to it",
                                                            a.model.c_str());
  Engine engine = Engine::open(a.model, a.options, qn::progress_bars("B"));
  Speaker speaker(engine, a, now() - start);
  if (!chat) return one_shot(speaker, a, a.raw || base);
  if (qn::is_directory("/dev/stdin")) qn::fail("standard input: is a folder, expected lines");
  hear_interrupts();
  return Chat(speaker).run();
}

int usage(const std::string& what) {
  std::cerr << "qnext-cli: " << what << " (see qnext-cli --help)\n";
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  // A file opened later must not become standard output; without one there is nobody to talk to.
  if (fcntl(0, F_GETFD) < 0 && !std::freopen("/dev/null", "r", stdin)) return 1;
  if (fcntl(1, F_GETFD) < 0 && !std::freopen("/dev/null", "w", stdout)) return 1;
  if (fcntl(2, F_GETFD) < 0 && !std::freopen("/dev/null", "w", stderr)) return 1;
  std::signal(SIGPIPE, SIG_IGN);
  Args args;
  CLI::App app("Run Qwen3-Next on this machine.", "qnext-cli");
  try {
    parse_args(app, args, argc, argv);
  } catch (const CLI::Success& e) {
    return qn::exit_code("qnext-cli", app.exit(e));  // --help, --version
  } catch (const std::exception& e) {
    return usage(e.what());
  }
  qn::colours(!args.no_colour);
  try {
    return run(args);
  } catch (const ClosedOutput&) {
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "qnext-cli: " << qn::format("%s", e.what()) << '\n';
    return 1;
  }
}
