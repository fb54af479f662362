// The whole model, end to end: our numbers are transformers' numbers, however the sequence is cut, gone back on or repeated.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "ggml-lite/base/safetensors.h"
#include "ggml-lite/core/blocks.h"
#include "ggml-lite/core/qn.h"
#include "qnext.h"
#include "tests/close.h"
#include "tests/models.h"

namespace {

using namespace qnext;
using qn::DType;
using qn::SafeTensors;
using qn::TestModels;
using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;

Options options(const char* device, const char* act = "f32") {
  Options o;
  o.device = device, o.act = act, o.threads = 2;
  return o;
}

double worst(std::span<const float> a, std::span<const float> b) {
  REQUIRE(a.size() == b.size());
  double w = 0;
  for (size_t i = 0; i < a.size(); i++) {
    REQUIRE((qn::finite_bits(a[i]) && qn::finite_bits(b[i])));
    w = std::max(w, std::fabs(static_cast<double>(a[i]) - b[i]));
  }
  return w;
}

int32_t best(std::span<const float> l) { return qn::argmax(l); }

// Teacher-forced over the expected greedy tokens: ours is the same wherever theirs led by at least `gap`.
void check_greedy(Session& s, const Ids& greedy, const Floats& gaps, float gap, const std::string& what) {
  for (size_t i = 0; i < greedy.size(); i++) {
    if (gaps[i] >= gap) CHECK_MESSAGE(best(s.logits()) == greedy[i], what, ": greedy token ", i, ", gap ", gaps[i]);
    s.step(greedy[i]);
  }
}

void check_expected(const std::string& model, const std::string& expected, const char* device) {
  const std::string what = model + " " + expected + " on " + device;
  const auto file = SafeTensors::open_file(std::string(QN_TEST_DATA) + "/" + model + "/" + expected);
  const Ids tokens = file.read_i32("tokens");
  const Floats logits = file.read_f32("logits"), mtp = file.read_f32("mtp_logits"), hidden = file.read_f32("hidden_last_token");
  Options o = options(device);
  o.mtp = true;
  Engine e = Engine::open(TestModels::get().path(model), o);
  const auto v = static_cast<size_t>(e.info().vocab), d = static_cast<size_t>(e.info().width);
  Floats got_mtp, got_hidden(hidden.size());
  e.trace([&](int layer, std::string_view name, std::span<const float> x, int, int) {
    if (name == "mtp_logits") got_mtp.insert(got_mtp.end(), x.begin(), x.end());
    const int entry = name == "embed" ? 0 : name == "layer" && layer + 1 < e.info().layers ? layer + 1 : name == "final_norm" ? e.info().layers : -1;
    if (entry >= 0) std::copy(x.end() - static_cast<std::ptrdiff_t>(d), x.end(), got_hidden.begin() + entry * static_cast<std::ptrdiff_t>(d));
  });
  Session s(e);
  Floats got;
  s.sync_all(tokens, [&](int position, std::span<const float> l) {
    REQUIRE(position * v == got.size());
    got.insert(got.end(), l.begin(), l.end());
  });
  e.trace({});
  const double dl = worst(got, logits), dm = worst(got_mtp, mtp), dh = worst(got_hidden, hidden);
  CHECK_MESSAGE(dl <= 1e-3, what, ": logits ", dl);
  CHECK_MESSAGE(dm <= 1e-3, what, ": MTP logits ", dm);
  CHECK_MESSAGE(dh <= 1e-3, what, ": hidden ", dh);
  MESSAGE(what, ": max |dlogit| ", dl, ", MTP ", dm, ", hidden ", dh);
  check_greedy(s, file.read_i32("greedy"), file.read_f32("greedy_gap"), 0, what);
}

}  // namespace

TEST_CASE("tiny models agree with transformers in float32") {
  for (const char* device : {"ref", "cpu"}) {
    check_expected("tiny", "expected-0.safetensors", device);
    check_expected("tiny", "expected-1.safetensors", device);
    check_expected("tiny-yarn", "expected-0.safetensors", device);
    check_expected("tiny-fp8", "expected-0.safetensors", device);
  }
}

