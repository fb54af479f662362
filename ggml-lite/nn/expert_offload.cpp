#include "ggml-lite/nn/expert_offload.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "ggml-lite/base/check.h"

namespace qn {

using Clock = std::chrono::steady_clock;

// The thread sleeps until expect(), then polls until no request has come for kIdle. (In its sleep it looks up now and then, so that no device
// waits for ever.)
struct ExpertHost::Impl {
  static constexpr auto kIdle = std::chrono::milliseconds(20), kNap = std::chrono::milliseconds(10);
  struct Client {
    ExpertBox box;
    std::vector<Experts> layers;
    Act act = Act::F32;
    int chosen = 0;
    uint32_t seen = 0, likely_seen = 0;
    int32_t ahead_layer = -1;
    std::vector<int32_t> ahead;  // experts of that layer which were read ahead
    bool asks() const { return std::atomic_ref(*box.request).load(std::memory_order_acquire) != seen; }
    bool advises() const { return std::atomic_ref(*box.likely).load(std::memory_order_acquire) != likely_seen; }
  };

  std::unique_ptr<Device> device;
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<Client> clients;       // under the mutex, but the thread reads them without it while awake: attach() comes before expect()
  bool awake = false, stop = false;  // under the mutex
  std::exception_ptr error;          // under the mutex
  std::atomic<int64_t> expected{0};  // calls of expect()
  std::atomic<uint64_t> requests{0}, experts{0}, ahead{0}, nanoseconds{0};
  std::thread thread;

  void answer(Client& c) {
    const auto start = Clock::now();
    c.seen = std::atomic_ref(*c.box.request).load(std::memory_order_acquire);
    std::exception_ptr failed;
    try {
      const int64_t tokens = *c.box.tokens, pairs = *c.box.pairs;
      ExpertPairsArgs a;
      a.experts = c.layers.at(static_cast<size_t>(*c.box.layer));
      a.x = view(c.box.x, DType::F32, tokens, a.experts.d), a.y = view(c.box.out, DType::F32, tokens, a.experts.d);
      a.token = view(c.box.token, DType::I32, pairs), a.expert = view(c.box.expert, DType::I32, pairs), a.weight = view(c.box.weight, DType::F32, pairs);
      a.act = c.act;
      uint64_t distinct = 0, known = 0;
      for (int64_t i = 0; i < pairs; i++) {
        if (std::find(c.box.expert, c.box.expert + i, c.box.expert[i]) != c.box.expert + i) continue;
        distinct++, known += *c.box.layer == c.ahead_layer && std::ranges::find(c.ahead, c.box.expert[i]) != c.ahead.end();
      }
      experts += distinct, ahead += known;
      device->expert_pairs(a);
    } catch (...) {
      failed = std::current_exception();
    }
    std::atomic_ref(*c.box.done).store(c.seen, std::memory_order_release);  // also when it failed: the device must not wait for ever
    nanoseconds += static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count());
    requests++;
    if (!failed) return;
    const std::lock_guard lock(mutex);
    if (!error) error = failed;
  }

  // Follows advice until somebody asks
  void read_ahead(Client& c) {
    c.likely_seen = std::atomic_ref(*c.box.likely).load(std::memory_order_acquire);
    const auto volatile_int = [](const int32_t* p) { return std::atomic_ref(*const_cast<int32_t*>(p)).load(std::memory_order_relaxed); };
    const int32_t layer = volatile_int(c.box.likely_layer), count = volatile_int(c.box.likely_count);
    c.ahead.clear(), c.ahead_layer = layer;
    if (layer < 0 || static_cast<size_t>(layer) >= c.layers.size() || count < 0 || count > kPlacedTokens * c.chosen) return;
    const Experts& e = c.layers[static_cast<size_t>(layer)];
    for (int32_t i = 0; i < count; i++) {
      const int32_t id = volatile_int(c.box.likely_expert + i);
      if (id < 0 || id >= e.count) continue;
      c.ahead.push_back(id);
    }
    c.ahead.resize(device->read_ahead(e, c.ahead, [this] { return std::ranges::any_of(clients, &Client::asks); }));
  }

