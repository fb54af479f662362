// qnext: run Qwen3-Next on one machine. The public door; everything a program needs is here.
//
//   auto engine = qnext::Engine::open("model.qn", options);
//   qnext::Session session(engine);
//   session.sync(engine.chat_tokens(messages, {}));
//   session.generate(params, [](const qnext::Delivery& d) { std::cout << d.text; return true; });
//
// Errors: qnext::Error, one line: what, where, expected, got, what to try. An Engine may be shared by sessions that are used one
// at a time; it must outlive them.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ggml-lite/base/check.h"
#include "ggml-lite/core/device.h"   // LoadReport
#include "ggml-lite/core/forecast.h" // Speeds, Forecast
#include "ggml-lite/core/measure.h"  // OpTime, PassTime
#include "ggml-lite/text/chatml.h"   // Message, ToolCall, ChatStyle, Answer
#include "ggml-lite/text/sampler.h"  // SamplerParams

namespace qnext {

using qn::DraftCosts;
using qn::Error;
using qn::Message;
using qn::OpTime;
using qn::PassTime;
using qn::SamplerParams;

// ---- options --------------------------------------------------------------------------------------------------------

enum class Verify { Auto, Yes, No };  // checksums at open. Auto: of files under 1 GiB, and of weights that are copied to a GPU

struct Options {
  std::string device = "auto";      // auto | ref | cpu | cuda | cuda:0,1; numbers may repeat, and cpu,cpu is good for tests
  std::vector<int> split;           // layers of each device; empty: cut so that each holds about equally many bytes of its memory
  std::optional<std::string> act;   // f32 | bf16 | int8; default bf16 on CUDA, else int8
  std::string kv_type;              // f32 | bf16 | int8; default f32 with --act f32, else bf16
  std::string isa = "auto";         // CPU kernels: auto | scalar | avx2 | avx512
  int threads = 0;                  // 0: physical cores, or with large files on the CPU what reads memory faster
  int ctx = 0;                      // positions; 0: what the model allows, or fits
  double rope_yarn = 0;             // YaRN: context of the model times this; 0: what the file says
  int ubatch = 0;                   // tokens per pass in prefill; 0: chosen by the plan
  uint64_t ram = 0;                 // bytes this process may use; 0: what the system allows
  std::vector<uint64_t> vram;       // bytes of each GPU this process may use, the last number also of further ones; empty: what is free
  int slots = 0;                    // experts of every layer on the GPU, where not all fit; 0: as many as there is room for
  int fetch = 20;                   // experts that are not on the GPU: percent of those a token needs that it fetches; the CPU computes the others
  Verify verify = Verify::Auto;
  std::optional<bool> mapped;       // what the CPU reads stays pages of the file; default: without a GPU where memory has no room for it, with one always
  bool graph = true;                // GPU: decode is one recording, replayed
  int draft = -1;                   // tokens guessed ahead of each pass: 0 to 7; -1: as many as pay. The text is the same
  bool mtp = false;                 // run the multi-token-prediction layer along, if the file has one, also without guessing (for its logits)
};

// One row per option, so that every program offers the same ones: for each row the program adds a flag "--name VALUE".
struct OptionRow {
  const char* flags;   // "--threads,-t"
  const char* value;   // "N"; "" for a switch
  const char* help;
  void (*set)(Options&, const std::string&);  // throws Error for a bad value
};
std::span<const OptionRow> options_table();

std::vector<std::string> list_devices();  // one line each, as --device takes them

// ---- the model ------------------------------------------------------------------------------------------------------

struct ModelInfo {
  std::string name, source;         // as the converter recorded
  int layers, width, vocab, context;
  int heads, kv_heads, head_dim, rotary_dim;
  int key_heads, value_heads, key_dim, value_dim, conv;
  int experts, chosen, expert_width, shared_width;
  double rope_theta, yarn_factor;   // yarn_factor 1: none
  bool mtp;
  std::string experts_format, rest_format;  // "int4 g128", "bf16"
  uint64_t file_bytes;
  uint64_t bytes_per_token;         // weights read for one decoded token, without KV and state
  qn::ChatStyle chat;
  std::vector<int32_t> end_tokens;
  SamplerParams sampling;           // generation defaults of the file
};

// Where everything goes, known before anything is allocated.
struct DevicePlan {
  std::string device;
  int begin, end;                        // its layers: [begin, end)
  uint64_t weights, kv, state, scratch;  // bytes
  int slots;                             // experts of every layer that are on it at a time, the others in memory of the host; 0: all
  uint64_t budget;                       // devices that share memory have an equal share of it each
};
struct Plan {
  std::string device;                    // the names of all, "cuda:0 (...) + cuda:1 (...)"
  std::string act, kv_type;              // in force: "int8", "bf16"
  int ctx, ubatch;
  uint64_t weights, kv, state, scratch;  // bytes; weights are mapped on the CPU, copied to a GPU
  uint64_t budget;                       // what may be used: memory of the process, or free memory of the GPU
  uint64_t host;                         // experts in memory of the host, those in slots, too; 0 when all are on GPUs
  bool pinned;                           // there is memory to pin them, so that GPUs can fetch them
  uint64_t ram;                          // what may be used of memory of the host
  std::vector<DevicePlan> devices;       // in the order of their layers; what is above is their sum
};

// How fast it will be, from bandwidths measured now (core/forecast.h)
struct Outlook {
  Plan plan;
  qn::Speeds speeds;
  qn::Forecast forecast;
  std::string advice;  // the change that helps decoding most; empty: none helps by 3 %
};

struct MemoryUse {
  uint64_t device_used, device_total;    // bytes of the GPUs: taken since the device was opened, and all; 0 on host devices
};

struct OffloadUse {  // experts that were not on the GPU and that the CPU computed so far; zero where all are there
  bool pinned;       // the GPU can fetch experts itself
  uint64_t steps, experts, ahead;  // ahead: of these experts, those it had in its caches because the router of the next layer tells early
  double seconds;
};

using Progress = std::function<void(std::string_view what, uint64_t done, uint64_t total)>;

// Sees intermediate values: layer -1 for what is outside the layers. rows x cols, valid during the call.
// Names: "embed", "layer" (residual after layer i), "experts" (ids chosen in layer i), "final_norm", "mtp_norm" (n after mtp.norm), "mtp_logits".
using TraceHook = std::function<void(int layer, std::string_view name, std::span<const float> values, int rows, int cols)>;

struct ChatOptions {
  const qn::Json* tools = nullptr;
  bool generation_prompt = true;
};

class Engine {
 public:
  // Validates, plans, places. Throws Error; nothing is allocated when the plan does not fit. On a GPU the memory of one session is
  // taken here, so that engines opened in turn share it without surprises; it is given to the first session.
  static Engine open(const std::string& path, const Options& options, const Progress& progress = {});
  // What open() would plan, and what to expect of it; takes two seconds of measuring, and no memory for the model.
  static Outlook outlook(const std::string& path, const Options& options);
  // Only the tokenizer of a file (works on files without weights).
  static Engine open_tokenizer(const std::string& path);
  Engine(Engine&&) noexcept;
  ~Engine();

