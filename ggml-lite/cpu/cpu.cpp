#include "ggml-lite/cpu/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "ggml-lite/base/term.h"
#include "ggml-lite/cpu/cpu_device.h"

namespace qn {

Isa isa_named(const std::string& name) { return name == "scalar" ? Isa::Scalar : name == "avx2" ? Isa::Avx2 : name == "avx512" ? Isa::Avx512 : Isa::Auto; }

bool isa_available(Isa isa) { return cpu::kernels_of(isa) != nullptr; }

std::unique_ptr<Device> make_cpu_device(int threads, Isa isa, int spin_microseconds) {
  const cpu::Kernels* kernels = cpu::kernels_of(isa);
  if (!kernels)
    fail("cpu: this machine lacks %s; try a lower instruction set",
         isa == Isa::Avx512 ? "AVX-512 with BW, VL, DQ and VNNI" : "AVX2 with FMA and F16C");
  return std::make_unique<cpu::CpuDevice>(threads, *kernels, spin_microseconds);
}

// Adds up what lies at p, a multiple of 4096 bytes. asking: for lines 4 KB ahead as well, as products do (dot_avx512.cpp): where a core has too few
// lines under way for a plain loop, decode would pass "100 %" of one.
static uint64_t read_all(const cpu::Kernels& kernels, const uint8_t* p, int64_t bytes, bool asking) {
  if (!asking) return kernels.read(p, bytes);
  constexpr int64_t kStep = 1024, kAhead = 4096;
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes; i += kStep) {
    for (int64_t j = 0; j < kStep && i + kAhead < bytes; j += 64) __builtin_prefetch(p + i + kAhead + j, 0, 2);
    sum += kernels.read(p + i, kStep);
  }
  return sum;
}

// Reads all of `arena`, best of a few runs in both ways. Who is done early helps the others, as in operations: else the slowest of all threads
// counts, on a machine with other load half of what the memory gives. filled: whether it has pages already
static double read_bandwidth(const Arena& arena, int threads, bool filled) {
  const cpu::Kernels* kernels = cpu::kernels_of(Isa::Auto);
  Threads pool(threads);
  const int64_t pieces = 16 * pool.size();
  auto piece = [&](int64_t i) {
    const Range r = share(static_cast<int64_t>(arena.size()) / 4096, static_cast<int>(i), static_cast<int>(pieces));
    return Range{r.begin * 4096, r.end * 4096};
  };
  if (!filled)
    pool.run([&](int t) {
      const Range mine = share(pieces, t, pool.size());
      for (int64_t i = mine.begin; i < mine.end; i++) std::memset(arena.data() + piece(i).begin, t + 1, piece(i).end - piece(i).begin);
    });
  double best = 0;
  std::vector<uint64_t> sums(pool.size() * 8);
  for (int run = 0; run < 8; run++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) {
      pool.spread(t, 0, pieces, [&](int64_t i) { sums[t * 8] += read_all(*kernels, arena.data() + piece(i).begin, piece(i).end - piece(i).begin, run % 2 == 1); });
    });
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(arena.size()) / time.count());
  }
  return best;
}
static uint64_t read_size(uint64_t most) { return std::min({available_ram() / 4, uint64_t{1} << 30, most}) / 4096 * 4096; }

double cpu_read_bandwidth(int threads, uint64_t most) {
  const uint64_t bytes = read_size(most);
  return bytes < kLeastRead ? 0 : read_bandwidth(Arena(bytes), threads, false);
}

double cpu_peak(int threads, Isa isa) { return cpu::cpu_peak(threads, *cpu::kernels_of(isa)); }
double cpu::cpu_peak(int threads, const Kernels& kernels) {
  if (!kernels.work) return 0;
  Threads pool(threads);
  std::vector<double> done(pool.size() * 8);
  int64_t rounds = 1000;
  double best = 0;
  for (int run = 0; run < 4;) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) { done[t * 8] = kernels.work(rounds); });
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    if (time.count() < 5e-3) rounds *= 2;
    else best = std::max(best, done[0] * pool.size() / time.count()), run++;
  }
  return best;
}

int probe_threads() {
  const int cores = default_threads(), all = usable_processors();
  const uint64_t bytes = read_size(uint64_t{512} << 20);
  if (all == cores || bytes < kLeastRead) return cores;
  const Arena arena(bytes);
  const double by_cores = read_bandwidth(arena, cores, false);
  return read_bandwidth(arena, all, true) > 1.1 * by_cores ? all : cores;
}

namespace cpu {

#if defined(__x86_64__)
// AMX-TILE and AMX-INT8; whether the system saves tiles is what allow_tiles() asks
static bool has_int8_tiles() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3;
}
#endif

