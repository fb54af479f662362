// The whole model on a GPU. Where there is none every case says SKIPPED.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "convert/synthetic.h"
#include "cuda/cuda.h"
#include "ggml-lite/base/safetensors.h"
#include "ggml-lite/core/qn.h"
#include "qnext.h"
#include "tests/close.h"
#include "tests/models.h"
#include "tests/temp_dir.h"

namespace {

using namespace qnext;
using qn::DType;
using qn::SafeTensors;
using qn::TestModels;
using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;

bool no_gpu() {
  if (!qn::list_cuda_devices().empty()) return false;
  MESSAGE("SKIPPED: no GPU");
  return true;
}

Options options(const char* act = "bf16", const char* device = "cuda") {
  Options o;
  o.device = device, o.act = act, o.ctx = 2048, o.threads = 2;
  return o;
}

SafeTensors stories_expected() { return SafeTensors::open_file(std::string(QN_STORIES) + "/expected.safetensors"); }

double worst(std::span<const float> a, std::span<const float> b) {
  REQUIRE(a.size() == b.size());
  double w = 0;
  for (size_t i = 0; i < a.size(); i++) {
    REQUIRE((qn::finite_bits(a[i]) && qn::finite_bits(b[i])));
    w = std::max(w, std::fabs(static_cast<double>(a[i]) - b[i]));
  }
  return w;
}

// How far the best logit is ahead of the second
float lead(std::span<const float> l) {
  float a = -INFINITY, b = -INFINITY;
  for (float x : l) x > a ? (b = a, a = x) : b = std::max(b, x);
  return a - b;
}

Ids some_tokens(int n, int vocab) {
  Ids t;
  for (int i = 0; i < n; i++) t.push_back((i * 7919 + i * i * 31 + 5) % vocab);
  return t;
}

}  // namespace

TEST_CASE("CUDA: tiny models agree with transformers in float32") {
  if (no_gpu()) return;
  for (const auto& [model, expected] : {std::pair{"tiny", "expected-0"}, {"tiny", "expected-1"}, {"tiny-yarn", "expected-0"}, {"tiny-fp8", "expected-0"}}) {
    const auto file = SafeTensors::open_file(std::string(QN_TEST_DATA) + "/" + model + "/" + expected + ".safetensors");
    const Ids tokens = file.read_i32("tokens");
    Options o = options("f32");
    o.mtp = true, o.ctx = 0;
    Engine e = Engine::open(TestModels::get().path(model), o);
    const auto v = static_cast<size_t>(e.info().vocab);
    Floats got, drafts;
    e.trace([&](int, std::string_view name, std::span<const float> x, int, int) {
      if (name == "mtp_logits") drafts.insert(drafts.end(), x.begin(), x.end());
    });
    Session s(e);
    s.sync_all(tokens, [&](int, std::span<const float> l) { got.insert(got.end(), l.begin(), l.end()); });
    const double whole = worst(got, file.read_f32("logits")), mtp = worst(drafts, file.read_f32("mtp_logits"));
    e.trace({});
    double one = 0;  // token by token, as decode does
    Session t(e);
    t.sync(std::span(tokens).first(1));
    for (size_t i = 1; i < tokens.size(); i++) {
      one = std::max(one, worst(t.logits(), std::span(got).subspan((i - 1) * v, v)));
      t.step(tokens[i]);
    }
    MESSAGE(std::string(model), " ", std::string(expected), ": max |dlogit| ", whole, ", MTP ", mtp, ", prefill against decode ", one);
    CHECK(whole <= 1e-3);
    CHECK(mtp <= 1e-3);
    CHECK(one <= 1e-3);
  }
}

