// Guessing ahead changes nothing but the time: the tokens, the text and the state are those of plain decoding, whatever is guessed, however
// many guesses are right, and wherever a generation ends.
//
// The long ones, run by hand:  qnext-tests -tc="*by hand*" --no-skip
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <fstream>
#include <map>
#include <numeric>

#include "cuda/cuda.h"
#include "ggml-lite/core/loader.h"
#include "ggml-lite/nn/decoder.h"
#include "ggml-lite/ref/ref.h"
#include "qnext.h"
#include "tests/models.h"

namespace {

using namespace qnext;
using qn::DType;
using qn::TestModels;
using Ids = std::vector<int32_t>;

bool no_gpu() {
  if (!qn::list_cuda_devices().empty()) return false;
  MESSAGE("SKIPPED: no GPU");
  return true;
}

Options options(const char* device, const char* act, int draft) {
  Options o;
  o.device = device, o.act = act, o.threads = 1, o.ctx = 1024, o.draft = draft, o.mtp = true;  // the layer runs along without guesses, too
  return o;
}

// Beginnings of stories that the model was not trained on
std::vector<std::string> beginnings(int n) {
  std::ifstream in(std::string(QN_STORIES) + "/heldout.txt");
  std::vector<std::string> out;
  for (std::string line; std::getline(in, line) && static_cast<int>(out.size()) < n;)
    if (line.size() > 60 && line.find('|') == std::string::npos) out.push_back(line.substr(0, line.find(' ', 30 + out.size() % 20)));
  return out;
}

GenerateParams params(int tokens, float temperature = 0, uint64_t seed = 0) {
  GenerateParams p;
  p.max_tokens = tokens, p.sampling.temperature = temperature, p.sampling.seed = seed;
  return p;
}

struct Count {
  uint64_t drafted = 0, accepted = 0, tokens = 0, passes = 0;
};

// The same prompt on both sessions; everything that comes out has to be the same.
void same(Session& plain, Session& many, const Ids& prompt, const GenerateParams& p, Count* count = nullptr) {
  plain.sync(prompt), many.sync(prompt);
  const GenerateResult a = plain.generate(p, {}), b = many.generate(p, {});
  CHECK(a.ids == b.ids);
  CHECK(a.text == b.text);
  CHECK(a.finish == b.finish);
  CHECK(plain.tokens() == many.tokens());
  CHECK(plain.state_hash() == many.state_hash());
  if (count) count->drafted += b.drafted, count->accepted += b.accepted, count->tokens += b.ids.size();
}

void same_texts(const char* device, const char* act, DType experts, int group, int texts, int tokens, double seconds) {
  const std::string path = TestModels::get().path("stories", experts, experts == DType::INT4 ? DType::INT8 : DType::BF16, group);
  Engine one = Engine::open(path, options(device, act, 0)), other = Engine::open(path, options(device, act, qn::kDraftAuto));
  Session plain(one), many(other);
  const auto start = std::chrono::steady_clock::now();
  Count count;
  int done = 0;
  for (const std::string& text : beginnings(texts)) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    const Ids prompt = one.tokenize(text, false);
    many.speculate(done % 8 == 7 ? qn::kDraftAuto : 1 + done % 7);
    GenerateParams p = params(tokens, done % 3 == 1 ? 0.9f : done % 3 == 2 ? 1.3f : 0.f, static_cast<uint64_t>(done));
    p.stop_at_end_tokens = done % 5 != 0;
    if (done % 4 == 3) p.sampling.top_k = 30, p.sampling.top_p = 0.9f, p.sampling.repetition_penalty = 1.1f, p.sampling.presence_penalty = 0.3f;
    same(plain, many, prompt, p, &count);
    done++;
  }
  MESSAGE(std::string(device), " ", std::string(act), " ", std::string(qn::name(experts)), ": ", done, " texts, ", count.tokens, " tokens, ", count.accepted, " of ", count.drafted,
          " guesses right");
  CHECK(done > 0);
  CHECK(count.accepted * 5 > count.drafted);
}

}  // namespace

