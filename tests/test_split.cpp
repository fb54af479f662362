// The layers of a model over several devices: the numbers are those of one device, bit for bit, wherever the layers are cut.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "convert/synthetic.h"
#include "cuda/cuda.h"
#include "ggml-lite/base/safetensors.h"
#include "ggml-lite/core/device_list.h"
#include "ggml-lite/nn/pipeline.h"
#include "ggml-lite/ref/ref.h"
#include "qnext.h"
#include "tests/close.h"
#include "tests/models.h"
#include "tests/temp_dir.h"

namespace {

using namespace qnext;
using qn::DType;
using qn::TestModels;
using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;
using Counts = std::vector<int>;

Options options(const char* device, const Counts& split = {}, const char* act = "f32") {
  Options o;
  o.device = device, o.split = split, o.act = act, o.threads = 1, o.ctx = 600;
  return o;
}

bool no_gpu() {
  if (!qn::list_cuda_devices().empty()) return false;
  MESSAGE("SKIPPED: no GPU");
  return true;
}

Ids some_tokens(int n, int vocab) {
  Ids t;
  for (int i = 0; i < n; i++) t.push_back((i * 7919 + i * i * 31 + 5) % vocab);
  return t;
}

struct Seen {
  Floats logits, traced;
  std::vector<std::pair<int, std::string>> names;
  std::vector<uint64_t> hashes;
  bool operator==(const Seen& o) const {
    return logits.size() == o.logits.size() && traced.size() == o.traced.size() && names == o.names && hashes == o.hashes &&
           std::memcmp(logits.data(), o.logits.data(), logits.size() * 4) == 0 && std::memcmp(traced.data(), o.traced.data(), traced.size() * 4) == 0;
  }
};

// Everything that can be seen of a model at work: prefill in pieces, single tokens, going back, intermediate values
Seen look(const std::string& path, Options o) {
  Engine e = Engine::open(path, o);
  const Ids tokens = some_tokens(90, e.info().vocab);
  Seen seen;
  Session s(e);
  const auto note = [&] {
    seen.logits.insert(seen.logits.end(), s.logits().begin(), s.logits().end());
    seen.hashes.push_back(s.state_hash());
  };
  s.sync(std::span(tokens).first(61)), note();
  for (int i = 61; i < 66; i++) s.step(tokens[static_cast<size_t>(i)]), note();
  seen.hashes.push_back(static_cast<uint64_t>(s.rewind(63))), note();
  s.sync(tokens), note();
  s.clear();
  e.trace([&](int layer, std::string_view name, std::span<const float> x, int, int) {
    seen.names.emplace_back(layer, name);
    seen.traced.insert(seen.traced.end(), x.begin(), x.end());
  });
  s.sync_all(std::span(tokens).first(20), [&](int, std::span<const float> l) { seen.logits.insert(seen.logits.end(), l.begin(), l.end()); });
  e.trace({});
  note();
  return seen;
}

// A conversation: answers, one that is stopped by a text, one that is cut short, the same again
std::vector<std::string> talk(const std::string& path, Options o, std::vector<uint64_t>* hashes) {
  Engine e = Engine::open(path, o);
  const Ids first = e.chat_tokens(std::vector<Message>{{"user", "Tell me a story about a cat.", {}, {}, {}}}, {});
  std::vector<std::string> said;
  Session s(e);
  GenerateParams p;
  p.max_tokens = 24;
  s.sync(first);
  const auto answer = [&](const GenerateParams& params, int most = 1000) {
    int n = 0;
    const GenerateResult r = s.generate(params, [&](const Delivery&) { return ++n < most; });
    said.push_back(std::to_string(static_cast<int>(r.finish)) + ":" + std::to_string(s.position()) + ":" + r.text);
    hashes->push_back(s.state_hash());
    return e.detokenize(r.ids);
  };
  const std::string text = answer(p);
  GenerateParams stopped = p;
  stopped.stop = {text.substr(10, 8)};
  CHECK(s.sync(first).prefilled == 0);
  answer(stopped);
  CHECK(said.back().ends_with(text.substr(0, 10)));
  answer(p);  // from where it was stopped
  s.sync(first), answer(p, 7), answer(p, 5);
  GenerateParams drawn = p;
  drawn.sampling.temperature = 0.9f, drawn.sampling.seed = 5;
  s.sync(first), answer(drawn);
  Ids second = s.tokens();
  for (int32_t id : e.tokenize("<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", true)) second.push_back(id);
  s.sync(second), answer(p);
  return said;
}

const std::pair<const char*, Counts> kCuts[] = {
    {"cpu,cpu", {}}, {"cpu,cpu", {1, 7}}, {"cpu,cpu", {7, 1}}, {"cpu,cpu,cpu", {}}, {"cpu,cpu,cpu", {3, 1, 4}}};  // the last: attention alone

// A small model of random weights whose head is its embedding, which the first and the last device need then
void write_tied(const std::string& path, bool mtp) {
  qn::ModelConfig c = qn::synthetic_config("qwen3-next-80b-a3b", 4);
  c.tied = true, c.kinds = {0, 1, 0, 1}, c.width = 128, c.vocab = 700, c.end_tokens = {7};
  c.experts = 8, c.chosen = 2, c.expert_width = 64, c.shared_width = 64, c.heads = 4, c.kv_heads = 2, c.head_dim = 64, c.rotary_dim = 32;
  c.key_heads = 2, c.value_heads = 4, c.key_dim = 64, c.value_dim = 64;
  qn::SyntheticOptions o;
  o.convert.recipe = {DType::INT4, DType::BF16, 64}, o.convert.mtp = mtp;
  qn::write_synthetic(c, path, o);
}

}  // namespace