  void poll() {
    int64_t last_expected = expected;
    auto last = Clock::now();
    for (uint32_t n = 1;; n++) {
      for (Client& c : clients)
        if (c.asks()) answer(c), last = Clock::now();
        else if (c.advises()) read_ahead(c), last = Clock::now();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (n % 1024) continue;
      if (const int64_t e = expected; e != last_expected) last_expected = e, last = Clock::now();
      if (Clock::now() - last > kIdle) break;
    }
    const std::lock_guard lock(mutex);
    awake = expected != last_expected;  // expect() counts first, and wakes us when it then finds us asleep
  }

  void run() {
    std::unique_lock lock(mutex);
    while (true) {
      wake.wait_for(lock, kNap, [&] { return awake || stop; });
      if (stop) return;
      if (!awake && std::ranges::none_of(clients, &Client::asks)) continue;
      awake = true;
      lock.unlock();
      poll();
      lock.lock();
    }
  }
};

ExpertHost::ExpertHost(std::unique_ptr<Device> device) : impl_(std::make_unique<Impl>()) {
  impl_->device = std::move(device);
  impl_->thread = std::thread([i = impl_.get()] { i->run(); });
}

ExpertHost::~ExpertHost() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->wake.notify_one();
  impl_->thread.join();
}

void ExpertHost::attach(const ExpertBox& box, std::vector<Experts> layers, int chosen, Act act) {
  const std::lock_guard lock(impl_->mutex);
  QN_CHECK(!impl_->awake && !layers.empty(), "offload: attach() while steps are under way");
  const Experts& e = layers[0];
  OpLimits l;
  l.tokens = kPlacedTokens, l.width = std::max(e.d, 2 * e.f), l.experts = e.count, l.chosen = chosen, l.expert_width = e.f, l.model_width = e.d;
  impl_->device->reserve(l);
  for (Experts& x : layers) x.home = nullptr;
  Impl::Client& c = impl_->clients.emplace_back();
  c.box = box, c.layers = std::move(layers), c.act = act, c.chosen = chosen;
}

void ExpertHost::expect() {
  impl_->expected++;
  {
    const std::lock_guard lock(impl_->mutex);
    if (std::exchange(impl_->awake, true)) return;
  }
  impl_->wake.notify_one();
}

void ExpertHost::check() {
  const std::lock_guard lock(impl_->mutex);
  if (const std::exception_ptr e = std::exchange(impl_->error, nullptr)) std::rethrow_exception(e);
}

ExpertHost::Counts ExpertHost::counts() const { return {impl_->requests, impl_->experts, impl_->ahead, 1e-9 * static_cast<double>(impl_->nanoseconds)}; }

uint64_t ExpertOffload::device_bytes(int64_t layers, const Experts& one, int slots) {
  const auto stride = static_cast<uint64_t>(one.layout().stride), e = static_cast<uint64_t>(one.count), s = static_cast<uint64_t>(slots), n = static_cast<uint64_t>(layers);
  return n * s * stride + n * (e * 12 + s * 12 + 8 + 1024) + 2 * ((e - s) * stride + e * 8);
}