TEST_CASE("drafts: texts, sampled and not, are those of plain decoding, and so is the state") {
  same_texts("cpu", "int8", DType::BF16, 0, 40, 60, 4);
  same_texts("cpu", "bf16", DType::INT4, 32, 16, 60, 2);
  same_texts("cpu", "f32", DType::BF16, 0, 8, 60, 2);
  same_texts("cpu,cpu,cpu", "int8", DType::BF16, 0, 8, 60, 2);
  same_texts("ref", "f32", DType::BF16, 0, 1, 16, 2);
}

TEST_CASE("drafts, by hand: 200 texts" * doctest::skip()) {
  same_texts("cpu", "int8", DType::BF16, 0, 200, 60, 1e9);
  same_texts("cpu", "int8", DType::INT4, 32, 200, 60, 1e9);
}

TEST_CASE("CUDA: drafts: texts, sampled and not, are those of plain decoding, and so is the state") {
  if (no_gpu()) return;
  same_texts("cuda", "bf16", DType::BF16, 0, 200, 60, 60);
  same_texts("cuda", "bf16", DType::INT4, 32, 200, 60, 60);
  same_texts("cuda", "int8", DType::INT4, 32, 24, 60, 30);
  same_texts("cuda", "f32", DType::BF16, 0, 24, 60, 30);
}

// What the layer is worth: how often the d-th guess is right when those before it were
static void acceptance(const char* device, const char* act, int texts) {
  Engine e = Engine::open(TestModels::get().path("stories"), options(device, act, 4));
  double right[5] = {}, tried[5] = {}, tokens = 0, steps = 0;
  for (const float temperature : {0.f, 1.f}) {
    for (const int depth : {1, 2, 3, 4}) {  // one text after another with so many guesses a pass
      Session s(e);
      s.speculate(depth);
      Count c;
      for (const std::string& text : beginnings(texts)) {
        s.sync(e.tokenize(text, false));
        const GenerateResult r = s.generate(params(60, temperature, 5), {});
        c.drafted += r.drafted, c.accepted += r.accepted, c.tokens += r.ids.size();
      }
      tried[depth] = static_cast<double>(c.drafted) / depth, right[depth] = static_cast<double>(c.accepted);
      tokens = static_cast<double>(c.accepted) + tried[depth], steps = tried[depth];
      MESSAGE(std::string(device), ", temperature ", temperature, ", ", depth, " guesses: ", c.accepted, " of ", c.drafted, " right, ", tokens / steps, " tokens a step");
      if (depth == 1) CHECK(right[1] / tried[1] > (temperature > 0 ? 0.6 : 0.8));
      if (depth > 1) CHECK(right[depth] / tried[depth] > right[depth - 1] / tried[depth - 1]);  // one more is worth something
    }
  }
}

TEST_CASE("drafts: how many guesses are right") { acceptance("cpu", "int8", 4); }
TEST_CASE("CUDA: drafts: how many guesses are right") {
  if (no_gpu()) return;
  acceptance("cuda", "bf16", 20);
}