TEST_CASE("layers on several devices: logits, states, traces are those of one device, bit for bit") {
  for (const auto& [model, act, kv_type, mtp] : {std::tuple{"stories", "int8", "bf16", false}, {"stories", "int8", "int8", true}, {"tiny", "f32", "f32", true}}) {
    const std::string path = TestModels::get().path(model);
    Options one = options("cpu", {}, act);
    one.kv_type = kv_type, one.mtp = mtp, one.ubatch = 16;
    const Seen want = look(path, one);
    const int layers = Engine::open(path, one).info().layers;
    for (auto [device, split] : kCuts) {
      if (layers != 8 && !split.empty()) split = split.size() == 2 ? Counts{1, layers - 1} : Counts{1, 1, layers - 2};
      Options o = one;
      o.device = device, o.split = split;
      CHECK_MESSAGE((look(path, o) == want), std::string(model), " on ", std::string(device));
    }
  }
}

TEST_CASE("layers on several devices: answers, stop strings, interruptions and undone turns are those of one device") {
  const std::string path = TestModels::get().path("stories", DType::INT4, DType::INT8, 32);
  std::vector<uint64_t> want_states;
  const auto want = talk(path, options("cpu", {}, "int8"), &want_states);
  CHECK(want.size() == 7);
  for (const auto& [device, split] : kCuts) {
    std::vector<uint64_t> states;
    CHECK(talk(path, options(device, split, "int8"), &states) == want);
    CHECK(states == want_states);
  }
}

TEST_CASE("layers on several devices: a model whose head is its embedding") {
  qn::TempDir dir;
  for (bool mtp : {false, true}) {
    write_tied(dir / "tied.qn", mtp);
    Options o = options("cpu");
    o.mtp = mtp;
    const Seen want = look(dir / "tied.qn", o);
    o.device = "cpu,cpu";
    CHECK((look(dir / "tied.qn", o) == want));
    Engine one = Engine::open(dir / "tied.qn", options("cpu")), two = Engine::open(dir / "tied.qn", options("cpu,cpu"));
    CHECK(two.info().bytes_per_token == one.info().bytes_per_token);
    CHECK(two.plan().devices[0].weights + two.plan().devices[1].weights == one.plan().devices[0].weights + 700 * 128 * 2);
  }
}

TEST_CASE("layers on several devices: when there are more checkpoints than are kept, all stages keep the same") {
  const std::string path = TestModels::get().path("tiny");
  const auto reached = [&](const char* device) {
    Engine e = Engine::open(path, options(device));
    const Ids tokens = some_tokens(160, e.info().vocab);
    Session s(e);
    for (size_t n = 2; n <= tokens.size(); n += 2) s.sync(std::span(tokens).first(n));  // each leaves a checkpoint
    std::vector<uint64_t> at;
    for (int back = 159; back > 0; back -= 1) {
      at.push_back(static_cast<uint64_t>(s.rewind(back)));
      at.push_back(s.state_hash());
    }
    return at;
  };
  const auto want = reached("cpu");
  CHECK(std::set(want.begin(), want.end()).size() > 100);
  CHECK(reached("cpu,cpu,cpu") == want);
}