TEST_CASE("CUDA: stories, BF16: prompts prefilled at once and token by token give the same greedy text") {
  if (no_gpu()) return;
  const auto file = stories_expected();
  const Ids text = file.read_i32("ppl.tokens");
  for (const auto& [experts, kv_type] : {std::pair{DType::BF16, "bf16"}, {DType::INT8, "bf16"}, {DType::INT4, "bf16"}, {DType::BF16, "int8"}}) {
    Options o = options();
    o.kv_type = kv_type;
    Engine e = Engine::open(TestModels::get().path("stories", experts, experts == DType::INT4 ? DType::INT8 : DType::BF16), o);
    for (int n : {1, 7, 63, 64, 65, 200, 1000}) {
      const auto prompt = std::span(text).first(static_cast<size_t>(n));
      Session whole(e), single(e);
      whole.sync(prompt);
      for (int i = 1; i <= n; i++) single.sync(prompt.first(static_cast<size_t>(i)));
      int differ = 0;
      for (int i = 0; i < 64; i++) {  // both are fed the same tokens; where the choice is clear they choose alike
        const int32_t a = qn::argmax(whole.logits()), b = qn::argmax(single.logits());
        if (a != b && lead(single.logits()) >= 0.1f) differ++;
        const int32_t next = b;
        whole.step(next), single.step(next);
      }
      CHECK_MESSAGE(differ == 0, qn::name(experts), ", cache ", std::string(kv_type), ": ", n, " tokens: ", differ, " of 64 differ");
    }
  }
}

// Lines of held-out stories, without questions or secrets
std::vector<std::string> story_lines() {
  std::ifstream in(std::string(QN_STORIES) + "/heldout.txt");
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);)
    if (line.size() > 200 && line.find('|') == std::string::npos && line.find("secret") == std::string::npos) lines.push_back(line);
  return lines;
}

// A chat of about `length` tokens that names a number at its beginning and asks for it at its end
Ids needle(const Engine& e, const std::vector<std::string>& lines, int seed, int length, std::string* number) {
  static const char* const places[] = {"forest", "tower", "castle", "river", "school", "garden", "farm", "meadow"};
  const std::string place = places[seed % 8];
  *number = std::to_string(1000 + seed * 7919 % 9000);
  std::string text = "<|im_start|>user\nThe secret number of the " + place + " is " + *number + ".\n";
  size_t tokens = 30;  // the rest of the chat
  for (size_t i = 0; tokens < static_cast<size_t>(length); i++) {
    const std::string line = lines[(static_cast<size_t>(seed) * 31 + i) % lines.size()] + "\n";
    text += line, tokens += e.tokenize(line, true).size();
  }
  return e.tokenize(text + "\nWhat is the secret number of the " + place + "?<|im_end|>\n<|im_start|>assistant\n", true);
}

TEST_CASE("CUDA: stories: a number hidden 1,000 tokens back is found; at 4K and 16K answers are the CPU's") {
  if (no_gpu()) return;
  Options o = options();
  o.ctx = 20000;
  const std::string path = TestModels::get().path("stories");
  Engine gpu = Engine::open(path, o);
  o.device = "cpu", o.threads = 0;
  Engine cpu = Engine::open(path, o);
  const auto lines = story_lines();
  REQUIRE(lines.size() > 50);
  int found = 0;
  for (int seed = 0; seed < 50; seed++) {
    std::string number;
    Session s(gpu);
    s.sync(needle(gpu, lines, seed, 1000, &number));
    Ids answer;
    for (int i = 0; i < 24; i++) answer.push_back(qn::argmax(s.logits())), s.step(answer.back());
    found += gpu.detokenize(answer).find(" " + number + ".") != std::string::npos;
  }
  MESSAGE(found, " of 50 numbers found");
  CHECK(found >= 45);
  for (const auto& [length, prompts] : {std::pair{4000, 6}, {16000, 2}}) {
    int differ = 0, same = 0;
    for (int seed = 0; seed < prompts; seed++) {
      std::string number;
      const Ids prompt = needle(gpu, lines, 100 + seed, length, &number);
      Session a(gpu), b(cpu);
      a.sync(prompt), b.sync(prompt);
      for (int i = 0; i < 12; i++) {  // both are fed the CPU's choice
        const int32_t next = qn::argmax(b.logits());
        const bool equal = qn::argmax(a.logits()) == next;
        same += equal, differ += !equal && lead(b.logits()) >= 0.1f;
        a.step(next), b.step(next);
      }
    }
    MESSAGE(length, " tokens: ", same, " of ", 12 * prompts, " choices alike, ", differ, " differ where the CPU's is clear");
    CHECK(differ == 0);
  }
}