const Kernels* kernels_of(Isa isa, Extra most) {
#if defined(__x86_64__)
  // Also false where the operating system does not save the wide registers. F16C is older than AVX2 and in every processor with it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bf16 = most >= Extra::Bf16 && avx512 && __builtin_cpu_supports("avx512bf16");
  const bool amx = most >= Extra::Amx && bf16 && has_int8_tiles() && allow_tiles();
#else
  const bool avx2 = false, avx512 = false, bf16 = false, amx = false;
#endif
  switch (isa) {
    case Isa::Scalar: return scalar_kernels();
    case Isa::Avx2: return avx2 ? avx2_kernels() : nullptr;
    case Isa::Avx512: return amx ? amx_kernels() : bf16 ? avx512bf16_kernels() : avx512 ? avx512_kernels() : nullptr;
    case Isa::Auto: break;
  }
  for (Isa best : {Isa::Avx512, Isa::Avx2})
    if (const Kernels* k = kernels_of(best, most)) return k;
  return scalar_kernels();
}

void CpuDevice::upload(void* to, const void* from, size_t n) { std::memcpy(to, from, n); }
void CpuDevice::download(void* to, const void* from, size_t n) { std::memcpy(to, from, n); }
void CpuDevice::copy(void* to, const void* from, size_t n) { std::memmove(to, from, n); }
void CpuDevice::zero(void* to, size_t n) { std::memset(to, 0, n); }

void* CpuDevice::do_alloc(size_t bytes, const char* what) {
  if (bytes > (size_t{64} << 20) && bytes > available_ram())
    fail("cpu: %s needs %s, but only %s of memory are free; try a shorter context", what, human_gib(bytes).c_str(),
         human_gib(available_ram()).c_str());
  Arena a(std::max<size_t>(bytes, 64));
  void* p = a.data();
  arenas_.emplace(p, std::move(a));
  return p;
}

void CpuDevice::do_free(void* p, size_t) { arenas_.erase(p); }

// ---- scratch

static OpLimits larger(const OpLimits& a, const OpLimits& b) {
  OpLimits m;
  m.tokens = std::max({a.tokens, b.tokens, 1}), m.width = std::max(a.width, b.width);
  m.experts = std::max(a.experts, b.experts), m.chosen = std::max({a.chosen, b.chosen, 1});
  m.expert_width = std::max(a.expert_width, b.expert_width), m.model_width = std::max(a.model_width, b.model_width);
  m.heads = std::max(a.heads, b.heads), m.context = std::max(a.context, b.context);
  m.value_heads = std::max(a.value_heads, b.value_heads), m.key_heads = std::max(a.key_heads, b.key_heads);
  m.key_dim = std::max(a.key_dim, b.key_dim), m.value_dim = std::max(a.value_dim, b.value_dim);
  return m;
}

CpuDevice::Scratch CpuDevice::lay_out(const OpLimits& m) const {
  Scratch s;
  const int64_t width = std::max({m.width, m.model_width, m.expert_width});
  // Matrix products: fp32 and prepared rows of every token; with packed ones they are fewer bytes, where packs are full. Experts: for each
  // choice a row inside, fp32 and prepared, and one of the model's.
  s.rows_size = m.tokens * std::max(4 * round_up(width, 64) + largest_prepared_row(width),
                                    m.chosen * (4 * round_up(m.expert_width, 16) + largest_prepared_row(m.expert_width)) + largest_prepared_row(width)) + 256;
  s.rows_size += kPacked * round_up(width, kPadK) * 9 / 8;  // and one that is not
  s.pointers_size = m.tokens * (2 + 4 * int64_t{m.chosen});
  s.local_floats = round_up(3 * width + m.heads * (2 * kPartExtra + kKeys) + (2 * kDeltaBlock + 16) * (m.key_dim + m.value_dim) + m.key_dim * m.value_dim + 64, 1024);
  const int64_t blocks = m.heads ? m.context / kKeys + 1 : 0;
  s.parts_floats = blocks ? std::max<int64_t>(blocks * (width + m.heads * kPartExtra), int64_t{1} << 21) : 0;
  // panels as bytes, or packed tokens, both with a scale for 32 bytes at least
  static_assert(kBlock > kPanels * kPanelRows);
  s.unpacked = kBlock * (round_up(width, kPadK) * 9 / 8);
  s.lists_size = 2 * (int64_t{m.experts} + 1) + m.tokens * int64_t{m.chosen};

  s.bytes = 0;
  auto carve = [&s](int64_t bytes) { return std::exchange(s.bytes, s.bytes + round_up(bytes, 4096)); };
  s.rows_at = carve(s.rows_size), s.pointers_at = carve(s.pointers_size * 8);
  s.locals_at = carve(threads_.size() * s.local_floats * 4), s.unpacked_at = carve(threads_.size() * s.unpacked);
  s.parts_at = carve(s.parts_floats * 4), s.lists_at = carve(s.lists_size * 4);
  return s;
}