TEST_CASE("stories: perplexity and greedy answers are transformers'") {
  const auto file = SafeTensors::open_file(std::string(QN_STORIES) + "/expected.safetensors");
  Engine e = Engine::open(TestModels::get().path("stories"), options("cpu"));
  const Ids all = file.read_i32("ppl.tokens");
  const Floats nll = file.read_f32("ppl.nll");
  double sum = 0, expected = 0;
  for (size_t w = 0; w < 4; w++) {
    Session s(e);
    const Ids tokens(all.begin() + static_cast<std::ptrdiff_t>(w * 1024), all.begin() + static_cast<std::ptrdiff_t>(w * 1024 + 1024));
    s.sync_all(tokens, [&](int position, std::span<const float> l) {
      if (position == 1023) return;
      double z = 0;
      const float top = *std::ranges::max_element(l);
      for (float x : l) z += std::exp(static_cast<double>(x) - top);
      const double mine = std::log(z) + top - l[static_cast<size_t>(tokens[static_cast<size_t>(position) + 1])];
      const size_t i = w * 1023 + static_cast<size_t>(position);
      CHECK(std::fabs(mine - nll[i]) < 2e-3);
      sum += mine, expected += nll[i];
    });
  }
  const double ppl = std::exp(sum / 4092);
  MESSAGE("perplexity ", ppl);
  CHECK(std::fabs(ppl / 1.722153 - 1) < 1e-3);
  CHECK(std::fabs(ppl / std::exp(expected / 4092) - 1) < 1e-5);
  for (int p = 0; p < 6; p++) {
    const std::string name = "p" + std::to_string(p);
    Session s(e);
    s.sync(file.read_i32(name + ".tokens"));
    CHECK(worst(s.logits(), file.read_f32(name + ".logits_last")) <= 1e-3);
    check_greedy(s, file.read_i32(name + ".greedy"), file.read_f32(name + ".greedy_gap"), 1e-4f, name);
  }
}

TEST_CASE("rounded activations stay close on stories") {
  const auto file = SafeTensors::open_file(std::string(QN_STORIES) + "/expected.safetensors");
  for (const char* act : {"bf16", "int8"})
    for (const auto& [experts, group] : {std::pair{DType::BF16, 0}, {DType::INT8, 0}, {DType::INT4, 32}}) {
      Engine e = Engine::open(TestModels::get().path("stories", experts, DType::BF16, group), options("cpu", act));
      for (int p : {2, 3, 5}) {
        const std::string name = "p" + std::to_string(p);
        Session s(e);
        s.sync(file.read_i32(name + ".tokens"));
        check_greedy(s, file.read_i32(name + ".greedy"), file.read_f32(name + ".greedy_gap"), experts == DType::INT4 ? 1.f : 0.1f,
                     std::string(act) + " " + qn::name(experts) + " " + name);
      }
    }
}

// Perplexity of stories over the first `windows` of its scored ones
static double perplexity(const char* act, const char* kv_type, size_t windows) {
  Options o = options("cpu", act);
  o.kv_type = kv_type;
  Engine e = Engine::open(TestModels::get().path("stories"), o);
  CHECK(e.plan().kv_type == kv_type);
  const Ids all = SafeTensors::open_file(std::string(QN_STORIES) + "/expected.safetensors").read_i32("ppl.tokens");
  double sum = 0;
  for (size_t w = 0; w < windows; w++) {
    Session s(e);
    const auto tokens = std::span(all).subspan(w * 1024, 1024);
    s.sync_all(tokens, [&](int position, std::span<const float> l) {
      if (position == 1023) return;
      double z = 0;
      for (float x : l) z += std::exp(static_cast<double>(x));
      sum += std::log(z) - l[static_cast<size_t>(tokens[static_cast<size_t>(position) + 1])];
    });
  }
  return std::exp(sum / (static_cast<double>(windows) * 1023));
}

