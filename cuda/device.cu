// The CUDA device: memory, the stream, recordings, and which launcher serves an operation. No kernel of the model is here.
//
// Everything runs on one stream. A recording is a CUDA graph: the first call of recorded() runs its body as it is (which also loads
// the kernels), the second captures it, later ones replay. What changes between replays lies in device memory.
#include <cublas_v2.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "cuda/common.cuh"
#include "cuda/cuda.h"
#include "cuda/kernels.h"

namespace qn {
namespace cuda {

void Scratch::check(size_t used) const { QN_CHECK(used <= end_, "cuda: scratch: planned %zu bytes, need %zu", end_, used); }

// Sums 16-byte words; reads only. 4 loads in flight per thread.
__global__ void read_k(const uint4* p, size_t n, uint32_t* out) {
  uint32_t s = 0;
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  wait_for_previous();
  for (; i + 3 * step < n; i += 4 * step) {
    const uint4 a = __ldcs(p + i), b = __ldcs(p + i + step), c = __ldcs(p + i + 2 * step), d = __ldcs(p + i + 3 * step);
    s += (a.x ^ a.y) + (b.z ^ b.w) + (c.x ^ c.w) + (d.y ^ d.z);
  }
  if (s == 0x12345678) *out = s;  // never, but the compiler does not know
}

namespace {

constexpr size_t kBlasBytes = 32 << 20;    // what cuBLAS asks for on Hopper
constexpr size_t kStaging = 1 << 20;       // pinned bytes through which small uploads go without waiting
constexpr size_t kUpload = 64 << 10;       // "small"
constexpr uint64_t kPasses = 32;           // a caller may be fewer than this ahead

// Where many tokens find experts that have no slot: two buffers, filled in turn by a stream of its own while the layer before computes.
//
//   copies:   wait until the buffer is free . records without a slot . table of addresses . filled
//   compute:                                                        wait until filled . D5 . D6 . free
class Staging {
 public:
  // slot_of: where the device keeps the slots of all experts of all layers (ExpertHome::slot_of lies in it)
  Staging(Device& device, int64_t records, int64_t record_bytes, int experts, std::span<const int32_t> slot_of)
      : records_(records), bytes_(record_bytes), experts_(experts), device_slots_(slot_of), slots_(slot_of.size()) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "staging: cudaStreamCreate");
    check(cudaHostAlloc(&tables_, 2 * sizeof(uint8_t*) * static_cast<size_t>(experts), cudaHostAllocDefault), "staging: cudaHostAlloc");
    for (Side& s : sides_) {
      s.records = device.alloc(static_cast<size_t>(records * record_bytes), "experts on their way");
      s.at = device.alloc(sizeof(uint8_t*) * static_cast<size_t>(experts), "addresses of experts");
      check(cudaEventCreateWithFlags(&s.filled, cudaEventDisableTiming), "staging: cudaEventCreate");
      check(cudaEventCreateWithFlags(&s.free, cudaEventDisableTiming), "staging: cudaEventCreate");
    }
  }
  ~Staging() {
    cudaStreamSynchronize(stream_);
    for (Side& s : sides_) cudaEventDestroy(s.filled), cudaEventDestroy(s.free);
    cudaFreeHost(tables_);
    cudaStreamDestroy(stream_);
  }
  Staging(const Staging&) = delete;

  void places_move() { stale_ = true; }  // an operation that moves experts has been asked for