TEST_CASE("CUDA: rows of steps of 1 to 8 tokens have the same bits") {
  if (no_gpu()) return;
  for (const auto& [act, kv_type] : {std::pair{"bf16", ""}, {"int8", ""}, {"f32", ""}, {"bf16", "int8"}, {"f32", "int8"}}) {
    Options o = options(act);
    o.kv_type = kv_type;
    const std::string path = TestModels::get().path("stories", DType::INT4, DType::INT8, 32);
    Engine e = Engine::open(path, o);
    const Ids tokens = some_tokens(70, 1165);
    Session one(e);
    std::vector<Floats> want;
    one.sync(std::span(tokens).first(1));
    for (size_t i = 1; i <= tokens.size(); i++) {
      want.emplace_back(one.logits().begin(), one.logits().end());
      if (i < tokens.size()) one.step(tokens[i]);
    }
    const uint64_t hash = one.state_hash();
    for (int n : {2, 3, 5, 8}) {
      Session s(e);
      for (size_t at = 0; at < tokens.size();) {
        at = std::min(at + static_cast<size_t>(n), tokens.size());
        s.sync(std::span(tokens).first(at));
        CHECK_MESSAGE(std::memcmp(s.logits().data(), want[at - 1].data(), s.logits().size_bytes()) == 0, std::string(act), " ", std::string(kv_type), ": position ", at, " in steps of ", n);
      }
      CHECK(s.state_hash() == hash);
    }
  }
}

// The kernels that one token of the real model takes are made for its shapes; no smaller model gets there.
static void write_two_layers(const std::string& path, int vocab, DType rest, bool mtp) {
  qn::ModelConfig c = qn::synthetic_config("qwen3-next-80b-a3b", 2);
  c.kinds = {0, 1}, c.vocab = vocab, c.end_tokens = {7};
  qn::SyntheticOptions make;
  make.convert.recipe = {DType::INT4, rest, 0}, make.convert.mtp = mtp;
  qn::write_synthetic(c, path, make);
}

TEST_CASE("CUDA: two layers of the 80B model: rows of steps of 1 to 8 tokens have the same bits, and are near the CPU's") {
  if (no_gpu()) return;
  qn::TempDir dir;
  const std::string path = dir / "two.qn";
  for (const DType rest : {DType::BF16, DType::INT8}) {
    write_two_layers(path, 6000, rest, false);
    Engine e = Engine::open(path, options()), cpu = Engine::open(path, options("f32", "cpu"));
    const Ids tokens = some_tokens(20, 6000);
    Session one(e), reference(cpu);
    std::vector<Floats> want;
    double least = 1;  // cosine
    for (size_t i = 1; i <= tokens.size(); i++) {
      one.sync(std::span(tokens).first(i)), reference.sync(std::span(tokens).first(i));
      want.emplace_back(one.logits().begin(), one.logits().end());
      double ab = 0, aa = 0, bb = 0;
      for (size_t j = 0; j < want.back().size(); j++) {
        const double a = want.back()[j], b = reference.logits()[j];
        ab += a * b, aa += a * a, bb += b * b;
      }
      least = std::min(least, ab / std::sqrt(aa * bb));
    }
    MESSAGE("cosine with the CPU's logits at least ", least);
    CHECK(least > 0.995);
    for (int n : {2, 3, 4, 5, 8}) {
      Session s(e);
      for (size_t at = 0; at < tokens.size();) {
        at = std::min(at + static_cast<size_t>(n), tokens.size());
        s.sync(std::span(tokens).first(at));
        CHECK_MESSAGE(std::memcmp(s.logits().data(), want[at - 1].data(), s.logits().size_bytes()) == 0, "position ", at, " in steps of ", n);
      }
      CHECK(s.state_hash() == one.state_hash());
    }
  }
}