// A code is off by at most half of 1/127 of the largest of its 128 values, about 1 % of their rms: as coarse as INT8 weights, which
// cost 0.002 % (README), in a fourth of the layers.
TEST_CASE("stories: an INT8 cache costs less than 0.05 % of perplexity") {
  for (const char* act : {"f32", "int8"}) {
    const double half = perplexity(act, "bf16", 1), codes = perplexity(act, "int8", 1);  // all four windows: README
    MESSAGE(std::string(act), " activations: perplexity ", half, " with a BF16 cache, ", codes, " with INT8, ", (codes / half - 1) * 100, " %");
    CHECK(codes != half);
    CHECK(std::fabs(codes / half - 1) < 0.0005);
  }
}

TEST_CASE("an INT8 cache: 260 bytes a key, in the plan and in memory; greedy answers stay where they were clear") {
  Options o = options("cpu", "int8");
  o.kv_type = "int8", o.ctx = 1777;
  Engine e = Engine::open(TestModels::get().path("stories"), o);
  o.kv_type = "bf16";
  const uint64_t half = Engine::open(TestModels::get().path("stories"), o).plan().kv;
  CHECK(e.plan().kv * 512 == half * 260);
  CHECK(half % 1777 == 0);
  const auto file = SafeTensors::open_file(std::string(QN_STORIES) + "/expected.safetensors");
  for (int p : {2, 3, 5}) {
    const std::string name = "p" + std::to_string(p);
    Session s(e);
    s.sync(file.read_i32(name + ".tokens"));
    check_greedy(s, file.read_i32(name + ".greedy"), file.read_f32(name + ".greedy_gap"), 0.1f, "INT8 cache " + name);
  }
}

static Ids some_tokens(int n, int vocab) {
  Ids t;
  for (int i = 0; i < n; i++) t.push_back((i * 7919 + i * i * 31 + 5) % vocab);
  return t;
}

// Largest difference relative to the largest logit
static double relative(std::span<const float> a, std::span<const float> b) {
  double top = 0;
  for (float x : b) top = std::max(top, std::fabs(static_cast<double>(x)));
  REQUIRE(top > 0);
  return worst(a, b) / top;
}

TEST_CASE("one prefill equals any split of it and token by token") {
  for (const auto& [device, kv_type] : {std::pair{"ref", ""}, {"cpu", ""}, {"cpu", "int8"}}) {
    Options o = options(device);
    o.kv_type = kv_type;
    Engine e = Engine::open(TestModels::get().path("tiny"), o);
    const Ids tokens = some_tokens(150, e.info().vocab);
    Session whole(e);
    whole.sync(tokens);
    const Floats want(whole.logits().begin(), whole.logits().end());
    auto split = [&](std::vector<int> cuts) {
      Session s(e);
      for (int c : cuts) s.sync(std::span(tokens).first(static_cast<size_t>(c)));
      s.sync(tokens);
      CHECK(s.position() == 150);
      CHECK_MESSAGE(relative(s.logits(), want) <= 1e-5, std::string(device), " ", std::string(kv_type), ": split at ", cuts[0]);
    };
    for (int at : {1, 2, 3, 4, 5, 62, 63, 64, 65, 66, 127, 128, 129, 148, 149}) split({at});
    split({1, 2, 3, 4, 67, 68, 131, 132});
    split({63, 126});
    split({65, 130});
    Session s(e);
    s.sync(std::span(tokens).first(1));
    for (int i = 1; i < 150; i++) s.step(tokens[static_cast<size_t>(i)]);
    CHECK(relative(s.logits(), want) <= 1e-5);
  }
}