// Every number of tokens of a pass that can remain, by ending the generation there: by the limit, by the reader, by an interrupt.
static void every_end(const char* device, const char* act) {
  const std::string path = TestModels::get().path("stories");
  Engine one = Engine::open(path, options(device, act, 0)), other = Engine::open(path, options(device, act, 7));
  Session plain(one), many(other);
  const Ids prompt = one.tokenize("Once upon a time there was a small bear called Tim.", false);
  constexpr int kTokens = 18;
  for (const int draft : {2, 7}) {
    many.speculate(draft);
    std::map<int, uint64_t> hashes;  // by number of tokens
    plain.sync(prompt);
    hashes[0] = plain.state_hash();
    const Ids all = plain.generate(params(kTokens), {}).ids;
    REQUIRE(all.size() == kTokens);
    for (int n = 1; n <= kTokens; n++) {
      plain.sync(prompt);
      plain.generate(params(n), {});
      hashes[n] = plain.state_hash();
    }
    for (int n = 1; n < kTokens; n++) {
      const auto check = [&](const GenerateResult& r, Finish finish, const char* by) {
        CHECK_MESSAGE((r.ids == Ids(all.begin(), all.begin() + n) && r.finish == finish), n, " tokens, ended by ", std::string(by));
        CHECK(many.position() == static_cast<int>(prompt.size()) + n);
        CHECK_MESSAGE(many.state_hash() == hashes[n], n, " tokens, ended by ", std::string(by), ", ", draft, " guesses");
      };
      many.sync(prompt);
      check(many.generate(params(n), {}), Finish::Length, "the limit");
      int count = 0;
      many.sync(prompt);
      check(many.generate(params(kTokens), [&](const Delivery&) { return ++count < n; }), Finish::Interrupted, "the reader");
      if (n % 3 == 0) {  // goes on from there as if nothing had been
        GenerateResult rest = many.generate(params(kTokens - n), {});
        CHECK(std::equal(rest.ids.begin(), rest.ids.end(), all.begin() + n, all.end()));
        CHECK(many.state_hash() == hashes[kTokens]);
      }
      std::atomic<bool> stop = false;
      GenerateParams p = params(kTokens);
      p.interrupt = &stop, count = 0;
      many.sync(prompt);
      check(many.generate(p, [&](const Delivery&) { return stop = ++count >= n, true; }), Finish::Interrupted, "an interrupt");
      many.sync(prompt);
      count = 0;
      CHECK_THROWS_AS(many.generate(params(kTokens), [&](const Delivery&) -> bool { return ++count < n ? true : throw Error("the reader has gone"); }), Error);
      CHECK(many.state_hash() == hashes[many.position() - static_cast<int>(prompt.size())]);
    }
    // again from the prompt, as /regen does
    CHECK(many.sync(prompt).prefilled == 0);
    CHECK(many.generate(params(kTokens), {}).ids == all);
    CHECK(many.state_hash() == hashes[kTokens]);
  }
}

TEST_CASE("drafts: wherever a generation ends, the state is that of plain decoding") { every_end("cpu", "int8"); }
TEST_CASE("CUDA: drafts: wherever a generation ends, the state is that of plain decoding") {
  if (no_gpu()) return;
  every_end("cuda", "bf16");
}

static void stops(const char* device, const char* act) {
  const std::string path = TestModels::get().path("stories");
  Engine one = Engine::open(path, options(device, act, 0)), other = Engine::open(path, options(device, act, 5));
  Session plain(one), many(other);
  const Ids prompt = one.tokenize("Once upon a time there was a small bear called Tim.", false);
  plain.sync(prompt);
  const std::string text = plain.generate(params(40), {}).text;
  for (size_t at = 3; at + 12 < text.size(); at += 11)  // within tokens and across them, within passes and across them
    for (const size_t length : {1, 4, 11}) {
      GenerateParams p = params(40);
      p.stop = {text.substr(at, length), "nowhere in it"};
      same(plain, many, prompt, p);
    }
  // an end token among the guesses: a chat, whose answers end
  for (const char* question : {"What is 2 plus 3?", "What is 75 plus 97?", "Who are you?", "Tell me a story about a cat."}) {
    const Ids chat = one.chat_tokens(std::vector<Message>{{"user", question, {}, {}, {}}}, {});
    for (const int draft : {1, 3, 7}) {
      many.speculate(draft);
      same(plain, many, chat, params(150));
    }
    Ids next = many.tokens();  // and the turn after it
    for (int32_t id : one.tokenize("<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", true)) next.push_back(id);
    const int had = many.position();
    CHECK(many.sync(next).reused == had);
    plain.sync(next);
    CHECK(plain.state_hash() == many.state_hash());
  }
}