TEST_CASE("layers on several devices: prefill tells of progress and can be interrupted; measured passes leave the session as it was") {
  const std::string path = TestModels::get().path("stories");
  Options o = options("cpu,cpu,cpu");
  o.ubatch = 16;
  Engine e = Engine::open(path, o), one = Engine::open(path, options("cpu"));
  const Ids tokens = some_tokens(200, 1165);
  Session s(e), plain(one);
  std::atomic<bool> stop = false;
  uint64_t last = 0;
  const Progress progress = [&](std::string_view, uint64_t done, uint64_t total) {
    CHECK((done >= last && done <= total));
    last = done;
    if (done >= 40) stop = true;
  };
  const SyncResult r = s.sync(tokens, progress, &stop);
  CHECK(r.interrupted);
  CHECK((s.position() == r.prefilled && r.prefilled >= 40 && r.prefilled < 200));
  CHECK(last == static_cast<uint64_t>(r.prefilled));
  s.sync(tokens), plain.sync(tokens);
  const uint64_t before = s.state_hash();
  CHECK(before == plain.state_hash());
  const auto more = std::span(tokens).first(4);
  CHECK(s.pass(more).bytes == plain.pass(more).bytes);
  CHECK(s.bytes_per_token() == plain.bytes_per_token());
  const auto ops = s.profile(more.first(1)), plain_ops = plain.profile(more.first(1));
  REQUIRE(ops.size() == plain_ops.size());
  for (size_t i = 0; i < ops.size(); i++) {
    CHECK(ops[i].name == plain_ops[i].name);
    CHECK(ops[i].calls == plain_ops[i].calls);
    CHECK(ops[i].bytes == plain_ops[i].bytes);
  }
  CHECK(s.state_hash() == before);
  s.pretend(100, 3);
  CHECK(s.position() == 100);
  s.step(5);
  CHECK(s.rewind(100) == 100);
}

TEST_CASE("layers on several devices: the plan has a row for each, which add up to that of one device") {
  const std::string path = TestModels::get().path("stories");
  Options single = options("cpu"), several = options("cpu,cpu,cpu");
  single.draft = several.draft = 0;  // the layer that guesses has an embedding of its own on the last device
  Engine one = Engine::open(path, single), three = Engine::open(path, several);
  const Plan &a = one.plan(), &b = three.plan();
  CHECK(a.devices.size() == 1);
  REQUIRE(b.devices.size() == 3);
  CHECK(b.device == a.device + " + " + a.device + " + " + a.device);
  CHECK((b.kv == a.kv && b.state == a.state && b.weights == a.weights && b.ctx == a.ctx && b.scratch > a.scratch));
  int at = 0;
  uint64_t kv = 0, state = 0, scratch = 0, most = 0, sum = 0;
  for (const DevicePlan& d : b.devices) {
    CHECK(d.begin == at);
    CHECK(d.end > d.begin);
    CHECK(d.device == a.device);
    CHECK(d.budget <= a.budget * 2 / 5);  // what is free changes while tests run
    at = d.end, kv += d.kv, state += d.state, scratch += d.scratch, sum += d.weights, most = std::max(most, d.weights);
  }
  CHECK(at == one.info().layers);
  CHECK((kv == b.kv && state == b.state && scratch == b.scratch));
  CHECK(sum == a.devices[0].weights);
  CHECK(most < sum / 2);
  CHECK(three.memory_use().device_total == 0);
}

TEST_CASE("layers on several devices: wrong cuts and lists are refused with one line") {
  const auto refused = [](const Options& o, const char* word) {
    const std::string path = TestModels::get().path("tiny");
    CHECK_THROWS_WITH_AS(Engine::open(path, o), doctest::Contains(word), Error);
  };
  const int layers = Engine::open(TestModels::get().path("tiny"), options("cpu")).info().layers;
  refused(options("cpu,cpu", {layers}), "--split");
  refused(options("cpu", {1, layers - 1}), "expected 1 number");
  refused(options("cpu,cpu", {layers, 1}), "add up to");
  refused(options("cpu,cpu", {layers, 0}), "at least 1");
  std::string many = "cpu";
  for (int i = 0; i < layers; i++) many += ",cpu";
  refused(options(many.c_str()), "one per layer");
  for (const char* bad : {"", ",", "cpu,", ",cpu", "cpu,ref", "cpu,0", "cuda,cuda", "cuda:", "cuda:0,", "cuda:0,cpu", "cuda:0,,1", "cuda:-1", "auto,auto", "cuda:0 ,1", "cuda:9999"})
    CHECK_THROWS_WITH_AS(qn::parse_devices(bad), doctest::Contains("--device"), Error);
  using Names = std::vector<qn::DeviceName>;
  CHECK((qn::parse_devices("cuda:0,3,0") == Names{{"cuda", 0}, {"cuda", 3}, {"cuda", 0}}));
  CHECK((qn::parse_devices("cpu,cpu") == Names{{"cpu", 0}, {"cpu", 0}}));
  CHECK((qn::parse_devices("cuda") == Names{{"cuda", 0}}));
  for (const OptionRow& row : options_table()) {
    Options o;
    if (std::string(row.flags) != "--split") continue;
    row.set(o, "26,22");
    CHECK(o.split == Counts{26, 22});
    for (const char* bad : {"", "26,", ",22", "0,48", "26;22", "x"}) CHECK_THROWS_AS(row.set(o, bad), Error);
  }
}