TEST_CASE("--rope-yarn: that of the file, in place of the file's, and for a file without") {
  const Ids tokens = some_tokens(200, 320);
  const auto logits = [&](const char* model, double factor, int* context) {
    Options o = options("cpu");
    o.rope_yarn = factor;
    Engine e = Engine::open(TestModels::get().path(model), o);
    *context = e.info().context;
    CHECK(e.info().yarn_factor == doctest::Approx(factor ? factor : std::string(model) == "tiny-yarn" ? 4 : 1));
    Session s(e);
    s.sync(tokens);
    return Floats(s.logits().begin(), s.logits().end());
  };
  int context = 0, plain = 0;
  const Floats file = logits("tiny-yarn", 0, &context);
  CHECK(context == 256);
  CHECK(worst(file, logits("tiny-yarn", 4, &context)) == 0);  // its original context is 64
  CHECK(context == 256);
  CHECK(relative(file, logits("tiny-yarn", 8, &context)) > 1e-3);
  CHECK(context == 512);
  const Floats none = logits("tiny", 0, &plain);
  CHECK(worst(none, logits("tiny", 1, &context)) == 0);
  CHECK(context == plain);
  CHECK(relative(none, logits("tiny", 4, &context)) > 1e-3);
  CHECK(context == 4 * plain);
}

TEST_CASE("rows of a step do not depend on its size, nor on the number of threads") {
  for (const auto& [act, kv_type] : {std::pair{"f32", ""}, {"bf16", ""}, {"int8", ""}, {"int8", "int8"}}) {
    const std::string path = TestModels::get().path("stories", DType::INT4, DType::INT8, 32);
    Options o = options("cpu", act);
    o.kv_type = kv_type;
    Engine e = Engine::open(path, o);
    const Ids tokens = some_tokens(70, 1165);
    Session one(e);
    std::vector<Floats> want;
    one.sync(std::span(tokens).first(1));
    for (int i = 1; i < 70; i++) {
      want.emplace_back(one.logits().begin(), one.logits().end());
      one.step(tokens[static_cast<size_t>(i)]);
    }
    want.emplace_back(one.logits().begin(), one.logits().end());
    for (int n : {2, 3, 4, 5, 6, 7, 8, 70}) {
      o.threads = n % 3 + 1;
      o.ubatch = n;
      Engine other = Engine::open(path, o);
      Session s(other);
      s.sync_all(tokens, [&](int position, std::span<const float> l) {
        const bool same = std::memcmp(l.data(), want[static_cast<size_t>(position)].data(), l.size_bytes()) == 0;
        REQUIRE_MESSAGE(same, std::string(act), " ", std::string(kv_type), ": position ", position, " in steps of ", n);
      });
      CHECK(s.state_hash() == one.state_hash());
    }
  }
}

TEST_CASE("passes of a prompt grow on a CPU while they are short; the state is that of passes of any length") {
  const std::string path = TestModels::get().path("stories");
  Options o = options("cpu", "int8");
  const Ids tokens = some_tokens(1600, 1166);
  Engine e = Engine::open(path, o);
  Session s(e);
  std::vector<uint64_t> reached;
  s.sync(tokens, [&](std::string_view, uint64_t done, uint64_t) { reached.push_back(done); });
  REQUIRE(reached.size() >= 2);
  CHECK(reached.back() == 1600);
  CHECK(reached[0] == 512);
  CHECK((reached[1] == 1536 || reached[1] == 1024));  // the second only where the first pass took two seconds
  o.ubatch = 100;
  Engine other = Engine::open(path, o);
  Session short_ones(other);
  reached.clear();
  short_ones.sync(tokens, [&](std::string_view, uint64_t done, uint64_t) { reached.push_back(done); });
  CHECK(reached.size() == 16);
  CHECK(short_ones.state_hash() == s.state_hash());
}