TEST_CASE("drafts: stop strings and end tokens inside of a pass") { stops("cpu", "int8"); }
TEST_CASE("CUDA: drafts: stop strings and end tokens inside of a pass") {
  if (no_gpu()) return;
  stops("cuda", "bf16");
}

static void full(const char* device, const char* act) {
  const std::string path = TestModels::get().path("stories");
  for (int ctx = 22; ctx < 29; ctx++)
    for (const int ubatch : {0, 3}) {
      Options o = options(device, act, 0);
      o.ctx = ctx, o.ubatch = ubatch;
      Engine one = Engine::open(path, o);
      o.draft = 7;
      Engine other = Engine::open(path, o);
      Session plain(one), many(other);
      GenerateParams p = params(-1);
      p.stop_at_end_tokens = false;
      same(plain, many, one.tokenize("Once upon a time there was a bear.", false), p);
      CHECK(many.position() == ctx);
      CHECK(many.generate(p, {}).finish == Finish::ContextFull);
      p.max_tokens = 0;
      CHECK(many.generate(p, {}).ids.empty());
    }
}

TEST_CASE("drafts: the context fills up inside of a pass") { full("cpu", "int8"); }
TEST_CASE("CUDA: drafts: the context fills up inside of a pass") {
  if (no_gpu()) return;
  full("cuda", "bf16");
}

// A file without the layer guesses what followed before in the text
static void from_text(const char* device, const char* act) {
  qn::ConvertOptions c;
  c.mtp = false, c.recipe.experts = DType::BF16, c.threads = 2;
  const std::string path = (TestModels::get().folder() / "no-mtp.qn").string();
  qn::convert_folder(TestModels::get().source("stories"), path, c);
  Engine one = Engine::open(path, options(device, act, 0)), other = Engine::open(path, options(device, act, 4));
  CHECK(!other.info().mtp);
  Session plain(one), many(other);
  Count count;
  for (const std::string& text : beginnings(4)) {
    const std::string twice = text + " " + text + " " + text.substr(0, text.size() / 2);
    for (const float temperature : {0.f, 0.8f}) same(plain, many, one.tokenize(twice, false), params(60, temperature, 3), &count);
  }
  MESSAGE(std::string(device), ": from the text ", count.accepted, " of ", count.drafted, " guesses right");
  CHECK(count.drafted > 0);
  CHECK(count.accepted > 0);
}

// A head for guesses changes how many are right, and nothing else, whatever it holds
static void own_head(const char* device, const char* act, int texts) {
  const std::string folder = TestModels::get().folder().string(), none = folder + "/head-none.qn", wrong = folder + "/head-wrong.qn";
  const auto made = [&](DType draft) {
    qn::ConvertOptions c;
    c.recipe.experts = DType::BF16, c.recipe.draft = draft, c.threads = 2;
    const std::string path = folder + "/head-" + qn::name(draft) + ".qn";
    qn::convert_folder(TestModels::get().source("stories"), path, c);
    return path;
  };
  const std::string eight = made(DType::INT8), four = made(DType::INT4);
  qn::copy_file(eight, none, "mtp.head");  // as files were before there was one
  {
    const qn::QnFile f = qn::QnFile::open(eight);
    const qn::QnTensor& t = *f.find("mtp.head");
    std::vector<uint8_t> bytes(f.data(t).begin(), f.data(t).end());
    const size_t panel = bytes.size() / static_cast<size_t>(qn::t16_panels(t.shape[0]));
    std::ranges::rotate(bytes, bytes.begin() + static_cast<std::ptrdiff_t>(panel));  // every token's row is another's
    qn::copy_file(eight, wrong, "mtp.head", &t, bytes);
  }
  Engine one = Engine::open(none, options(device, act, 0));
  Session plain(one);
  std::map<std::string, double> right;
  for (const std::string& path : {none, eight, four, wrong}) {
    Engine e = Engine::open(path, options(device, act, 1));
    CHECK(e.info().bytes_per_token == one.info().bytes_per_token);
    Session s(e);
    s.speculate(1);
    Count count;
    for (const float temperature : {0.f, 1.f})
      for (const std::string& text : beginnings(texts)) same(plain, s, one.tokenize(text, false), params(60, temperature, 5), &count);
    right[path] = static_cast<double>(count.accepted) / static_cast<double>(count.drafted);
    MESSAGE(std::string(device), ", ", path.substr(folder.size() + 1), ": ", count.accepted, " of ", count.drafted, " first guesses right");
  }
  CHECK(right[eight] > right[none] - 0.01);
  CHECK(right[four] > right[none] - 0.1);  // ties: see Recipe
  CHECK(right[wrong] < 0.1);
}