  void bring(const Context& c, const Experts& e) {
    const ExpertHome& home = *e.home;
    if (stale_) {
      check(cudaMemcpyAsync(slots_.data(), device_slots_.data(), device_slots_.size_bytes(), cudaMemcpyDeviceToHost, c.stream), "staging: places");
      check(cudaStreamSynchronize(c.stream), "staging: places");
      stale_ = false;
    }
    next_ ^= 1;
    Side& s = sides_[next_];
    check(cudaEventSynchronize(s.filled), "staging: copies");  // the table of two layers ago has been read
    check(cudaStreamWaitEvent(stream_, s.free), "staging");
    const int32_t* slot = slots_.data() + (home.slot_of - device_slots_.data());
    const uint8_t** table = tables_ + next_ * experts_;
    const uint8_t* from = home.host ? home.host : e.data;
    uint8_t* to = static_cast<uint8_t*>(s.records.data());
    int64_t used = 0;
    for (int i = 0; i < experts_;) {
      if (slot[i] >= 0) {
        table[i] = home.slots + slot[i] * bytes_, i++;
        continue;
      }
      int n = 0;
      for (; i + n < experts_ && slot[i + n] < 0; n++) table[i + n] = to + (used + n) * bytes_;
      QN_CHECK(used + n <= records_, "staging: room for %lld experts", static_cast<long long>(records_));
      check(cudaMemcpyAsync(to + used * bytes_, from + i * bytes_, static_cast<size_t>(n * bytes_), cudaMemcpyHostToDevice, stream_), "staging: experts");
      used += n, i += n;
    }
    check(cudaMemcpyAsync(s.at.data(), table, sizeof(uint8_t*) * static_cast<size_t>(experts_), cudaMemcpyHostToDevice, stream_), "staging: addresses");
    check(cudaEventRecord(s.filled, stream_), "staging");
    s.home = &home;
  }

  // The addresses of all experts of a layer, for what `c` is asked to do from here on
  const uint8_t** addresses(const Context& c, const Experts& e) {
    Side* s = side(e);
    if (!s) bring(c, e), s = side(e);
    check(cudaStreamWaitEvent(c.stream, s->filled), "staging");
    return static_cast<const uint8_t**>(s->at.data());
  }
  void release(const Context& c, const Experts& e) {
    Side* s = side(e);
    check(cudaEventRecord(s->free, c.stream), "staging");
    s->home = nullptr;
  }

 private:
  struct Side {
    Buffer records, at;
    cudaEvent_t filled = nullptr, free = nullptr;
    const ExpertHome* home = nullptr;  // whose records are in it or on their way
  };
  Side* side(const Experts& e) {
    for (Side& s : sides_)
      if (s.home == e.home) return &s;
    return nullptr;
  }