  const ModelInfo& info() const;
  Outlook outlook() const;
  const Plan& plan() const;
  std::string device_name() const;
  const qn::LoadReport& load_report() const;  // how the weights got to the device, or into memory; zero where they are used as the file is mapped
  double read_bandwidth() const;              // bytes/s of a plain read of the memory that weights are in, measured now in what the plan leaves free
  double int8_peak() const;                   // int8 multiplications and additions/s of the first device, measured now in registers alone; 0: not measured
  MemoryUse memory_use() const;
  OffloadUse offload_use() const;

  bool has_tokenizer() const;
  std::vector<int32_t> tokenize(std::string_view text, bool control) const;  // control: recognise "<|im_end|>" and the like
  std::string_view token_bytes(int32_t id) const;  // bytes, not strings: a token may be half a character
  std::string detokenize(std::span<const int32_t> ids) const;
  bool shown(int32_t id) const;                     // false for special tokens
  std::vector<int32_t> chat_tokens(std::span<const Message> messages, const ChatOptions& options) const;
  qn::Answer parse_answer(std::string_view text, const qn::Json* tools) const;
  bool is_end(int32_t id) const;

  void trace(TraceHook hook);  // empty: off

 private:
  friend class Session;
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// ---- a conversation -------------------------------------------------------------------------------------------------

struct SyncResult {
  int reused = 0, prefilled = 0;
  bool interrupted = false;  // the session then ends at a token boundary before the last one; sync() again goes on
};

struct Delivery {
  int32_t id;            // the token; -1 for the last piece of text that was held back
  std::string_view text; // complete characters; may be empty, may hold text of earlier tokens. Special tokens have none.
};

enum class Finish { EndToken, StopString, Length, Interrupted, ContextFull };

struct GenerateParams {
  SamplerParams sampling;
  int max_tokens = -1;                 // -1: until the context is full
  std::vector<std::string> stop;       // text before a stop string is delivered, the string itself is not
  const std::atomic<bool>* interrupt = nullptr;
  bool stop_at_end_tokens = true;
};

struct GenerateResult {
  std::vector<int32_t> ids;            // delivered tokens (no end token)
  std::string text;                    // what was delivered
  Finish finish;
  double seconds = 0;
  uint64_t drafted = 0, accepted = 0;  // tokens guessed ahead, and those of them that were right
  double plain_seconds = 0;            // what a pass over one token takes here, as measured; 0: not known
};

struct Timings {  // of passes that have ended; in a generation on a GPU from a token's start until the next one is chosen
  uint64_t prefill_tokens = 0, decode_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
};

class Session {
 public:
  explicit Session(Engine& engine);
  Session(Session&&) noexcept;
  ~Session();