TEST_CASE("drafts: a head of their own changes no text") { own_head("cpu", "int8", 12); }
TEST_CASE("CUDA: drafts: a head of their own changes no text") {
  if (no_gpu()) return;
  own_head("cuda", "bf16", 40);
}

TEST_CASE("drafts: a head of their own is planned where they are made, and has to be what it should") {
  const std::string path = TestModels::get().path("stories"), other = (TestModels::get().folder() / "other.qn").string();
  const qn::QnFile file = qn::QnFile::open(path);
  qn::QnTensor t = *file.find("mtp.head");
  qn::copy_file(path, other, "mtp.head");
  const int layers = Engine::open(path, options("cpu", "int8", 0)).info().layers;
  const auto back = [&](const qn::QnFile& f, bool mtp) { return qn::placed_bytes(f, layers, mtp, false).back; };
  {
    const qn::QnFile without = qn::QnFile::open(other);
    CHECK(back(file, false) == back(without, false));
    CHECK(back(file, true) == back(without, true) + static_cast<uint64_t>(qn::round_up(static_cast<int64_t>(t.bytes), qn::Device::kPlaceAlign)));
  }
  const auto refused = [&](const char* got) {
    const std::vector<uint8_t> bytes(qn::stored_bytes(t));
    qn::copy_file(path, other, "mtp.head", &t, bytes);
    for (const int draft : {0, 1}) CHECK_THROWS_WITH_AS(Engine::open(other, options("cpu", "int8", draft)), doctest::Contains(got), Error);
  };
  t.shape[0] -= 16;
  refused("mtp.head: expected int8 or int4 (2048, 256), got int8 g128 (2032, 256)");
  t.shape[0] += 16, t.dtype = DType::BF16, t.group = 0;
  refused("got bf16 (2048, 256)");
}

TEST_CASE("drafts: without the layer, from the text") { from_text("cpu", "int8"); }
TEST_CASE("CUDA: drafts: without the layer, from the text") {
  if (no_gpu()) return;
  from_text("cuda", "bf16");
}

