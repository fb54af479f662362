// The fast CPU device: own thread pool, AVX-512 (VNNI, BF16 if there), AVX2 or scalar kernels chosen at run time.
#pragma once
#include <memory>
#include <string>

#include "ggml-lite/base/threads.h"
#include "ggml-lite/core/device.h"

namespace qn {

enum class Isa { Auto, Scalar, Avx2, Avx512 };  // Avx512 needs F, BW, VL, DQ, VNNI; each level includes those below

// threads <= 0: default_threads(). `isa` above what the machine has throws Error.
// spin_microseconds: how long threads look out for the next operation before they sleep.
std::unique_ptr<Device> make_cpu_device(int threads, Isa isa = Isa::Auto, int spin_microseconds = Threads::kSpin);
bool isa_available(Isa isa);
Isa isa_named(const std::string& name);  // "scalar", "avx2", "avx512"; all else is Auto

// Bytes per second that `threads` threads read from memory (sum over a buffer larger than every cache, best of a few runs).
// The buffer takes at most `most` bytes, and a quarter of what may be used; 0 when that is less than kLeastRead, which caches might hold.
constexpr uint64_t kLeastRead = uint64_t{64} << 20;
double cpu_read_bandwidth(int threads, uint64_t most = uint64_t{1} << 30);

// Multiplications and additions of int8 codes a second that `threads` threads do in registers, by the instructions this machine has for them
// (INT8 and INT4 weights); 0: not known. Best of a few runs.
double cpu_peak(int threads, Isa isa = Isa::Auto);

// How many threads to use, where nobody says: as many as there are physical cores, unless all hardware threads read memory by a tenth faster.
// Reads half a gigabyte a few times; call it when many will be read.
int probe_threads();

}  // namespace qn