uint64_t CpuDevice::scratch_bytes(const OpLimits& limits) const {
  return static_cast<uint64_t>(lay_out(larger(limits_, limits)).bytes);
}

void CpuDevice::reserve(const OpLimits& limits) {
  limits_ = larger(limits_, limits);
  const Scratch s = lay_out(limits_);
  if (scratch_.size() < static_cast<size_t>(s.bytes)) scratch_ = Arena(s.bytes);
  uint8_t* p = scratch_.data();
  rows_size_ = s.rows_size, row_bytes_ = p + s.rows_at;
  pointers_size_ = s.pointers_size, pointers_ = reinterpret_cast<const uint8_t**>(p + s.pointers_at);
  local_floats_ = s.local_floats, locals_ = reinterpret_cast<float*>(p + s.locals_at);
  unpacked_size_ = s.unpacked, unpacked_ = p + s.unpacked_at;
  parts_floats_ = s.parts_floats, parts_ = reinterpret_cast<float*>(p + s.parts_at);
  lists_size_ = s.lists_size, lists_ = reinterpret_cast<int32_t*>(p + s.lists_at);
}

const uint8_t** CpuDevice::take_pointers(int64_t n) {
  QN_CHECK(pointers_used_ + n <= pointers_size_, "cpu: %lld rows of activations, reserve() had %lld",
           static_cast<long long>(pointers_used_ + n), static_cast<long long>(pointers_size_));
  return pointers_ + std::exchange(pointers_used_, pointers_used_ + n);
}

uint8_t* CpuDevice::take_bytes(int64_t n) {
  QN_CHECK(rows_used_ + n <= rows_size_, "cpu: %lld bytes of activations, reserve() had %lld", static_cast<long long>(rows_used_ + n),
           static_cast<long long>(rows_size_));
  return row_bytes_ + std::exchange(rows_used_, round_up(rows_used_ + n, 64));
}

Rows CpuDevice::take_rows(int64_t n, int64_t stride) {
  Rows r{take_bytes(n * stride), stride, take_pointers(n)};
  for (int64_t i = 0; i < n; i++) r.x[i] = r[i];
  return r;
}

Rows CpuDevice::take_rows(const Matrix& m, int64_t n) {
  Rows r = take_rows(n, m.product.bytes);
  if (m.takes_packed(n)) r.packed = take_bytes(packs_of(n) * m.product.packed);
  return r;
}

void CpuDevice::check_local(const char* op, int64_t floats) const {
  QN_CHECK(floats <= local_floats_, "%s: %lld floats of scratch, reserve() had %lld", op, static_cast<long long>(floats),
           static_cast<long long>(local_floats_));
}

// ---- matrices

int64_t largest_prepared_row(int64_t k) { return round_up(k, kPadK) * 4; }  // fp32; Bytes take 1.25 a value at most

Matrix make_matrix(const Kernels& kernels, const Tensor& w, Act act) {
  Matrix m;
  if (!w) return m;
  Product& p = m.product;
  p.dtype = w.dtype, p.group = w.group;
  p.k = w.cols(), p.kp = round_up(p.k, kPadK);
  p.row_stride = w.row_stride;
  if (act == Act::INT8) p.form = is_t16(w.dtype) ? Form::Bytes : Form::Codes;
  if (act == Act::BF16) p.form = Form::BF16;
  auto find = [&] { return kernels.product[static_cast<int>(p.form)][static_cast<int>(p.dtype)]; };
  if (!find()) p.form = Form::F32;
  m.multiply = find();
  const int64_t value_bytes = p.form == Form::F32 ? 4 : p.form == Form::Bytes ? 1 : 2;
  const int64_t groups = p.form == Form::Bytes ? p.kp / p.group : p.form == Form::Codes ? (p.k + kActGroup - 1) / kActGroup : 0;
  p.scales_at = p.kp * value_bytes;
  p.sums_at = p.scales_at + groups * 4;
  p.bytes = round_up(p.sums_at + (p.form == Form::Bytes ? groups * 4 : 0), 64);
  m.data = w.bytes();
  m.rows = w.rows();
  if (is_t16(w.dtype)) {
    p.tiles_at = t16_scale_bytes(p.k, p.group);
    m.panel_stride = t16_panel_bytes(p.dtype, p.k, p.group);
    if (p.form == Form::Bytes && kernels.many[static_cast<int>(p.dtype)].least) m.many = &kernels.many[static_cast<int>(p.dtype)];
    p.unpacked = p.packed = p.kp / p.group * 64 + p.kp * kPanelRows;
  } else {
    m.panel_stride = kPanelRows * w.row_stride * item_bytes(w.dtype);
  }
  return m;
}

}  // namespace cpu
}  // namespace qn