// The joint law of the next two tokens, with guesses against plain sampling, both by their own seeds
static void law(int draws, float temperature) {
  Engine e = Engine::open(TestModels::get().path("stories"), options("cpu", "int8", 2));
  Session s(e);
  const Ids prompt = e.tokenize("Once upon a time there was a", false);
  s.sync(prompt);
  std::vector<double> first(s.logits().begin(), s.logits().end());
  const auto softmax = [&](std::vector<double>& l) {
    double sum = 0;
    const double top = *std::ranges::max_element(l);
    for (double& x : l) sum += x = std::exp((x - top) / temperature);
    for (double& x : l) x /= sum;
  };
  softmax(first);
  // Exact probabilities: of the second token behind each likely first one
  std::map<std::pair<int32_t, int32_t>, double> expected;
  for (size_t a = 0; a < first.size(); a++) {
    if (first[a] * draws < 5 || e.is_end(static_cast<int32_t>(a))) continue;
    Ids longer = prompt;
    longer.push_back(static_cast<int32_t>(a));
    s.sync(longer);
    std::vector<double> second(s.logits().begin(), s.logits().end());
    softmax(second);
    for (size_t b = 0; b < second.size(); b++)
      if (first[a] * second[b] * draws >= 5) expected[{static_cast<int32_t>(a), static_cast<int32_t>(b)}] = first[a] * second[b] * draws;
  }
  REQUIRE(expected.size() > 3);
  s.speculate(2);
  std::map<std::pair<int32_t, int32_t>, double> seen;
  uint64_t drafted = 0, accepted = 0;
  GenerateParams p = params(3, temperature);
  p.stop_at_end_tokens = false;
  for (int i = 0; i < draws; i++) {
    s.sync(prompt);
    p.sampling.seed = static_cast<uint64_t>(i) + 1;
    const GenerateResult r = s.generate(p, {});
    drafted += r.drafted, accepted += r.accepted;
    seen[{r.ids[0], r.ids[1]}]++;
  }
  double chi = 0, rest_expected = draws, rest_seen = draws;
  for (const auto& [pair, n] : expected) {
    const double got = seen.contains(pair) ? seen[pair] : 0;
    chi += (got - n) * (got - n) / n, rest_expected -= n, rest_seen -= got;
  }
  auto freedom = static_cast<double>(expected.size()) - 1;
  if (rest_expected >= 5) chi += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected, freedom++;
  // Wilson and Hilferty: the cube root of chi^2 / n is nearly normal. 3.09: p = 0.001.
  const double z = (std::cbrt(chi / freedom) - (1 - 2 / (9 * freedom))) / std::sqrt(2 / (9 * freedom));
  MESSAGE(draws, " draws, ", expected.size(), " cells, chi^2 ", chi, " of ", freedom, ", z ", z, "; ", accepted, " of ", drafted, " guesses right");
  CHECK(z < 3.09);
  CHECK(drafted > 0);
}

TEST_CASE("drafts: two tokens have the law of plain sampling") { law(1200, 1); }
TEST_CASE("drafts, by hand: two tokens have the law of plain sampling, 100,000 draws" * doctest::skip()) { law(100000, 1); }

TEST_CASE("drafts: by lottery all the work is done, and the session goes on") {
  Engine e = Engine::open(TestModels::get().path("stories"), options("cpu", "int8", qn::kDraftAuto));
  Session s(e), fresh(e);
  const Ids prompt = e.tokenize("Once upon a time there was a small bear called Tim.", false);
  GenerateParams p = params(200);
  p.stop_at_end_tokens = false;
  for (const double acceptance : {0.0, 0.7, 1.0}) {
    s.sync(prompt);
    s.speculate(3, acceptance);
    const GenerateResult r = s.generate(p, {});
    CHECK(r.ids.size() == 200);
    CHECK(static_cast<double>(r.accepted) / static_cast<double>(r.drafted) == doctest::Approx((acceptance + acceptance * acceptance + std::pow(acceptance, 3)) / 3).epsilon(0.2));
    // what lies in memory is that of the tokens, whatever chose them
    fresh.clear();
    for (size_t at = 1; at <= s.tokens().size(); at = std::min(at + 7, s.tokens().size() + (at == s.tokens().size()))) fresh.sync(std::span(s.tokens()).first(at));
    CHECK(fresh.state_hash() == s.state_hash());
  }
  s.speculate(3);
  s.sync(prompt), fresh.sync(prompt);
  CHECK(s.generate(params(20), {}).ids == fresh.generate(params(20), {}).ids);
}

TEST_CASE("--draft and --no-draft among the options") {
  Options o;
  CHECK(o.draft == qn::kDraftAuto);
  const auto set = [&](const std::string& flag, const std::string& value) {
    for (const OptionRow& row : options_table())
      if (flag == row.flags) return row.set(o, value);
    FAIL("no option ", flag);
  };
  set("--draft", "4");
  CHECK(o.draft == 4);
  set("--draft", "auto");
  CHECK(o.draft == qn::kDraftAuto);
  set("--no-draft", "");
  CHECK(o.draft == 0);
  CHECK_THROWS_WITH_AS(set("--draft", "8"), doctest::Contains("--draft"), Error);
  CHECK_THROWS_AS(set("--draft", "fast"), Error);
}