  // Makes the timeline equal to `tokens`: reuses the longest usable prefix, prefills the rest. A recurrent state cannot be cut, only
  // restored from a checkpoint; checkpoints are taken where turns begin and end. Throws Error when the context is too small.
  SyncResult sync(std::span<const int32_t> tokens, const Progress& progress = {}, const std::atomic<bool>* interrupt = nullptr);
  // sync() that hands out the logits of every new position (position, logits): for perplexity and checks.
  SyncResult sync_all(std::span<const int32_t> tokens, const std::function<void(int position, std::span<const float> logits)>& each);
  void step(int32_t token);                 // one decode
  std::span<const float> logits() const;    // (V) of the next token; valid until the next call
  const std::vector<int32_t>& tokens() const;
  int position() const;                     // == tokens().size()
  int context() const;
  // Goes back to `position` or, when no checkpoint allows it, to an earlier place; returns the position really reached.
  int rewind(int position);
  void clear();

  // Samples until something stops it. `deliver` returns false to stop. Afterwards the state ends exactly after the last token
  // delivered, whatever stopped it, so that the next sync() or generate() goes on from there.
  GenerateResult generate(const GenerateParams& params, const std::function<bool(const Delivery&)>& deliver);

  Timings timings() const;
  // Hash of everything the next token depends on (state, cache, logits): equal states give equal numbers on one device.
  uint64_t state_hash() const;

  // ---- for benchmarks
  // The timeline becomes `position` arbitrary tokens with random cache and state, as if computed; rewind(position) comes back here.
  void pretend(int position, uint64_t seed);
  // A pass over these tokens after the present position, at most Plan::ubatch: as a whole, or each kind of operation timed alone. The
  // session is afterwards where it was. Bytes are those of weights, state and cache; of experts each one that is chosen, once.
  PassTime pass(std::span<const int32_t> tokens);
  std::vector<OpTime> profile(std::span<const int32_t> tokens);
  uint64_t bytes_per_token() const;  // that decoding a token here has to move
  // From now on generations guess as Options::draft says, if the engine was opened to; acceptance >= 0: each guess is right by lottery, and
  // what comes out is no text.
  void speculate(int draft, double acceptance = -1);
  DraftCosts draft_costs();  // here; the session is afterwards where it was

 private:
  struct Stage;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace qnext