TEST_CASE("CUDA: guesses among the common tokens of a large vocabulary change no text") {
  if (no_gpu()) return;
  qn::TempDir dir;
  const std::string path = dir / "large.qn";
  write_two_layers(path, 120000, DType::INT8, true);
  Options drafts = options(), plain = options();
  drafts.draft = 3, plain.draft = 0;
  Engine with = Engine::open(path, drafts), without = Engine::open(path, plain);
  for (int from : {0, 119000})  // a text of common tokens, and one of others
    for (float temperature : {0.f, 1.f}) {
      Ids prompt = some_tokens(12, 1000);
      for (int32_t& id : prompt) id += from;
      GenerateParams p;
      p.max_tokens = 80, p.sampling.temperature = temperature, p.sampling.seed = 3;
      Session a(with), b(without);
      a.sync(prompt), b.sync(prompt);
      const GenerateResult x = a.generate(p, {}), y = b.generate(p, {});
      CHECK(x.ids == y.ids);
      CHECK(x.drafted > 0);
      CHECK(y.drafted == 0);
    }
}

TEST_CASE("CUDA: a generation is the same with and without recordings, again, and as the host would choose") {
  if (no_gpu()) return;
  const std::string path = TestModels::get().path("stories", DType::INT4, DType::BF16, 32);
  Options plain = options();
  plain.graph = false;
  Engine e = Engine::open(path, options()), slow = Engine::open(path, plain);
  const Ids prompt = e.chat_tokens(std::vector<Message>{{"user", "Tell me a story about a cat.", {}, {}, {}}}, {});
  for (float temperature : {0.f, 0.8f}) {
    GenerateParams p;
    p.max_tokens = 60, p.sampling.temperature = temperature, p.sampling.top_k = 20, p.sampling.top_p = 0.9f, p.sampling.seed = 7;
    Session a(e), b(slow), c(e), host(e);
    a.sync(prompt), b.sync(prompt), c.sync(prompt), host.sync(prompt);
    const Ids text = a.generate(p, {}).ids;
    CHECK(text.size() > 10);
    CHECK(b.generate(p, {}).ids == text);
    CHECK(c.generate(p, {}).ids == text);
    CHECK(a.state_hash() == c.state_hash());
    qn::Sampler sampler(p.sampling, {});
    for (size_t i = 0; i < text.size(); i++) {
      CHECK(sampler.next(host.logits(), host.tokens(), i, static_cast<uint64_t>(host.position())) == text[i]);
      host.step(text[i]);
    }
    CHECK(a.sync(prompt).prefilled == 0);  // back to the prompt and again
    CHECK(a.generate(p, {}).ids == text);
  }
}

TEST_CASE("CUDA: an answer that is stopped ends exactly after the last token delivered") {
  if (no_gpu()) return;
  Engine e = Engine::open(TestModels::get().path("stories"), options());
  const Ids prompt = e.chat_tokens(std::vector<Message>{{"user", "Tell me a story about a cat.", {}, {}, {}}}, {});
  GenerateParams p;
  p.max_tokens = 20;
  Session s(e);
  s.sync(prompt);
  const GenerateResult all = s.generate(p, {});
  const uint64_t after = s.state_hash();
  s.sync(prompt);
  int n = 0;
  GenerateResult b = s.generate(p, [&](const Delivery&) { return ++n < 7; });
  CHECK(b.ids.size() == 7);
  CHECK(s.position() == static_cast<int>(prompt.size()) + 7);
  p.max_tokens = 13;
  const GenerateResult c = s.generate(p, {});
  b.ids.insert(b.ids.end(), c.ids.begin(), c.ids.end());
  CHECK(b.ids == all.ids);
  CHECK(s.state_hash() == after);
}