  const int64_t records_, bytes_;
  const int experts_;
  const std::span<const int32_t> device_slots_;
  std::vector<int32_t> slots_;  // copy of those
  bool stale_ = true;
  cudaStream_t stream_ = nullptr;
  const uint8_t** tables_ = nullptr;  // pinned, (2, E)
  Side sides_[2];
  int next_ = 0;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, bool graphs) : index_(index), graphs_(graphs), name_(format("cuda:%d", index)) {
    make_current();
    cudaDeviceProp p{};
    check(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
    if (p.major < 8) fail("--device cuda:%d: %s has compute capability %d.%d, expected 8.0 or later; use --device cpu", index, p.name, p.major, p.minor);
    name_ = format("cuda:%d (%s)", index, p.name);
    context_.sms = p.multiProcessorCount;
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, read_k), "cudaFuncGetAttributes");
    context_.overlap = p.major >= 9 && code.ptxVersion >= 90;  // code for older architectures does not wait for what it overlaps
    context_.shared_max = p.sharedMemPerBlockOptin;
    check(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check_blas(cublasCreate(&context_.blas), "cuBLAS", "cublasCreate");
    check_blas(cublasSetStream(context_.blas, context_.stream), "cuBLAS", "cublasSetStream");
    check(cudaHostAlloc(&staging_, kStaging, cudaHostAllocDefault), "cudaHostAlloc");
    check(cudaEventCreateWithFlags(&asked_, cudaEventDisableTiming), "cudaEventCreate");
    for (cudaEvent_t& e : passes_) check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "cudaEventCreate");
    size_t total = 0;
    check(cudaMemGetInfo(&free_at_start_, &total), "cudaMemGetInfo");
    fixed_ = static_cast<uint8_t*>(do_alloc(kBlasBytes + kCounters * 4, "cuBLAS workspace"));
    context_.counters = reinterpret_cast<uint32_t*>(fixed_ + kBlasBytes);
    check_blas(cublasSetWorkspace(context_.blas, fixed_, kBlasBytes), "cuBLAS", "cublasSetWorkspace");
    check_blas(cublasSetMathMode(context_.blas, CUBLAS_PEDANTIC_MATH), "cuBLAS", "cublasSetMathMode");
  }
  ~CudaDevice() override {
    cudaSetDevice(index_);
    cudaStreamSynchronize(context_.stream);
    incoming_ = nullptr;
    for (auto& [key, r] : recordings_)
      if (r.graph) cudaGraphExecDestroy(r.graph);
    for (void* p : {static_cast<void*>(context_.scratch), static_cast<void*>(weights_), static_cast<void*>(fixed_)}) cudaFree(p);
    for (void* p : shared_) cudaFreeHost(p);
    for (const void* p : mapped_) cudaHostUnregister(const_cast<void*>(p));
    cudaFreeHost(staging_);
    cudaEventDestroy(asked_);
    for (cudaEvent_t e : passes_) cudaEventDestroy(e);
    cublasDestroy(context_.blas);
    cudaStreamDestroy(context_.stream);
  }
  std::string name() const override { return name_; }
  void make_current() const override {  // asking takes some ns, and is allowed while recording
    int now = -1;
    if (cudaGetDevice(&now) != cudaSuccess || now != index_) check(cudaSetDevice(index_), "cudaSetDevice");
  }

  // ---- memory
  uint64_t memory() const override {
    make_current();
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return total;
  }
  uint64_t memory_free() const override {
    make_current();
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
  }
  uint64_t memory_used() const override { return free_at_start_ - std::min<uint64_t>(free_at_start_, memory_free()); }
  void* do_alloc(size_t bytes, const char* what) override {
    make_current();
    void* p = nullptr;
    const cudaError_t e = cudaMalloc(&p, std::max<size_t>(bytes, 1));
    if (e == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      fail("%s: no room for %s: %zu MiB wanted, %llu MiB free", name_.c_str(), what, bytes >> 20, static_cast<unsigned long long>(memory_free() >> 20));
    }
    check(e, what);
    check(cudaMemsetAsync(p, 0, std::max<size_t>(bytes, 1), context_.stream), what);
    return p;
  }
  void do_free(void* p, size_t) override {
    cudaSetDevice(index_);  // called by destructors
    cudaStreamSynchronize(context_.stream);
    cudaFree(p);
  }
  void reserve_weights(uint64_t bytes) override {
    QN_CHECK(!weights_, "cuda: weights are reserved already");
    weights_ = static_cast<uint8_t*>(do_alloc(bytes, "weights"));
    weight_bytes_ = bytes;
  }
  const void* place(const void*, size_t bytes) override {
    const uint64_t at = placed_;
    placed_ += (bytes + kPlaceAlign - 1) / kPlaceAlign * kPlaceAlign;
    QN_CHECK(placed_ <= weight_bytes_, "cuda: %llu bytes of weights were reserved, %llu are placed", static_cast<unsigned long long>(weight_bytes_),
             static_cast<unsigned long long>(placed_));
    return weights_ + at;
  }
  LoadReport load(const File& file, std::span<const LoadPiece> pieces, int threads, bool check, const std::function<void(size_t)>& damaged,
                  const std::function<void(uint64_t, uint64_t)>& progress) override {
    sync();  // this device is current from here on: the loader's threads take over which
    return cuda::load(file, pieces, threads, check, damaged, progress);
  }
  void upload(void* to, const void* from, size_t n) override {
    make_current();
    if (n > kUpload) {  // from pageable memory: has read it when it returns
      check(cudaMemcpyAsync(to, from, n, cudaMemcpyHostToDevice, context_.stream), "upload");
      return;
    }
    if (staged_ + n > kStaging) sync(), staged_ = 0;  // the copies that read the ring have ended
    std::memcpy(staging_ + staged_, from, n);
    check(cudaMemcpyAsync(to, staging_ + staged_, n, cudaMemcpyHostToDevice, context_.stream), "upload");
    staged_ += (n + 63) / 64 * 64;
  }
  void download(void* to, const void* from, size_t n) override {
    make_current();
    check(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToHost, context_.stream), "download");
    sync();
  }
  void copy(void* to, const void* from, size_t n) override {
    make_current();
    check(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, context_.stream), "copy");
  }
  void zero(void* to, size_t n) override { make_current(), check(cudaMemsetAsync(to, 0, n, context_.stream), "zero"); }
  // A's memory to mine (B), without the host waiting:
  //   1. A's event is recorded on A's stream: it stands for everything asked of A so far.
  //   2. my stream waits for it, then copies: the copy sees what A had been asked to write, and comes after what I was asked before.
  //   3. my event is recorded behind the copy, and A's stream waits for it: what A is asked later cannot overwrite what is still read.
  // A wait is for the event's last record before the wait was asked for; recording it again moves no earlier wait, so one event per
  // device serves all copies. Every wait is for something asked earlier, hence no circle of devices can wait for each other.
  void copy_from(void* to, Device& source, const void* from, size_t n) override {
    if (&source == this) return copy(to, from, n);
    auto* const a = dynamic_cast<CudaDevice*>(&source);
    QN_CHECK(a, "%s: a copy from %s", name_.c_str(), source.name().c_str());
    const bool here = a->index_ == index_;
    a->record(a->asked_);
    make_current();
    if (!here) reach(*a);
    check(cudaStreamWaitEvent(context_.stream, a->asked_, 0), "waiting for another device");
    if (here) check(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, context_.stream), "copy");
    else check(cudaMemcpyPeerAsync(to, index_, from, a->index_, n, context_.stream), "copy from another device");
    record(asked_);
    a->make_current();
    a->check(cudaStreamWaitEvent(a->context_.stream, asked_, 0), "waiting for another device");
  }
  void keep_up(size_t behind) override {
    if (!behind) return sync();
    const uint64_t ahead = std::min<uint64_t>(behind, kPasses - 1);
    record(passes_[passed_ % kPasses]);
    if (passed_ >= ahead) check(cudaEventSynchronize(passes_[(passed_ - ahead) % kPasses]), "waiting for the device (--no-graph names the operation)");
    passed_++;
  }
  void sync() override { make_current(), check(cudaStreamSynchronize(context_.stream), "waiting for the device (--no-graph names the operation)"); }
  bool idle() override {
    make_current();
    const cudaError_t e = cudaStreamQuery(context_.stream);
    if (e == cudaErrorNotReady) return false;
    check(e, "the device failed (--no-graph names the operation)");
    return true;
  }
  Mail* alloc_mail() override {
    return static_cast<Mail*>(alloc_host(sizeof(Mail)));
  }
  void* alloc_host(size_t bytes) override {
    make_current();
    void* p = nullptr;
    cuda::check(cudaHostAlloc(&p, bytes, cudaHostAllocMapped), "cudaHostAlloc");
    std::memset(p, 0, bytes);
    shared_.push_back(p);
    return p;
  }
  const uint8_t* map_host(const void* host, uint64_t bytes) override {
    make_current();
    void* seen = nullptr;
    if (cudaHostRegister(const_cast<void*>(host), bytes, cudaHostRegisterMapped | cudaHostRegisterReadOnly) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    mapped_.push_back(host);
    cuda::check(cudaHostGetDevicePointer(&seen, const_cast<void*>(host), 0), "cudaHostGetDevicePointer");
    return static_cast<const uint8_t*>(seen);
  }
  void reserve_staging(int64_t records, int64_t record_bytes, int experts, std::span<const int32_t> slot_of) override {
    make_current();
    incoming_ = std::make_unique<Staging>(*this, records, record_bytes, experts, slot_of);
  }
  void stage_experts(const Experts& e) override {
    make_current();
    QN_CHECK(incoming_ && e.home, "stage_experts: no staging memory, or experts that are all here");
    incoming_->bring(context_, e);
  }
  bool samples() const override { return true; }

  // ---- scratch
  uint64_t scratch_bytes(const OpLimits& l) const override {
    size_t most = std::max({matvec_scratch(l), matmul_scratch(l), moe_scratch(l), moe_prefill_scratch(l), delta_net_scratch(l), attention_scratch(l),
                            place_experts_scratch(l)});
    most = std::max(most, sample_scratch(std::max<int64_t>(l.vocab, 1)));
    return (most + 255) / 256 * 256;
  }
  void reserve(const OpLimits& l) override {
    const size_t bytes = scratch_bytes(l);
    if (bytes <= context_.scratch_bytes) return;
    sync();  // this device is current from here on
    recordings_forget(nullptr);  // they hold the old address
    if (context_.scratch) check(cudaFree(context_.scratch), "cudaFree");
    context_.scratch = nullptr, context_.scratch_bytes = 0;
    context_.scratch = static_cast<uint8_t*>(do_alloc(bytes, "scratch of the operations"));
    context_.scratch_bytes = bytes;
  }

  // ---- recordings
  void recorded(const void* owner, uint64_t key, const std::function<void()>& body) override {
    make_current();
    if (incoming_) incoming_->places_move();
    Recording* r = graphs_ ? &recordings_[{owner, key}] : nullptr;
    if (!r || !r->warm) {
      body();
      if (r) r->warm = true;
      return;
    }
    if (!r->graph) {
      cudaGraph_t graph = nullptr;
      check(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
      try {
        body();
      } catch (...) {
        cudaStreamEndCapture(context_.stream, &graph);
        if (graph) cudaGraphDestroy(graph);
        throw;
      }
      check(cudaStreamEndCapture(context_.stream, &graph), "cudaStreamEndCapture");
      const cudaError_t e = cudaGraphInstantiate(&r->graph, graph, 0);
      cudaGraphDestroy(graph);
      check(e, "cudaGraphInstantiate");
    }
    check(cudaGraphLaunch(r->graph, context_.stream), "cudaGraphLaunch");
  }
  void forget(const void* owner) override {
    cudaSetDevice(index_);
    cudaStreamSynchronize(context_.stream);  // called by destructors: a failure shows where results are wanted
    recordings_forget(owner);
  }

  double bus_bandwidth() override {
    constexpr size_t kBytes = 32 << 20;  // there may be little room left
    make_current();
    const Buffer there = alloc(kBytes, "measuring the bus");
    void* host = nullptr;
    check(cudaHostAlloc(&host, kBytes, cudaHostAllocDefault), "measuring the bus");
    double best = 0;
    for (int i = 0; i < 8; i++) {
      sync();
      const auto start = std::chrono::steady_clock::now();
      check(cudaMemcpyAsync(there.data(), host, kBytes, cudaMemcpyHostToDevice, context_.stream), "measuring the bus");
      sync();
      best = std::max(best, kBytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    cudaFreeHost(host);
    return best;
  }
  double read_bandwidth(uint64_t) override {
    make_current();
    // Weights, when there are enough of them: they are what a token reads. Else memory of its own, larger than any cache.
    Buffer own;
    const uint8_t* p = weights_;
    size_t bytes = std::min<size_t>(weight_bytes_, size_t{16} << 30);
    if (bytes < size_t{2} << 30) {
      bytes = std::min<size_t>(size_t{4} << 30, memory_free() / 2);
      own = alloc(bytes, "measuring bandwidth");
      p = static_cast<const uint8_t*>(own.data());
    }
    cudaEvent_t a, b;
    check(cudaEventCreate(&a), "cudaEventCreate");
    check(cudaEventCreate(&b), "cudaEventCreate");
    double best = 0;
    for (int blocks : {1, 2, 8, 8, 8}) {
      check(cudaEventRecord(a, context_.stream), "cudaEventRecord");
      launch(context_, "read", read_k, dim3(static_cast<unsigned>(context_.sms * blocks)), dim3(1024), 0, reinterpret_cast<const uint4*>(p), bytes / 16, context_.counters);
      check(cudaEventRecord(b, context_.stream), "cudaEventRecord");
      check(cudaEventSynchronize(b), "cudaEventSynchronize");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, a, b), "cudaEventElapsedTime");
      best = std::max(best, static_cast<double>(bytes) / (ms * 1e-3));
    }
    cudaEventDestroy(a), cudaEventDestroy(b);
    return best;
  }

 private:
  struct Recording {
    bool warm = false;
    cudaGraphExec_t graph = nullptr;
  };
  void recordings_forget(const void* owner) {  // null: all
    std::erase_if(recordings_, [owner](auto& r) {
      if (owner && r.first.first != owner) return false;
      if (r.second.graph) cudaGraphExecDestroy(r.second.graph);
      return true;
    });
  }
  // See cuda/common.cuh; the device is "cuda:0 (its name)" here.
  void check(cudaError_t e, const char* what) const {
    if (e != cudaSuccess) fail_with(e, name_, what);
  }
  void record(cudaEvent_t e) {
    make_current();
    check(cudaEventRecord(e, context_.stream), "cudaEventRecord");
  }
  // Reads of the other GPU's memory go straight to it where the machine has a way; else the driver copies by way of the host. Once per pair.
  void reach(const CudaDevice& other) {
    if (std::ranges::find(reached_, other.index_) != reached_.end()) return;
    int can = 0;
    check(cudaDeviceCanAccessPeer(&can, index_, other.index_), "cudaDeviceCanAccessPeer");
    if (const cudaError_t e = can ? cudaDeviceEnablePeerAccess(other.index_, 0) : cudaSuccess; e == cudaErrorPeerAccessAlreadyEnabled) cudaGetLastError();
    else check(e, "cudaDeviceEnablePeerAccess");
    reached_.push_back(other.index_);
  }
  // Without recordings every operation is waited for, so that a failure names it.
  void done(const char* op) {
    if (!graphs_) check(cudaStreamSynchronize(context_.stream), op);
  }
  static bool few(int64_t t) { return t <= kFewTokens; }

  // Experts of an operation over many tokens: all of them within reach
  class Staged {
   public:
    Staged(CudaDevice& d, const Experts& e) : device_(d), asked_(e), experts_(e) {
      if (!e.home) return;
      home_ = *e.home, home_.at = d.incoming_->addresses(d.context_, e);
      experts_.home = &home_;
    }
    const Experts& experts() const { return experts_; }
    void release() const {  // they have been used
      if (asked_.home) device_.incoming_->release(device_.context_, asked_);
    }

   private:
    CudaDevice& device_;
    const Experts& asked_;
    ExpertHome home_;
    Experts experts_;
  };

  void do_embed(const EmbedArgs& a) override { cuda::embed(context_, a), done("embed"); }
  void do_norm_matmul(const NormMatmulArgs& a) override {
    few(a.h.rows()) ? matvec_norm(context_, a) : matmul_norm(context_, a);
    done("norm_matmul");
  }
  void do_delta_net(const DeltaNetArgs& a) override { cuda::delta_net(context_, a), done("delta_net"); }
  void do_delta_replay(const DeltaReplayArgs& a) override { cuda::delta_replay(context_, a), done("delta_replay"); }
  void do_gated_norm_matmul(const GatedNormMatmulArgs& a) override {
    few(a.o.rows()) ? matvec_gated_norm(context_, a) : matmul_gated_norm(context_, a);
    done("gated_norm_matmul");
  }
  void do_attention(const AttentionArgs& a) override {
    if (few(a.qgkv.rows())) gated_ = attention_few(context_, a);
    else attention_many(context_, a);
    done("attention");
  }
  void do_gate_matmul(const GateMatmulArgs& a) override {
    few(a.o.rows()) ? matvec_gate(context_, a, a.behind && gated_) : matmul_gate(context_, a);
    done("gate_matmul");
  }
  void do_moe_router(const MoeRouterArgs& a) override {
    few(a.h.rows()) ? matvec_router(context_, a) : matmul_router(context_, a);
    done("moe_router");
  }
  static bool prefill(Act act, const Experts& e) { return act == Act::BF16 && e.dtype != DType::F32; }
  void do_moe_gate_up(const MoeGateUpArgs& a) override {
    if (few(a.x.rows())) {
      moe_few_gate_up(context_, a);
    } else {
      const Staged here(*this, a.experts);
      MoeGateUpArgs b = a;
      b.experts = here.experts();
      prefill(a.act, a.experts) ? moe_prefill_gate_up(context_, b) : moe_exact_gate_up(context_, b);
    }
    done("moe_gate_up");
  }
  void do_moe_down(const MoeDownArgs& a) override {
    if (few(a.h.rows())) {
      moe_few_down(context_, a);
    } else {
      const Staged here(*this, a.experts);
      MoeDownArgs b = a;
      b.experts = here.experts();
      prefill(a.act, a.experts) ? moe_prefill_down(context_, b) : moe_exact_down(context_, b);
      here.release();
    }
    done("moe_down");
  }
  void do_place_experts(const PlaceExpertsArgs& a) override {
    if (incoming_) incoming_->places_move();
    cuda::place_experts(context_, a), done("place_experts");
  }
  void do_join_experts(const JoinExpertsArgs& a) override { cuda::join_experts(context_, a), done("join_experts"); }
  void do_concat_matmul(const ConcatMatmulArgs& a) override {
    few(a.a.rows()) ? matvec_concat(context_, a) : matmul_concat(context_, a);
    done("concat_matmul");
  }
  void do_sample(const SampleArgs& a) override { cuda::sample(context_, a), done("sample"); }

  const int index_;
  const bool graphs_;
  std::string name_;
  Context context_;
  bool gated_ = false;  // attention_few()'s answer
  uint8_t *fixed_ = nullptr, *weights_ = nullptr, *staging_ = nullptr;
  uint64_t weight_bytes_ = 0, placed_ = 0;
  size_t staged_ = 0, free_at_start_ = 0;
  std::vector<void*> shared_;          // of alloc_host()
  std::vector<const void*> mapped_;    // of map_host()
  std::unique_ptr<Staging> incoming_;   // of reserve_staging()
  cudaEvent_t asked_ = nullptr;              // of copies between devices: see copy_from()
  cudaEvent_t passes_[kPasses] = {};         // ends of the last passes: see keep_up()
  uint64_t passed_ = 0;
  std::vector<int> reached_;                 // GPUs whose memory this one may read
  std::map<std::pair<const void*, uint64_t>, Recording> recordings_;
};

}  // namespace
}  // namespace cuda

std::vector<CudaDeviceInfo> list_cuda_devices() {
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess) {  // no driver, an old one, no device
    cudaGetLastError();
    return {};
  }
  std::vector<CudaDeviceInfo> out;
  for (int i = 0; i < n; i++) {
    cudaDeviceProp p{};
    if (cudaGetDeviceProperties(&p, i) == cudaSuccess) out.push_back({i, p.name, p.totalGlobalMem, p.major * 10 + p.minor});
  }
  return out;
}

std::unique_ptr<Device> make_cuda_device(int index, bool graphs) {
  const size_t n = list_cuda_devices().size();
  if (!n) fail("--device cuda: no NVIDIA GPU with a driver that fits this build was found; use --device cpu");
  if (index < 0 || static_cast<size_t>(index) >= n) fail("--device cuda:%d: there are %zu GPUs, numbered from 0", index, n);
  return std::make_unique<cuda::CudaDevice>(index, graphs);
}

}  // namespace qn