TEST_CASE("going back and forth restores the state bit for bit") {
  Engine e = Engine::open(TestModels::get().path("stories"), options("cpu", "int8"));
  const Ids first = e.chat_tokens(std::vector<Message>{{"user", "Tell me a story about a cat.", {}, {}, {}}}, {});
  GenerateParams p;
  p.max_tokens = 20;
  Session s(e);
  s.sync(first);
  const uint64_t after_prompt = s.state_hash();
  const GenerateResult a = s.generate(p, {});
  const uint64_t after_answer = s.state_hash();
  const Ids whole = s.tokens();
  CHECK(whole.size() == first.size() + a.ids.size());

  SUBCASE("regenerate") {
    const SyncResult r = s.sync(first);
    CHECK(r.prefilled == 0);  // from the checkpoint at the end of the prompt
    CHECK(s.state_hash() == after_prompt);
    CHECK(s.generate(p, {}).ids == a.ids);
    CHECK(s.state_hash() == after_answer);
  }
  SUBCASE("undo a second turn") {
    Ids second = whole;
    for (int32_t id : e.tokenize("<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", true)) second.push_back(id);
    CHECK(s.sync(second).reused == static_cast<int>(whole.size()));
    s.generate(p, {});
    CHECK(s.sync(whole).prefilled == 0);  // from the checkpoint where the answer ended
    CHECK(s.state_hash() == after_answer);
  }
  SUBCASE("clear, and the same prompt again in the same and in a new session") {
    s.clear();
    CHECK(s.position() == 0);
    s.sync(first);
    CHECK(s.state_hash() == after_prompt);
    Session fresh(e);
    fresh.sync(first);
    CHECK(fresh.state_hash() == after_prompt);
  }
  SUBCASE("rewind reaches a checkpoint at or before the place asked for") {
    CHECK(s.rewind(static_cast<int>(first.size()) + 3) == static_cast<int>(first.size()));
    CHECK(s.state_hash() == after_prompt);
    CHECK(s.rewind(1) == 0);
  }
  SUBCASE("a stop string rolls back to the last token delivered whole") {
    const std::string text = e.detokenize(a.ids);
    GenerateParams q = p;
    q.stop = {text.substr(10, 8)};  // begins inside the text, spans tokens
    s.sync(first);
    std::string seen;
    const GenerateResult b = s.generate(q, [&](const Delivery& d) { return seen += d.text, true; });
    CHECK(b.finish == Finish::StopString);
    CHECK(seen == text.substr(0, 10));
    CHECK(b.text == seen);
    CHECK(e.detokenize(b.ids).size() <= seen.size());
    const Ids next(a.ids.begin(), a.ids.begin() + static_cast<std::ptrdiff_t>(b.ids.size()) + 1);
    CHECK(e.detokenize(next).size() > seen.size());  // and not one token earlier
    CHECK(s.position() == static_cast<int>(first.size() + b.ids.size()));
    Session plain(e);
    Ids prefix = first;
    prefix.insert(prefix.end(), b.ids.begin(), b.ids.end());
    plain.sync(prefix);
    CHECK(plain.state_hash() == s.state_hash());
  }
  SUBCASE("an interrupted answer goes on where it stopped") {
    s.sync(first);
    int n = 0;
    GenerateResult b = s.generate(p, [&](const Delivery&) { return ++n < 7; });
    CHECK(b.finish == Finish::Interrupted);
    CHECK(b.ids.size() == 7);
    GenerateParams rest = p;
    rest.max_tokens = 13;
    const GenerateResult c = s.generate(rest, {});
    b.ids.insert(b.ids.end(), c.ids.begin(), c.ids.end());
    CHECK(b.ids == a.ids);
    CHECK(s.state_hash() == after_answer);
  }
}

TEST_CASE("the multi-token-prediction layer's cache goes back with the rest, whatever its format") {
  Options o = options("cpu", "int8");
  o.mtp = true;
  SUBCASE("BF16") { o.kv_type = "bf16"; }
  SUBCASE("INT8") { o.kv_type = "int8"; }
  Engine e = Engine::open(TestModels::get().path("stories"), o);
  const Ids prompt = e.tokenize("Once upon a time there was a small bear called Tim.", false);
  Session s(e), fresh(e);
  s.sync(prompt);
  const uint64_t before = s.state_hash();
  GenerateParams p;
  p.max_tokens = 9;
  s.generate(p, {});
  CHECK(s.state_hash() != before);
  s.sync(prompt);
  CHECK(s.state_hash() == before);
  fresh.sync(prompt);
  CHECK(fresh.state_hash() == before);
}

