#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ggml-lite/base/check.h"
#include "ggml-lite/core/forecast.h"
#include "ggml-lite/core/plan.h"

using namespace qn;

namespace {
constexpr uint64_t kGiB = 1ull << 30;

// The 80B model: 45.5 GB of weights, 24 KiB a position, a scratch of 200 KB a token
PlanRequest request(uint64_t gib) {
  PlanRequest r;
  r.file = "model.qn", r.device = "a GPU", r.own_memory = true;
  r.budget = gib * kGiB, r.weights = 43 * kGiB, r.state = kGiB, r.per_position = 24576, r.model_context = 262144;
  r.scratch = [](int ubatch, int ctx) { return static_cast<uint64_t>(ubatch) * 200000 + static_cast<uint64_t>(ctx) * 64; };
  return r;
}
uint64_t sum(const MemoryPlan& p) { return p.weights + p.kv + p.state + p.scratch + kDeviceMargin; }

std::string refusal(const PlanRequest& r) {
  try {
    plan_memory(r);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
}  // namespace

TEST_CASE("plan: everything fits: the whole context and long passes") {
  const MemoryPlan p = plan_memory(request(79));
  CHECK(p.ctx == 262144);
  CHECK(p.ubatch == 8192);
  CHECK(sum(p) <= 79 * kGiB);
}

TEST_CASE("plan: less memory shortens passes first, then the context, and never goes beyond the budget") {
  int last_ctx = 0, last_ubatch = 0;
  for (uint64_t gib = 45; gib <= 60; gib++) {
    const MemoryPlan p = plan_memory(request(gib));
    CHECK(sum(p) <= gib * kGiB);
    CHECK(p.ctx % 256 == 0);
    CHECK((p.ctx >= last_ctx || p.ubatch > last_ubatch));
    CHECK((p.ctx >= 32768 || p.ubatch == 512));
    last_ctx = p.ctx, last_ubatch = p.ubatch;
  }
}

TEST_CASE("plan: what does not fit says how much is missing and what would fit") {
  PlanRequest r = request(46);
  r.ctx = 262144;
  const std::string long_context = refusal(r);
  CHECK(long_context.find("missing") != std::string::npos);
  const size_t at = long_context.find("--ctx ");
  REQUIRE(at != std::string::npos);
  r.ctx = std::stoi(long_context.substr(at + 6));  // the advice is sound
  r.ubatch = 512;
  CHECK(r.ctx > 0);
  CHECK_NOTHROW(plan_memory(r));
  CHECK(refusal(request(24)).find("--device cpu") != std::string::npos);
  r.ctx = 300000;
  CHECK(refusal(r).find("262144") != std::string::npos);
}

TEST_CASE("plan: whatever was asked for, what a refusal advises is accepted") {
  int advised = 0;
  for (int ctx : {0, 100, 1000, 4096, 20000, 40000, 60000})
    for (int ubatch : {0, 64, 512, 8192, 16384})
      for (uint64_t mib = 44 * 1024 + 512; mib <= 48 * 1024; mib += 64) {
        PlanRequest r = request(0);
        r.budget = mib << 20, r.ctx = ctx, r.ubatch = ubatch;
        r.scratch = [](int rows, int positions) { return static_cast<uint64_t>(std::min(rows, positions)) * 200000 + static_cast<uint64_t>(positions) * 64; };
        const std::string refused = refusal(r);
        CAPTURE(ctx);
        CAPTURE(ubatch);
        CAPTURE(mib);
        CAPTURE(refused);
        const size_t at = refused.find("--ctx ");
        if (at == std::string::npos) continue;
        r.ctx = std::stoi(refused.substr(at + 6));
        if (refused.find("--ubatch 512") != std::string::npos) r.ubatch = 512;
        if (ctx) CHECK(r.ctx <= ctx);
        CHECK(refusal(r) == "");
        advised++;
      }
  CHECK(advised > 100);
}

TEST_CASE("plan: in the memory of the process half of what is free is left to the mapped weights") {
  PlanRequest r = request(8);
  r.own_memory = false;
  const MemoryPlan p = plan_memory(r);
  CHECK(p.ubatch == 2048);
  CHECK(p.kv <= 4 * kGiB);
  CHECK(p.ctx > 100000);
  r.budget = kGiB / 2;
  CHECK(refusal(r).find("--ram") != std::string::npos);
}

namespace {
double fullest(const LayerBytes& b, std::span<const int> split, std::span<const uint64_t> budgets) {
  double most = 0;
  for (size_t d = 0, at = 0; d < split.size(); d++) {
    uint64_t sum = (d == 0 ? b.front : 0) + (d + 1 == split.size() ? b.back : 0);
    for (int i = 0; i < split[d]; i++) sum += b.layers[at++];
    most = std::max(most, static_cast<double>(sum) / static_cast<double>(budgets[d]));
  }
  return most;
}
}  // namespace

TEST_CASE("split: no cut of the layers fills the fullest device less") {
  uint32_t noise = 7;
  const auto draw = [&](uint32_t n) { return noise = noise * 1664525 + 1013904223, (noise >> 8) % n; };
  for (int round = 0; round < 200; round++) {
    LayerBytes b;
    for (uint32_t i = 0, n = 3 + draw(7); i < n; i++) b.layers.push_back(draw(20) + (round % 2 ? 0 : 30));
    b.front = draw(40), b.back = draw(60);
    const auto layers = static_cast<int>(b.layers.size());
    std::vector<uint64_t> budgets(1 + draw(3));
    for (uint64_t& x : budgets) x = 1 + draw(4);
    const std::vector<int> got = split_layers(b, budgets);
    REQUIRE(got.size() == budgets.size());
    CHECK_NOTHROW(check_split(got, budgets.size(), layers));
    double best = INFINITY;
    for (int i = 1; i < layers; i++)
      for (int j = 1; i + j < layers; j++) {
        if (budgets.size() == 3) best = std::min(best, fullest(b, std::vector{i, j, layers - i - j}, budgets));
        if (budgets.size() == 2) best = std::min({best, fullest(b, std::vector{i, layers - i}, budgets), fullest(b, std::vector{layers - 1, 1}, budgets)});
      }
    if (budgets.size() == 1) best = fullest(b, std::vector{layers}, budgets);
    CHECK(fullest(b, got, budgets) == best);
  }
}

TEST_CASE("split: where the head lies there are fewer layers; a larger card has more") {
  LayerBytes b{std::vector<uint64_t>(48, 900), {}, 600, 2200, 0};
  const std::vector<uint64_t> same = {80, 80}, larger = {40, 80}, eight(8, 80);
  CHECK(split_layers(b, same) == std::vector{25, 23});
  b.back = 600;
  CHECK(split_layers(b, same) == std::vector{24, 24});
  CHECK(split_layers(b, larger) == std::vector{16, 32});
  const std::vector<int> eighths = split_layers(b, eight);
  CHECK(std::accumulate(eighths.begin(), eighths.end(), 0) == 48);
  CHECK(*std::ranges::max_element(eighths) <= 7);
}

TEST_CASE("split: numbers that are not one per device, or are not all layers, are refused") {
  const auto why = [](std::vector<int> split, size_t devices) {
    try {
      check_split(split, devices, 48);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(why({26, 22}, 2) == "");
  CHECK(why({48}, 1) == "");
  CHECK(why({26, 22}, 3).find("expected 3 numbers") != std::string::npos);
  CHECK(why({26, 21}, 2).find("48 layers of the model, got 47") != std::string::npos);
  CHECK(why({49, -1}, 2).find("at least 1") != std::string::npos);
}

TEST_CASE("plan: several devices have the context and the passes that all of them have room for") {
  PlanRequest large = request(79), small = request(26);
  large.weights = small.weights = 22 * kGiB, large.per_position = small.per_position = 12288;
  const auto p = plan_devices({large, small});
  REQUIRE(p.size() == 2);
  CHECK(p[0].ctx == p[1].ctx);
  CHECK(p[0].ubatch == p[1].ubatch);
  CHECK(sum(p[0]) <= 79 * kGiB);
  CHECK(sum(p[1]) <= 26 * kGiB);
  PlanRequest alone = small;
  alone.one_of_several = true;
  CHECK(p[1].ctx == plan_memory(alone).ctx);  // the tighter one decides
  CHECK(plan_devices({large, large})[0].ubatch == 4096);
  CHECK(plan_devices({large})[0].ubatch == 8192);
  for (PlanRequest* r : {&large, &small}) r->ctx = 262144;
  CHECK_THROWS_AS(plan_devices({large, small}), Error);
  CHECK_THROWS_AS(plan_devices({small, large}), Error);
}

TEST_CASE("plan: what a refusal of several devices advises is accepted by all of them") {
  int advised = 0;
  for (int ctx : {0, 1000, 40000, 200000})
    for (int ubatch : {0, 64, 512, 16384})
      for (uint64_t a = 44 * 1024 + 512; a <= 50 * 1024; a += 256)
        for (uint64_t b = 44 * 1024 + 512; b <= 50 * 1024; b += 256) {
          std::vector<PlanRequest> r = {request(0), request(0)};
          r[0].budget = a << 20, r[1].budget = b << 20, r[0].per_position = 4096;
          for (PlanRequest& one : r) one.ctx = ctx, one.ubatch = ubatch;
          std::string refused;
          try {
            for (const MemoryPlan& p : plan_devices(r)) CHECK((p.ctx > 0 && (!ctx || p.ctx == ctx)));
          } catch (const Error& e) {
            refused = e.what();
          }
          const size_t at = refused.find("--ctx ");
          if (at == std::string::npos) continue;
          for (PlanRequest& one : r) {
            one.ctx = std::stoi(refused.substr(at + 6));
            if (refused.find("--ubatch 512") != std::string::npos) one.ubatch = 512;
          }
          CAPTURE(refused);
          CHECK_NOTHROW(plan_devices(r));
          advised++;
        }
  CHECK(advised > 100);
}

namespace {
// 48 layers of 512 experts of 1.6 MB, of which a token chooses 10
ForecastPart forecast_part(int slots, int fetch = 25) { return {true, 48, 290, 4'000'000'000, 1'650'000, 512, 10, slots, fetch}; }
const Speeds kSpeeds{3e12, 50e9, 100e9, 2e9};

double decode(const ForecastPart& p, const HostPlan& host = {16}) { return forecast(std::span(&p, 1), 4096, host, kSpeeds).decode; }
}  // namespace

TEST_CASE("plan: experts are pinned when that leaves memory for all else") {
  CHECK(!pins_experts(0, 64 * kGiB));
  CHECK(pins_experts(40 * kGiB, 42 * kGiB));
  CHECK(!pins_experts(40 * kGiB, 42 * kGiB - 1));
}

TEST_CASE("plan: a CPU holds the file itself when that leaves memory for all else") {
  CHECK(holds_file(40 * kGiB, 3 * kGiB, 45 * kGiB));
  CHECK(!holds_file(40 * kGiB, 3 * kGiB, 45 * kGiB - 1));
  CHECK(!holds_file(40 * kGiB, 50 * kGiB, 45 * kGiB));
  CHECK(!holds_file(UINT64_MAX, UINT64_MAX, UINT64_MAX));
  CHECK_THROWS_WITH_AS(holds_file(40 * kGiB, 3 * kGiB, 44 * kGiB, true), doctest::Contains("--no-mmap: the file takes 40.0 GiB"), Error);
}

TEST_CASE("plan: what memory of the host must hold is said, and only when the device does not hold it all") {
  PlanRequest r = request(24);
  r.experts = 40 * kGiB, r.expert_count = 512;
  r.expert_memory = [](int slots) { return static_cast<uint64_t>(slots) * 80 * (1 << 20); };
  const MemoryPlan p = plan_memory(r);
  CHECK(p.slots > 0);
  CHECK(p.host == r.experts);
  r.budget = 79 * kGiB;
  CHECK(plan_memory(r).host == 0);
}

TEST_CASE("forecast: a device that holds everything is bound by its memory and by the number of its operations") {
  const ForecastPart p = forecast_part(0);
  const Forecast f = forecast(std::span(&p, 1), 8192, {16}, kSpeeds);
  CHECK(f.misses == 0);
  CHECK(1 / f.bound == doctest::Approx((4e9 + 480 * 1.65e6) / 3e12));
  CHECK(f.seconds[1] + f.seconds[2] == 0);
  CHECK(1 / f.decode == doctest::Approx((4e9 + 480 * 1.65e6) / (0.87 * 3e12) + 290 * 2.3e-6));
  CHECK(f.prefill[0] == doctest::Approx(f.prefill[1]));
}

TEST_CASE("forecast: experts on the host: more slots are faster, as is fetching some, and misses are what chance makes them") {
  double last = 0;
  for (int slots = 32; slots < 512; slots += 32) {
    const ForecastPart p = forecast_part(slots);
    const Forecast f = forecast(std::span(&p, 1), 4096, {16}, kSpeeds);
    CHECK(f.misses == doctest::Approx(10 * (1 - slots / 512.0)));
    CHECK(f.decode > last);
    CHECK(f.bound > f.decode);
    CHECK(1 / f.bound == doctest::Approx(48 * f.misses * 1.65e6 / 100e9 + 4e9 / 3e12));
    last = f.decode;
  }
  CHECK(decode(forecast_part(0)) > last);
  const ForecastPart none = forecast_part(0), half = forecast_part(256);
  CHECK(forecast(std::span(&none, 1), 4096, {16}, kSpeeds).stream == 0);
  CHECK(forecast(std::span(&half, 1), 4096, {16}, kSpeeds).stream == doctest::Approx(48 * 256 * 1.65e6 / kSpeeds.bus));
  CHECK(decode(forecast_part(128, 25)) > decode(forecast_part(128, 0)));
  CHECK(decode(forecast_part(128, 25), {16, false}) == doctest::Approx(decode(forecast_part(128, 0))));  // not pinned: nothing is fetched
  CHECK(decode(forecast_part(128), {16, true, 0.5}) < decode(forecast_part(128)) / 2);                   // half of them on a disk
}

TEST_CASE("forecast: stages work in turn on a token and at the same time on a prompt") {
  ForecastPart half = forecast_part(0);
  half.layers = 24, half.rest_bytes /= 2, half.operations /= 2;
  const ForecastPart two[] = {half, half}, one = forecast_part(0);
  CHECK(forecast(two, 4096, {16}, kSpeeds).decode == doctest::Approx(decode(one)));
  CHECK(forecast(two, 1024, {16}, kSpeeds).prefill[1] > 1.7 * forecast(std::span(&one, 1), 1024, {16}, kSpeeds).prefill[1]);
}

TEST_CASE("forecast: a CPU alone, and with a file larger than its memory") {
  ForecastPart p = forecast_part(0);
  p.gpu = false;
  CHECK(1 / decode(p) == doctest::Approx((4e9 + 480 * 1.65e6) / (0.7 * 100e9)));
  CHECK(decode(p, {16, false, 0.2}) < decode(p));
  CHECK(forecast(std::span(&p, 1), 512, {16, false, 0.2}, kSpeeds).prefill[0] < forecast(std::span(&p, 1), 512, {16}, kSpeeds).prefill[0]);
}

TEST_CASE("forecast: a smaller model takes a prompt faster, by its work and its layers") {
  ForecastPart p = forecast_part(0);
  const double whole = forecast(std::span(&p, 1), 8192, {16}, kSpeeds).prefill[1];
  p.layers = 8, p.work = 0.5;
  CHECK(forecast(std::span(&p, 1), 8192, {16}, kSpeeds).prefill[1] == doctest::Approx(12 * whole));
}

TEST_CASE("forecast: the change that helps most, or none") {
  const ForecastPart p = forecast_part(128), whole = forecast_part(0);
  CHECK(best_change(std::span(&p, 1), 4096, {16}, kSpeeds, {kGiB, 4096, false, true}).starts_with("a file made with --rest int8"));
  CHECK(best_change(std::span(&p, 1), 4096, {16}, kSpeeds, {20 * kGiB, 262144, false, false}).starts_with("--ctx 8192"));
  CHECK(best_change(std::span(&p, 1), 4096, {16}, kSpeeds, {20 * kGiB, 4096, true, false}).starts_with("--kv-type int8"));
  CHECK(best_change(std::span(&whole, 1), 8192, {16}, kSpeeds, {20 * kGiB, 262144, true, false}).empty());
}
