// How fast a plan will be, from bandwidths measured now: a pure function. What is assumed besides was measured (one H100, 16 cores of a Xeon):
//
//   decode   a GPU reads at 0.87 of what a plain read does, of which more than 3.05 TB/s do not help (an H200 is no faster than an H100), and an
//            operation takes 2.3 us besides; a CPU reads at 0.7 of that
//            experts that are not on the GPU, in every layer: the host reads at 0.65 of that and the bus at its own pace, at the same time;
//            0.35 of what the host reads it reads ahead, in at most 0.8 of the time in which the device computes;
//            17 us for the request and its answer; those that memory does not hold come from the disk first, as they do to a CPU alone
//   prefill  a GPU computes as many tokens a second as it reads 90 MB of; all records without a slot come over the bus once a pass, while
//            the layers before compute, at 8 GB/s from memory that is not pinned; a CPU does 22 tokens a second and thread
//
// Routing is taken to be uniform: real text uses the same experts again and misses less. Tokens/s.
#pragma once
#include <cstdint>
#include <span>
#include <string>

namespace qn {

struct Speeds {  // bytes per second
  double gpu = 0, bus = 0, host = 0, disk = 0;
};
struct HostPlan {  // of what the host does
  int threads = 1;
  bool pinned = true;            // GPUs can read experts that they have no slot for
  double from_disk = 0;          // of such experts, how many there is no memory for
};
struct ForecastPart {  // of one device
  bool gpu = false;
  int layers = 0, operations = 0;
  uint64_t rest_bytes = 0;       // read for a token beside routed experts: weights, state
  uint64_t record_bytes = 0;     // of one expert
  int experts = 0, chosen = 0;
  int slots = 0;                 // 0: all experts are on the device
  int fetch_percent = 0;
  double work = 1;               // of a token in a layer, in that of kReferenceLayer
};
constexpr int kReferenceLayers = 48;                      // what prefill was measured with:
constexpr double kReferenceLayer = (10 * 512 + 512.0) * 2048;  // (chosen experts and the shared one, their width) x width of the model
struct Forecast {
  double decode = 0;              // at short depth
  double prefill[2] = {};         // of prompts of 2048 and 8192 tokens
  double bound = 0;               // tokens/s when nothing waits: of every layer the longer of missing experts at the speed of the host and the others at
                                  // that of the device, then all else at that of the device
  double misses = 0;              // experts of a token and layer that are not on the device
  double seconds[3] = {};         // of a token: device, bus, host; the latter two overlap
  double stream = 0;              // seconds that what is not on a device takes to come there, for a pass of a prompt
};
// What else could be chosen, and the text that says so when it makes decoding at least 3 % faster: an INT8 cache, a context of 8192, a file with
// INT8 rest; each frees memory for slots.
struct Choices {
  uint64_t kv_bytes = 0;
  int ctx = 0;
  bool bf16_cache = false, bf16_rest = false;
};
std::string best_change(std::span<const ForecastPart> parts, int ubatch, const HostPlan& host, const Speeds& speeds, const Choices& now);
Forecast forecast(std::span<const ForecastPart> parts, int ubatch, const HostPlan& host, const Speeds& speeds);

}  // namespace qn