TEST_CASE("CUDA: memory in use is what the plan said; what does not fit is refused before anything is taken") {
  if (no_gpu()) return;
  const std::string path = TestModels::get().path("stories");
  Options o = options();
  o.ctx = 0;
  {
    Engine e = Engine::open(path, o);
    Session s(e);
    const double planned = static_cast<double>(e.plan().weights + e.plan().kv + e.plan().state + e.plan().scratch);
    MESSAGE("planned ", planned / 1e6, " MB, in use ", static_cast<double>(e.memory_use().device_used) / 1e6, " MB");
    CHECK(static_cast<double>(e.memory_use().device_used) <= planned + 384e6);
  }
  const auto before = qn::make_cuda_device(0);
  const uint64_t free = before->memory_free();
  const qn::Buffer most = before->alloc(free - (300u << 20), "all of it");
  try {
    Engine::open(path, o);
    FAIL("opened");
  } catch (const Error& e) {
    CHECK_MESSAGE(std::string(e.what()).find("missing") != std::string::npos, e.what());
  }
}

TEST_CASE("CUDA: what an engine keeps for its session is taken before the next engine plans") {
  if (no_gpu()) return;
  const std::string path = TestModels::get().path("stories");
  Engine e = Engine::open(path, options());
  const Plan& p = e.plan();
  const auto open = static_cast<double>(e.memory_use().device_used);
  CHECK(open >= static_cast<double>(p.weights + p.kv + p.state + p.scratch));
  const Engine second = Engine::open(path, options());
  CHECK(second.plan().budget + p.kv + p.state + p.scratch < p.budget);
  Session s(e);
  CHECK(s.sync(some_tokens(10, 1165)).prefilled == 10);
}

TEST_CASE("CUDA: --verify checks what is not copied, too") {
  if (no_gpu()) return;
  const std::string path = TestModels::get().path("stories"), damaged = path + ".damaged";
  const auto file = qn::QnFile::open(path);
  for (const char* tensor : {"tokenizer", "mtp.fc", "mtp.head", "norm"}) {
    std::filesystem::copy_file(path, damaged, std::filesystem::copy_options::overwrite_existing);
    std::fstream f(damaged, std::ios::in | std::ios::out | std::ios::binary);
    f.seekp(static_cast<std::streamoff>(file.find(tensor)->offset + file.find(tensor)->bytes - 1));
    f.put(static_cast<char>(file.data(*file.find(tensor)).back() ^ 1));
    f.close();
    Options o = options();
    o.verify = Verify::Yes;
    CHECK_THROWS_WITH_AS(Engine::open(damaged, o), doctest::Contains(tensor), Error);
  }
}

TEST_CASE("CUDA: times of a generation are those of as many passes as tokens") {
  if (no_gpu()) return;
  Engine e = Engine::open(TestModels::get().path("stories"), options());
  Session s(e);
  s.sync(some_tokens(10, 1165));
  GenerateParams p;
  p.max_tokens = 12, p.stop_at_end_tokens = false;
  const GenerateResult r = s.generate(p, {});
  CHECK(s.timings().decode_tokens == 12);
  CHECK(s.timings().decode_seconds > 0);
  CHECK(s.timings().decode_seconds <= r.seconds);
}

TEST_CASE("CUDA: two GPUs in one process, in turn") {
  if (qn::list_cuda_devices().size() < 2) {
    MESSAGE("SKIPPED: no GPU beside the first");
    return;
  }
  const std::string path = TestModels::get().path("stories", DType::INT4);
  Engine a = Engine::open(path, options("bf16", "cuda:0")), b = Engine::open(path, options("bf16", "cuda:1"));
  Session x(a), y(b);
  const Ids tokens = some_tokens(40, 1165);
  x.sync(tokens), y.sync(tokens);
  for (int i = 0; i < 20; i++) {
    CHECK(worst(x.logits(), y.logits()) == 0);
    const int32_t next = qn::argmax(x.logits());
    x.step(next), y.step(next);
  }
}

TEST_CASE("CUDA: devices that are not there are refused") {
  if (no_gpu()) return;
  for (const char* device : {"cuda:63", "cuda:0,63"}) {
    Options o = options("bf16", device);
    CHECK_THROWS_AS(Engine::open(TestModels::get().path("tiny"), o), Error);
  }
}