TEST_CASE("a measured pass moves each chosen expert once, and leaves the session as it was") {
  const std::string path = TestModels::get().path("stories", DType::INT4);
  Engine e = Engine::open(path, options("cpu", "int8"));
  const qn::QnFile file = qn::QnFile::open(path);
  const ModelInfo& m = e.info();
  const Ids text = e.tokenize("Once upon a time there was a small bear called Tim. He had a red drum.", false);
  Session s(e);
  for (const int at : {0, 9}) {
    if (at) s.sync(std::span(text).first(static_cast<size_t>(at)));
    const uint64_t before = s.state_hash();
    uint64_t plain = 0;  // of a pass over one token, without its experts
    for (const int rows : {1, 4, 9}) {
      std::map<int, std::set<float>> chosen;  // by layer
      e.trace([&](int layer, std::string_view name, std::span<const float> ids, int, int) {
        if (name == "experts") chosen[layer].insert(ids.begin(), ids.end());
      });
      const auto more = std::span(text).subspan(static_cast<size_t>(at), static_cast<size_t>(rows));
      const PassTime t = s.pass(more);
      e.trace({});
      CHECK(t.seconds > 0);
      CHECK(s.position() == at);
      CHECK(s.state_hash() == before);
      uint64_t experts = 0, distinct = 0;
      for (const auto& [layer, ids] : chosen) {
        const qn::Experts x = file.experts("layers." + std::to_string(layer) + ".moe.experts", m.experts, m.width, m.expert_width);
        const qn::Tensor up = x.gate_up(0), down = x.down(0);
        distinct += ids.size();
        experts += ids.size() * static_cast<uint64_t>(qn::weight_bytes(up.dtype, up.rows(), up.cols(), up.group) + qn::weight_bytes(down.dtype, down.rows(), down.cols(), down.group));
      }
      CHECK(chosen.size() == static_cast<size_t>(m.layers));
      const auto most = static_cast<uint64_t>(m.layers * m.chosen);
      if (rows == 1) CHECK(distinct == most);
      else CHECK((distinct > most && distinct < most * static_cast<uint64_t>(rows)));
      // a token more: a row of the embedding, and a position of the cache
      const uint64_t row = static_cast<uint64_t>(m.width) * 2, position = 2ull * 2 * static_cast<uint64_t>(m.kv_heads * m.head_dim) * 2;
      if (rows == 1) plain = t.bytes - experts;
      CHECK(t.bytes == plain + experts + static_cast<uint64_t>(rows - 1) * (row + position));
      if (rows == 1) CHECK(s.bytes_per_token() == t.bytes);
      uint64_t sum = 0, moe = 0;
      for (const OpTime& op : s.profile(more)) sum += op.bytes, moe += op.name.starts_with("moe_") ? op.bytes : 0;
      CHECK(s.state_hash() == before);
      CHECK(moe > 0);
      if (rows == 1) CHECK(sum == t.bytes);
    }
  }
  CHECK_THROWS_AS(s.pass({}), Error);
  CHECK_THROWS_AS(s.pass(Ids{-1}), Error);
}

TEST_CASE("what does not fit or is wrong is refused with one line") {
  const std::string path = TestModels::get().path("tiny");
  auto refused = [&](Options o, const char* word) {
    try {
      Engine::open(path, o);
      FAIL("opened");
    } catch (const Error& e) {
      CHECK_MESSAGE(std::string(e.what()).find(word) != std::string::npos, e.what());
    }
  };
  Options o = options("cpu");
  o.ram = 1 << 20;
  refused(o, "--ctx");
  o = options("cpu");
  o.ctx = 5000;
  refused(o, "4096");
  o = options("tpu");
  refused(o, "--device");
  Engine e = Engine::open(path, options("ref"));
  Session s(e);
  CHECK_THROWS_AS(s.sync(Ids{}), Error);
  CHECK_THROWS_AS(s.sync(Ids{320}), Error);
  CHECK_THROWS_AS(s.sync(Ids{-1}), Error);
  CHECK_THROWS_AS(s.generate({}, {}), Error);
  CHECK_THROWS_AS(e.tokenize("x", false), Error);
}
