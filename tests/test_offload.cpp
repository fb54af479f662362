// Experts that do not all fit a GPU: the host's part on every instruction set, places against a simulation on the host, and the whole model.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <random>
#include <set>
#include <thread>

#include "cuda/cuda.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/core/codec.h"
#include "ggml-lite/cpu/cpu.h"
#include "ggml-lite/nn/expert_offload.h"
#include "ggml-lite/nn/layer_scratch.h"  // upload_new
#include "ggml-lite/ref/ref.h"
#include "qnext.h"
#include "tests/close.h"
#include "tests/models.h"

namespace {

using namespace qn;
using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;

bool no_gpu() {
  if (!list_cuda_devices().empty()) return false;
  MESSAGE("SKIPPED: no GPU");
  return true;
}

// Records of random codes; scales that keep products near 1
struct Records {
  Records(DType type, int group, int count, int64_t d, int64_t f) {
    e.dtype = type, e.group = static_cast<uint16_t>(group), e.count = count, e.d = d, e.f = f;
    const ExpertLayout l = e.layout();
    memory = Arena(static_cast<size_t>(l.stride * count));
    std::mt19937 random(7);
    for (int i = 0; i < count; i++)
      for (auto [at, n, k] : {std::tuple<int64_t, int64_t, int64_t>{0, 2 * f, d}, {l.down_offset, d, f}}) {
        uint8_t* p = memory.data() + i * l.stride + at;
        Floats w(static_cast<size_t>(n * k));
        for (float& v : w) v = std::normal_distribution<float>(0, 0.1f)(random);
        if (type == DType::F32) std::memcpy(p, w.data(), w.size() * 4);
        else if (type == DType::BF16)
          for (size_t j = 0; j < w.size(); j++) reinterpret_cast<uint16_t*>(p)[j] = float_to_bf16(w[j]);
        else {
          const int64_t bytes = weight_bytes(type, n, k, group);
          for (int64_t j = 0; j < bytes; j++) p[j] = static_cast<uint8_t>(random());
          const uint16_t scale = float_to_half(type == DType::INT4 ? 0.02f : 0.001f);
          for (int64_t panel = 0; panel < t16_panels(n); panel++)
            for (int64_t j = 0; j < t16_scale_bytes(k, group); j += 2) std::memcpy(p + panel * t16_panel_bytes(type, k, group) + j, &scale, 2);
        }
      }
    e.data = memory.data();
  }
  Experts e;
  Arena memory{64};
};

Floats pairs_on(Device& d, const Experts& e, Act act, int tokens, const Ids& token, const Ids& expert) {
  OpLimits l;
  l.tokens = 8, l.width = std::max(e.d, 2 * e.f), l.experts = e.count, l.chosen = 10, l.expert_width = e.f, l.model_width = e.d;
  d.reserve(l);
  Floats x(static_cast<size_t>(tokens * e.d)), y(x.size(), 99), weight(token.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = std::sin(static_cast<float>(i) * 0.7f);
  for (size_t i = 0; i < weight.size(); i++) weight[i] = 0.1f + 0.05f * static_cast<float>(i % 7);
  const auto n = static_cast<int64_t>(token.size());
  ExpertPairsArgs a;
  a.x = view(x.data(), DType::F32, tokens, e.d), a.y = view(y.data(), DType::F32, tokens, e.d);
  a.token = view(const_cast<int32_t*>(token.data()), DType::I32, n), a.expert = view(const_cast<int32_t*>(expert.data()), DType::I32, n);
  a.weight = view(weight.data(), DType::F32, n), a.act = act, a.experts = e;
  d.expert_pairs(a);
  return y;
}

// core/experts.h in plain words
struct Simulation {
  Simulation(int experts, int slots, int percent) : percent(percent), slot_of(static_cast<size_t>(experts), -1) {
    for (int i = 0; i < slots; i++) slot_of[static_cast<size_t>(i)] = i, expert_in.push_back(i), last_use.push_back(i + 1);
    clock = slots;
  }
  int step(std::span<const int32_t> ids) {  // returns the hits
    Ids hits, misses;
    for (size_t i = 0; i < ids.size(); i++)
      if (std::find(ids.begin(), ids.begin() + static_cast<long>(i), ids[i]) == ids.begin() + static_cast<long>(i))
        (slot_of[static_cast<size_t>(ids[i])] >= 0 ? hits : misses).push_back(ids[i]);
    const int64_t before = clock;
    for (int32_t e : hits) last_use[static_cast<size_t>(slot_of[static_cast<size_t>(e)])] = ++clock;
    const int fetched = std::min(fetched_misses(static_cast<int>(misses.size()), percent), static_cast<int>(expert_in.size() - hits.size()));
    for (int i = 0; i < fetched; i++) {
      int64_t victim = -1;
      for (size_t s = 0; s < last_use.size(); s++)
        if (last_use[s] <= before && (victim < 0 || last_use[s] < last_use[static_cast<size_t>(victim)])) victim = static_cast<int64_t>(s);
      const auto v = static_cast<size_t>(victim);
      slot_of[static_cast<size_t>(expert_in[v])] = -1, slot_of[static_cast<size_t>(misses[static_cast<size_t>(i)])] = static_cast<int32_t>(v);
      expert_in[v] = misses[static_cast<size_t>(i)], last_use[v] = ++clock;
    }
    return static_cast<int>(hits.size());
  }
  int percent;
  Ids slot_of, expert_in;
  std::vector<int64_t> last_use;
  int64_t clock = 0;
};

constexpr int kExperts = 512, kChosen = 10;

// 600 steps of ten of 512 experts: uniform; Zipf with exponent 1; a chain that keeps about 40 % of the experts before
std::vector<Ids> trace(const std::string& name) {
  std::ifstream file(std::string(QN_TEST_DATA) + "/traces/" + name + ".u16", std::ios::binary);
  std::vector<uint16_t> raw(600 * kChosen);
  REQUIRE(file.read(reinterpret_cast<char*>(raw.data()), static_cast<long>(raw.size() * 2)));
  std::vector<Ids> steps;
  for (size_t i = 0; i < raw.size(); i += kChosen) steps.emplace_back(raw.begin() + static_cast<long>(i), raw.begin() + static_cast<long>(i + kChosen));
  return steps;
}

double hit_rate(const std::vector<Ids>& steps, int slots, int percent) {
  Simulation s(kExperts, slots, percent);
  int hits = 0;
  for (size_t i = 0; i < steps.size(); i++) {
    const int h = s.step(steps[i]);
    if (i >= 100) hits += h;
  }
  return 100.0 * hits / (kChosen * 500);
}

}  // namespace

TEST_CASE("offload: the host's part on every instruction set") {
  const Ids token = {0, 2, 0, 1, 1, 2, 0, 4, 3, 4}, expert = {5, 5, 1, 7, 0, 1, 7, 5, 2, 0};
  for (auto [type, group] : {std::pair{DType::INT4, 128}, {DType::INT4, 32}, {DType::INT8, 64}, {DType::BF16, 0}, {DType::F32, 0}})
    for (Act act : {Act::F32, Act::BF16, Act::INT8}) {
      const Records r(type, group, 8, 256, 128);
      CAPTURE(name(type));
      CAPTURE(name(act));
      const Floats want = pairs_on(*make_ref_device(), r.e, act, 5, token, expert);
      for (Isa isa : {Isa::Scalar, Isa::Avx2, Isa::Avx512}) {
        if (!isa_available(isa)) continue;
        const Floats got = pairs_on(*make_cpu_device(2, isa), r.e, act, 5, token, expert);
        CHECK_MESSAGE(close(want, got, act == Act::F32 ? 1e-10 : 1e-6, 1), close(want, got, act == Act::F32 ? 1e-10 : 1e-6, 1).text());
        for (int threads : {1, 3}) CHECK(got == pairs_on(*make_cpu_device(threads, isa), r.e, act, 5, token, expert));
        // a token alone has the same bits
        const Floats alone = pairs_on(*make_cpu_device(2, isa), r.e, act, 1, {0, 0, 0}, {5, 1, 7});
        Floats all = pairs_on(*make_cpu_device(2, isa), r.e, act, 2, {0, 0, 0, 1, 1}, {5, 1, 7, 5, 0});
        CHECK(std::equal(alone.begin(), alone.end(), all.begin()));
        for (int threads : {1, 3, 20}) CHECK(alone == pairs_on(*make_cpu_device(threads, isa), r.e, act, 1, {0, 0, 0}, {5, 1, 7}));
        // with an expert twice
        const Floats twice = pairs_on(*make_cpu_device(3, isa), r.e, act, 1, {0, 0, 0}, {5, 1, 5});
        CHECK(close(pairs_on(*make_ref_device(), r.e, act, 1, {0, 0, 0}, {5, 1, 5}), twice, act == Act::F32 ? 1e-10 : 1e-6, 1));
      }
    }
}

TEST_CASE("offload: reading ahead ends at once when told to, and says what is whole") {
  for (auto [type, group] : {std::pair{DType::INT4, 32}, {DType::BF16, 0}}) {
    const Records r(type, group, 8, 256, 128);
    for (int threads : {1, 3, 20}) {
      const auto device = make_cpu_device(threads);
      const Ids ids = {7, 0, 3};
      CHECK(device->read_ahead(r.e, ids, [] { return false; }) == 3);
      CHECK(device->read_ahead(r.e, ids, [] { return true; }) == 0);
      CHECK(device->read_ahead(r.e, {}, [] { return false; }) == 0);
      std::atomic<int> asked{0};
      CHECK(device->read_ahead(r.e, ids, [&] { return ++asked > 4 * threads; }) <= 3);
    }
  }
}

TEST_CASE("offload: the host follows advice, and survives any") {
  const Records r(DType::INT4, 32, 8, 256, 128);
  std::vector<uint8_t> memory(static_cast<size_t>(expert_box_bytes(4, 256)) + 64);
  uint32_t pending[4] = {};
  const ExpertBox box = expert_box(memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64), 4, 256, pending);
  CHECK(reinterpret_cast<const uint8_t*>(box.likely_expert + kPlacedTokens * 4) <= memory.data() + memory.size());
  ExpertHost host(make_cpu_device(2));
  host.attach(box, {r.e, r.e}, 4, Act::INT8);
  uint32_t number = 0;
  const auto advise = [&](int32_t layer, int32_t count, const Ids& ids) {
    for (size_t i = 0; i < ids.size(); i++) std::atomic_ref(box.likely_expert[i]).store(ids[i]);
    std::atomic_ref(*box.likely_layer).store(layer), std::atomic_ref(*box.likely_count).store(count);
    std::atomic_ref(*box.likely).store(++number);
  };
  Floats first;
  uint64_t ahead = 0;
  for (auto [layer, count, ids] : {std::tuple<int32_t, int32_t, Ids>{1, 2, {5, 3}}, {0, 2, {5, 3}}, {1, 3, {8, -1, 5}}, {2, 2, {5, 3}}, {-1, 2, {5, 3}}, {1, 33, {5, 3}}, {1, -1, {5, 3}}}) {
    host.expect();
    advise(layer, count, ids);
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    *box.layer = 1, *box.tokens = 1, *box.pairs = 2;
    for (int i = 0; i < 2; i++) box.token[i] = 0, box.expert[i] = i ? 3 : 5, box.weight[i] = 0.5f;
    for (int i = 0; i < 256; i++) box.x[i] = std::sin(static_cast<float>(i));
    const uint32_t request = *box.request + 1;
    std::atomic_ref(*box.request).store(request, std::memory_order_release);
    for (int i = 0; i < 5000 && std::atomic_ref(*box.done).load(std::memory_order_acquire) != request; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    REQUIRE(*box.done == request);
    const Floats y(box.out, box.out + 256);
    if (first.empty()) first = y;
    CHECK(y == first);
    const uint64_t now = host.counts().ahead;
    CHECK(now - ahead == (layer != 1 ? 0u : count == 2 ? 2u : count == 3 ? 1u : 0u));
    ahead = now;
  }
  CHECK_NOTHROW(host.check());
}

TEST_CASE("offload: hit rates of the traces") {
  std::string table;
  double last = 0;
  for (const char* name : {"uniform", "zipf", "markov"})
    for (int percent : {100, 25}) {
      table += format("\n%-8s %3d %% of misses fetched:", name, percent);
      for (int slots : {31, 62, 93, 124, 171, 246}) {
        const double rate = hit_rate(trace(name), slots, percent);
        table += format("  %d: %.1f", slots, rate);
        CHECK(rate > (slots == 31 ? 0 : last));
        last = rate;
      }
    }
  MESSAGE("hits by slots" << table);
  CHECK(std::abs(hit_rate(trace("uniform"), 128, 100) - 25) < 3);
  CHECK(hit_rate(trace("markov"), 124, 100) > 70);
}

TEST_CASE("CUDA offload: places are those of the simulation, decision for decision, and slots hold what they should") {
  if (no_gpu()) return;
  const Records r(DType::INT4, 32, kExperts, 64, 32);
  const int64_t stride = r.e.layout().stride;
  for (const char* name : {"uniform", "zipf", "markov"})
    for (auto [slots, percent, tokens] : {std::tuple{124, 100, 1}, {124, 25, 1}, {40, 40, 1}, {6, 100, 1}, {124, 50, 3}, {30, 25, 8}}) {
      CAPTURE(name);
      CAPTURE(slots);
      CAPTURE(tokens);
      const auto device = make_cuda_device(0, true);
      OpLimits l;
      l.tokens = 16, l.width = 128, l.experts = kExperts, l.chosen = kChosen, l.expert_width = 32, l.model_width = 64;
      device->reserve(l);
      Experts e = r.e;
      OffloadShape shape;
      shape.slots = slots, shape.chosen = kChosen, shape.fetch_percent = percent;
      ExpertHost host(make_cpu_device(1));  // ends before the device
      ExpertOffload offload(*device, host, {&e}, shape);
      REQUIRE(offload.pinned());
      for (int i = 0; i < slots; i++) device->upload(offload.slot(0, i), r.e.data + i * stride, static_cast<size_t>(stride));
      Buffer x = device->alloc(8 * 64 * 4, "x"), logits = device->alloc(8 * kExperts * 4, "logits"), ids = device->alloc(8 * kChosen * 4, "ids"),
             weights = device->alloc(8 * kChosen * 4, "weights"), h = device->alloc(8 * 64 * 4, "h");
      PlaceExpertsArgs p;
      p.x = view(x.data(), DType::F32, tokens, 64), p.logits = view(logits.data(), DType::F32, tokens, kExperts), p.experts = e;
      p.ids = view(ids.data(), DType::I32, tokens, kChosen), p.weights = view(weights.data(), DType::F32, tokens, kChosen), p.box = offload.box();
      JoinExpertsArgs join;
      join.box = offload.box(), join.h = view(h.data(), DType::F32, tokens, 64);
      // The layer behind it, of which the host is told, is the same one with a router of its own
      std::mt19937 random(11);
      std::normal_distribution<float> normal;
      std::vector<uint16_t> router(kExperts * 64);
      Floats norm(64), input(static_cast<size_t>(tokens * 64));
      for (float& v : norm) v = 1 + 0.5f * normal(random);
      for (uint16_t& v : router) v = float_to_bf16(normal(random));
      const Buffer next_norm = upload_new<float>(*device, norm, "norm"), next_router = upload_new<uint16_t>(*device, router, "router");
      p.h = join.h, p.next_norm = view(next_norm.data(), DType::F32, 64), p.next_router = view(next_router.data(), DType::BF16, kExperts, 64), p.next = e;
      const auto advice = [&](const Simulation& now) {  // what should come
        Ids chosen, missing;
        for (int t = 0; t < tokens; t++) {
          std::vector<std::pair<double, int32_t>> order;
          for (int i = 0; i < kExperts; i++) {
            double sum = 0;
            for (int k = 0; k < 64; k++) sum += static_cast<double>(bf16_to_float(router[static_cast<size_t>(i * 64 + k)])) * norm[static_cast<size_t>(k)] * input[static_cast<size_t>(t * 64 + k)];
            order.emplace_back(-sum, i);
          }
          std::sort(order.begin(), order.end());
          for (int j = 0; j < kChosen; j++) chosen.push_back(order[static_cast<size_t>(j)].second);
        }
        for (int32_t id : chosen)
          if (now.slot_of[static_cast<size_t>(id)] < 0 && std::find(missing.begin(), missing.end(), id) == missing.end()) missing.push_back(id);
        std::rotate(missing.begin(), missing.begin() + fetched_misses(static_cast<int>(missing.size()), percent), missing.end());
        return missing;
      };
      Simulation want(kExperts, slots, percent);
      const std::vector<Ids> steps = trace(name);
      Ids slot_of(kExperts), expert_in(static_cast<size_t>(slots));
      std::vector<int64_t> last_use(static_cast<size_t>(slots));
      int wrong = 0;
      uint32_t advised = 0;
      for (size_t s = 0; s + static_cast<size_t>(tokens) <= steps.size() && !wrong; s += static_cast<size_t>(tokens)) {
        Floats l(static_cast<size_t>(tokens * kExperts), -5);
        Ids all;
        for (int t = 0; t < tokens; t++)
          for (int j = 0; j < kChosen; j++) {
            const int32_t id = steps[s + static_cast<size_t>(t)][static_cast<size_t>(j)];
            l[static_cast<size_t>(t * kExperts + id)] = 5 - 0.1f * static_cast<float>(j), all.push_back(id);
          }
        device->upload(logits.data(), l.data(), l.size() * 4);
        for (float& v : input) v = normal(random);
        device->upload(h.data(), input.data(), input.size() * 4);
        host.expect();
        device->place_experts(p), device->join_experts(join);
        want.step(all);
        device->download(slot_of.data(), e.home->slot_of, slot_of.size() * 4);
        device->download(expert_in.data(), e.home->expert_in, expert_in.size() * 4);
        device->download(last_use.data(), e.home->last_use, last_use.size() * 8);
        wrong += slot_of != want.slot_of || expert_in != want.expert_in || last_use != want.last_use;
        const ExpertBox& box = offload.box();
        wrong += *box.likely != ++advised || *box.likely_layer != 0 || Ids(box.likely_expert, box.likely_expert + *box.likely_count) != advice(want);
      }
      CHECK(wrong == 0);
      host.check();
      std::vector<uint8_t> record(static_cast<size_t>(stride));
      for (int i = 0; i < slots; i++) {
        device->download(record.data(), offload.slot(0, i), record.size());
        CHECK(std::memcmp(record.data(), r.e.data + expert_in[static_cast<size_t>(i)] * stride, record.size()) == 0);
      }
    }
}

namespace {
using namespace qnext;

Options gpu(int slots, int fetch, const char* act) {
  Options o;
  o.device = "cuda", o.act = act, o.ctx = 2048, o.threads = 2, o.slots = slots, o.fetch = fetch;
  return o;
}

struct Told {
  std::string text;
  Floats logits;  // after the answer
  qnext::OffloadUse use;
};
Told tell(const std::string& path, const Options& o, int repeat) {
  Engine e = Engine::open(path, o);
  Session s(e);
  std::string prompt;
  for (int i = 0; i < repeat; i++) prompt += "Tell me a story about Lily and a drum. ";
  const std::vector<qn::Message> chat = {{"user", prompt, {}, {}, {}}};
  s.sync(e.chat_tokens(chat, {}));
  GenerateParams p;
  p.sampling.temperature = 0, p.max_tokens = 100;
  Told a{s.generate(p, {}).text, {}, {}};
  const auto l = s.logits();
  a.logits.assign(l.begin(), l.end()), a.use = e.offload_use();
  return a;
}
}  // namespace

TEST_CASE("CUDA offload: stories tells the same with experts in slots, whatever is fetched or left to the CPU") {
  if (no_gpu()) return;
  for (DType type : {DType::INT4, DType::BF16}) {
    const std::string path = TestModels::get().path("stories", type, DType::BF16);
    const int all = Engine::open(path, gpu(0, 25, "f32")).info().experts;
    const Told whole = tell(path, gpu(0, 25, "f32"), 1);
    CHECK(whole.use.steps == 0);
    for (auto [slots, fetch] : {std::pair{1, 25}, {all / 4, 25}, {all / 2, 0}, {all - 1, 100}}) {
      CAPTURE(slots);
      CAPTURE(fetch);
      const Told part = tell(path, gpu(slots, fetch, "f32"), 1);
      CHECK(part.text == whole.text);
      CHECK_MESSAGE(close(whole.logits, part.logits, 1e-8, 1e-2), close(whole.logits, part.logits, 1e-8, 1e-2).text());
      CHECK((part.use.steps > 0 || fetch == 100));
      CHECK(part.text == tell(path, gpu(slots, fetch, "f32"), 1).text);
    }
    // the same rounding on both sides: differences of sums only
    const Told rounded = tell(path, gpu(0, 25, "int8"), 1), placed = tell(path, gpu(all / 4, 25, "int8"), 1);
    CHECK(!placed.text.empty());
    if (rounded.text == placed.text) CHECK(close(rounded.logits, placed.logits, 1e-2, 2));
  }
}

TEST_CASE("CUDA offload: long prompts, through staging memory, have the bits of experts that are all there") {
  if (no_gpu()) return;
  const std::string path = TestModels::get().path("stories", DType::INT4, DType::BF16);
  const auto prefilled = [&](int slots) {
    Engine e = Engine::open(path, gpu(slots, 25, "bf16"));
    Session s(e);
    Ids tokens;
    for (int i = 0; i < 700; i++) tokens.push_back((i * 7919 + i * i * 31 + 5) % 1000);
    s.sync(tokens);
    const uint64_t hash = s.state_hash();
    const auto l = s.logits();
    return std::pair(hash, Floats(l.begin(), l.end()));
  };
  const auto whole = prefilled(0);
  for (int slots : {1, 3, 7}) {
    const auto part = prefilled(slots);
    CHECK(part.first == whole.first);
    CHECK(part.second == whole.second);
  }
}