// What passes on to whom: stage i appends its number to h, as the digits of a decimal number
static float through(qn::Pipeline& p, const std::vector<qn::PipelineStage*>& stages, int n) {
  for (qn::PipelineStage* s : stages) std::fill_n(s->h.f32(), 3 * 4, 0.f);
  p.run(n, 0, [&](size_t i) {
    for (int k = 0; k < n * 4; k++) stages[i]->h.f32()[k] = stages[i]->h.f32()[k] * 10 + static_cast<float>(i + 1);
  });
  return stages.back()->h.f32()[n * 4 - 1];
}

TEST_CASE("a pipeline hands h on in the order of its stages, as many rows as a pass has, and the choice of the last back to all") {
  std::vector<std::unique_ptr<qn::Device>> devices;
  std::vector<std::unique_ptr<qn::PipelineStage>> owned;
  std::vector<qn::Buffer> memory;
  std::vector<qn::PipelineStage*> stages;
  qn::StateShape shape;
  shape.attention = {false}, shape.key_heads = 1, shape.value_heads = 1, shape.key_dim = 32, shape.value_dim = 32;
  qn::Pipeline right, wrong;
  for (int i = 0; i < 3; i++) {
    devices.push_back(qn::make_ref_device());
    owned.push_back(std::make_unique<qn::PipelineStage>(*devices.back(), shape, 3, 3));
    memory.push_back(devices.back()->alloc(3 * 4 * 4, "h"));
    owned.back()->h = qn::view(memory.back().data(), DType::F32, 3, 4);
    stages.push_back(owned.back().get());
  }
  for (int i : {0, 1, 2}) right.add(*stages[static_cast<size_t>(i)]);
  for (int i : {0, 2, 1}) wrong.add(*stages[static_cast<size_t>(i)]);
  CHECK(right.ahead() == 3);
  for (int n : {1, 2, 3}) {
    CHECK(through(right, stages, n) == 123);
    if (n < 3) CHECK(stages[2]->h.f32()[n * 4] == 0);
    CHECK(through(wrong, stages, n) != 123);
  }
  const Ids ids = {7, 8};
  right.prepare({{5, 2}, {4, 2}}, ids, false);
  CHECK((stages[0]->ids.i32()[1] == 8 && stages[2]->ids.i32()[1] == 0));
  for (qn::PipelineStage* s : stages) CHECK((s->step[0].pos == 5 && s->step[0].n_tok == 2 && s->step[1].pos == 4));
  right.prepare({{5, 2}, {4, 2}}, ids, true);
  CHECK(stages[2]->ids.i32()[1] == 8);
  stages[2]->step[0] = {7, 1}, stages[2]->ids.i32()[0] = 99;
  right.hand_back();
  for (qn::PipelineStage* s : stages) CHECK((s->step[0].pos == 7 && s->step[0].n_tok == 1));
  CHECK(stages[0]->ids.i32()[0] == 99);

  std::fill_n(stages[1]->state.delta(0).f32(), 32, 1.f);
  right.checkpoint(4), right.checkpoint(9);
  const uint64_t hash = right.hash(9);
  std::fill_n(stages[1]->state.delta(0).f32(), 32, 2.f);
  CHECK(right.hash(9) != hash);
  CHECK(wrong.hash(9) != right.hash(9));
  CHECK(right.restore(9) == 9);
  CHECK(right.hash(9) == hash);
  stages[2]->state.reset();
  CHECK_THROWS(right.restore(9));  // a stage without the checkpoint of the others
}

