#include <doctest/doctest.h>

#include "ggml-lite/base/check.h"
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
  CHECK(p.ubatch == 512);
  CHECK(p.kv <= 4 * kGiB);
  CHECK(p.ctx > 100000);
  r.budget = kGiB / 2;
  CHECK(refusal(r).find("--ram") != std::string::npos);
}