TEST_CASE("drafts: a pass that cannot begin leaves the state of the tokens before it") {
  constexpr int kVocab = 16, kWidth = 8, kRows = 4, kEnd = 60;
  const auto device = qn::make_ref_device();
  qn::StateShape shape;
  shape.attention = {false}, shape.key_heads = shape.value_heads = 1, shape.key_dim = shape.value_dim = 32;
  shape.conv_slots = 16, shape.logs = true, shape.tail = kWidth + kVocab;
  const auto after = [](int32_t id, int position) { return position % 7 == 6 ? 9 : (id + 1) % 4; };  // guesses from the text are right now and then
  Ids want = {1, 2, 3};
  while (want.size() < kEnd) want.push_back(after(want.back(), static_cast<int>(want.size()) - 1));
  uint64_t guessed = 0;
  for (int fails = 1; fails < 25; fails++) {
    // A model whose state is the sum of the tokens it has seen, each and one
    qn::PipelineStage stage(*device, shape, 3, 8);
    qn::Pipeline pipeline;
    pipeline.add(stage);
    std::vector<float> hidden(kRows * kWidth), logits((kRows + 1) * kVocab);
    const auto see = [&](float* row, int32_t id, int position) { std::fill_n(row, kVocab, 0.f), row[after(id, position)] = 1; };
    qn::DecoderModel m;
    m.pipeline = &pipeline;
    m.hidden = qn::view(hidden.data(), DType::F32, kRows, kWidth), m.logits = qn::view(logits.data(), DType::F32, kRows + 1, kVocab);
    m.pass = [&](size_t, int n) {
      const int pos = stage.step->pos, from = stage.step->from;
      const qn::Tensor state = stage.state.delta(0), log = stage.state.log(0);
      device->delta_replay({log, state, 1, pos, from});
      for (int i = 0; i < n; i++) {
        float* row = log.f32((pos + i) % qn::kDeltaLogRows);
        std::fill_n(row, 32, 1.f), std::fill_n(row + 32, 32, static_cast<float>(stage.ids.i32()[i] + 1)), row[64] = 1;
        see(logits.data() + i * kVocab, stage.ids.i32()[i], pos + i);
      }
      if (n == 1) device->delta_replay({log, state, 1, pos + 1, 1});
    };
    int passes = 0;
    pipeline.before_pass = [&] {
      if (++passes == fails) throw qn::Error("no more");
    };
    qn::Decoder decoder(std::move(m), kRows - 1);
    Ids timeline = {1, 2, 3};
    const auto sum = [&] { return static_cast<float>(std::accumulate(timeline.begin(), timeline.end(), 0) + static_cast<int>(timeline.size())); };
    std::fill_n(stage.state.delta(0).f32(), 32 * 32, sum());
    see(stage.state.tail() + kWidth, 3, 2);
    for (int turn = 0; turn < 2; turn++) {
      const auto likeliest = [](std::span<const float> l, std::span<const int32_t>, uint64_t) { return static_cast<int32_t>(std::ranges::max_element(l) - l.begin()); };
      decoder.begin(timeline, kEnd, {}, likeliest, false);
      try {
        while (timeline.size() < kEnd - 1) decoder.take(decoder.next());
      } catch (const qn::Error&) {
        CHECK(turn == 0);
      }
      decoder.abandon();
      guessed += decoder.stats().accepted;
      const float* s = stage.state.delta(0).f32();
      CHECK_MESSAGE(std::all_of(s, s + 32 * 32, [&](float v) { return v == sum(); }), fails, ": ", *s, " behind ", timeline.size(), " tokens, not ", sum());
    }
    CHECK(std::equal(timeline.begin(), timeline.end(), want.begin()));
    CHECK(timeline.size() == kEnd - 1);
  }
  CHECK(guessed > 100);
}