TEST_CASE("CUDA: layers on several logical devices of one GPU: bits and answers are those of one") {
  if (no_gpu()) return;
  for (const auto& [experts, rest, kv_type] : {std::tuple{DType::BF16, DType::BF16, "bf16"}, {DType::INT4, DType::INT8, "int8"}}) {
    const std::string path = TestModels::get().path("stories", experts, rest, experts == DType::INT4 ? 32 : 0);
    Options one = options("cuda:0", {}, "bf16");
    one.kv_type = kv_type, one.ubatch = 16;
    std::vector<uint64_t> want_states;
    const Seen want = look(path, one);
    const auto want_said = talk(path, one, &want_states);
    for (const auto& [device, split] : {std::pair<const char*, Counts>{"cuda:0,0", {}}, {"cuda:0,0", {1, 7}}, {"cuda:0,0,0", {}}, {"cuda:0,0,0", {3, 1, 4}}})
      for (bool graph : {true, false}) {
        Options o = one;
        o.device = device, o.split = split, o.graph = graph;
        CAPTURE(device);
        CAPTURE(graph);
        CHECK((look(path, o) == want));
        std::vector<uint64_t> states;
        CHECK(talk(path, o, &states) == want_said);
        CHECK(states == want_states);
      }
  }
}

TEST_CASE("CUDA: layers on several logical devices of one GPU: long prompts in many passes, with the multi-token-prediction layer") {
  if (no_gpu()) return;
  const std::string path = TestModels::get().path("stories");
  for (bool mtp : {false, true}) {
    Options o = options("cuda:0", {}, "bf16");
    o.ctx = 4000, o.ubatch = 64, o.mtp = mtp;
    Engine one = Engine::open(path, o);
    o.device = "cuda:0,0,0";
    Engine three = Engine::open(path, o);
    Session a(one), b(three);
    const Ids tokens = some_tokens(3900, 1165);
    a.sync(tokens), b.sync(tokens);
    CHECK(a.state_hash() == b.state_hash());
    CHECK(std::memcmp(a.logits().data(), b.logits().data(), a.logits().size_bytes()) == 0);
    for (int i = 0; i < 20; i++) {
      const int32_t next = qn::argmax(a.logits());
      a.step(next), b.step(next);
    }
    CHECK(a.state_hash() == b.state_hash());
  }
}

TEST_CASE("CUDA: layers on several logical devices of one GPU: a model whose head is its embedding") {
  if (no_gpu()) return;
  qn::TempDir dir;
  for (bool mtp : {false, true}) {
    write_tied(dir / "tied.qn", mtp);
    Options o = options("cuda:0", {}, "bf16");
    o.mtp = mtp;
    const Seen want = look(dir / "tied.qn", o);
    o.device = "cuda:0,0";
    CHECK((look(dir / "tied.qn", o) == want));
  }
}

TEST_CASE("CUDA: a copy between devices comes after what its source was asked before, and before what it is asked later") {
  if (no_gpu()) return;
  const int other = static_cast<int>(qn::list_cuda_devices().size()) - 1;  // another GPU where there is one
  const auto a = qn::make_cuda_device(0), b = qn::make_cuda_device(other);
  constexpr size_t kBytes = 64 << 20, kWord = kBytes / 4 - 1;
  constexpr int kRounds = 40;
  const qn::Buffer from = a->alloc(kBytes, "source"), slow = a->alloc(kBytes, "scratch"), to = b->alloc(kBytes, "target"), kept = b->alloc(kRounds * 4, "kept");
  uint32_t* const last = static_cast<uint32_t*>(from.data()) + kWord;
  for (uint32_t round = 0; round < kRounds; round++) {
    const uint32_t value = round + 1;
    a->copy(slow.data(), from.data(), kBytes);  // something to wait for
    a->upload(last, &value, 4);
    b->copy_from(to.data(), *a, from.data(), kBytes);
    a->zero(from.data(), kBytes);
    b->copy(static_cast<uint32_t*>(kept.data()) + round, static_cast<uint32_t*>(to.data()) + kWord, 4);
    b->keep_up(round % 5);
  }
  std::vector<uint32_t> got(kRounds), want(kRounds);
  std::iota(want.begin(), want.end(), 1);
  b->download(got.data(), kept.data(), kRounds * 4);
  CHECK(got == want);
  b->keep_up(0);
  CHECK(b->idle());
}