ExpertOffload::ExpertOffload(Device& device, ExpertHost& host, const std::vector<Experts*>& layers, const OffloadShape& shape) : shape_(shape) {
  QN_CHECK(!layers.empty() && shape.slots >= 1 && shape.slots < layers[0]->count, "offload: %d slots", shape.slots);
  const Experts& first = *layers[0];
  const auto n = static_cast<int64_t>(layers.size());
  const int64_t e = first.count, s = shape.slots;
  stride_ = first.layout().stride;
  slots_ = device.alloc(static_cast<size_t>(n * s * stride_), "slots of experts");
  // of all layers: at (E) | last_use (S) | clock, pending | slot_of (E) | expert_in (S)
  const int64_t at = 0, last_use = at + n * e * 8, clock = last_use + n * s * 8, slot_of = clock + n * 8 + 64, expert_in = slot_of + n * e * 4, bytes = expert_in + n * s * 4;
  tables_ = device.alloc(static_cast<size_t>(bytes), "tables of experts");
  auto* const base = static_cast<uint8_t*>(tables_.data());
  std::vector<uint8_t> image(static_cast<size_t>(bytes));
  homes_.resize(layers.size());
  pinned_ = shape.pin;
  for (int64_t i = 0; i < n; i++) {
    ExpertHome& h = homes_[static_cast<size_t>(i)];
    Experts& x = *layers[static_cast<size_t>(i)];
    QN_CHECK(x.count == e && x.layout().stride == stride_, "offload: layers of different shapes");
    h.slots = slot(static_cast<size_t>(i), 0), h.count = shape.slots;
    if (pinned_) h.host = device.map_host(x.data, static_cast<uint64_t>(e * stride_));
    pinned_ = pinned_ && h.host;
    h.at = reinterpret_cast<const uint8_t**>(base + at) + i * e;
    h.last_use = reinterpret_cast<int64_t*>(base + last_use) + i * s, h.clock = reinterpret_cast<int64_t*>(base + clock) + i;
    h.slot_of = reinterpret_cast<int32_t*>(base + slot_of) + i * e, h.expert_in = reinterpret_cast<int32_t*>(base + expert_in) + i * s;
    h.layer = static_cast<int32_t>(i), h.fetch_percent = shape.fetch_percent;
    const auto in = [&](auto* p) { return reinterpret_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(image.data() + (reinterpret_cast<uint8_t*>(p) - base)); };
    for (int64_t j = 0; j < e; j++) in(h.slot_of)[j] = j < s ? static_cast<int32_t>(j) : -1, in(h.at)[j] = j < s ? h.slots + j * stride_ : nullptr;
    for (int64_t j = 0; j < s; j++) in(h.expert_in)[j] = static_cast<int32_t>(j), in(h.last_use)[j] = j + 1;
    *in(h.clock) = s;
  }
  for (ExpertHome& h : homes_)
    if (!pinned_) h.host = nullptr;
  device.upload(tables_.data(), image.data(), image.size());
  device.reserve_staging(e - s, stride_, static_cast<int>(e), {homes_[0].slot_of, static_cast<size_t>(n * e)});
  for (size_t i = 0; i < layers.size(); i++) layers[i]->home = &homes_[i];
  box_ = expert_box(device.alloc_host(static_cast<size_t>(expert_box_bytes(shape.chosen, first.d))), shape.chosen, first.d, reinterpret_cast<uint32_t*>(base + clock + n * 8));
  device.sync();
  std::vector<Experts> records;
  for (const Experts* x : layers) records.push_back(*x);
  host.attach(box_, std::move(records), shape.chosen, shape.act);
}

uint8_t* ExpertOffload::slot(size_t layer, int slot) const {
  return static_cast<uint8_t*>(slots_.data()) + (static_cast<int64_t>(layer) * shape_.slots + slot) * stride_;
}

std::unique_ptr<ExpertOffload> offload_experts(Device& device, ExpertHost& host, const std::vector<std::pair<Experts*, const QnTensor*>>& layers, Loader& loader,
                                               const OffloadShape& shape) {
  std::vector<Experts*> experts;
  for (const auto& [x, tensor] : layers) experts.push_back(x);
  auto offload = std::make_unique<ExpertOffload>(device, host, experts, shape);
  for (size_t i = 0; i < layers.size(); i++)
    for (int r = 0; r < shape.slots; r++) loader.copy_record(device, *layers[i].second, static_cast<size_t>(r), offload->slot(i, r));
  return offload;
}

}  // namespace qn
