// A fault of a GPU in the midst of an answer, for tests/gpu.sh. Loaded into a program that knows nothing of it:
//
//   QNEXT_FAULT=1:answer LD_PRELOAD=libqnext-fault.so qnext-cli --device cuda:0,1 -m model.qn -p ... >answer
//
// waits until the file has bytes, then executes a trap on GPU 1 in the program's own context, as a wrong address in a kernel would.
// The driver's interface by hand, so that the tests need neither nvcc nor a GPU to be built.
#include <dlfcn.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

namespace {

constexpr const char* kTrap = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry fault() { trap; }\n";

template <class Call, class... Args>
bool call(void* driver, const char* name, Args... args) {
  const auto f = reinterpret_cast<Call>(dlsym(driver, name));
  const int code = f ? f(args...) : -1;
  if (code != 0) std::fprintf(stderr, "fault: %s: %d\n", name, code);
  return code == 0;
}

void wait_and_trap(int ordinal, const std::string& file) {
  for (struct stat s {}; stat(file.c_str(), &s) != 0 || s.st_size == 0;) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (!driver) return;
  int device = 0;
  void *context = nullptr, *code = nullptr, *function = nullptr;
  using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  const bool done = call<int (*)(int*, int)>(driver, "cuDeviceGet", &device, ordinal) &&
                    call<int (*)(void**, int)>(driver, "cuDevicePrimaryCtxRetain", &context, device) &&
                    call<int (*)(void*)>(driver, "cuCtxSetCurrent", context) &&
                    call<int (*)(void**, const void*)>(driver, "cuModuleLoadData", &code, static_cast<const void*>(kTrap)) &&
                    call<int (*)(void**, void*, const char*)>(driver, "cuModuleGetFunction", &function, code, "fault") &&
                    call<Launch>(driver, "cuLaunchKernel", function, 1u, 1u, 1u, 1u, 1u, 1u, 0u, nullptr, nullptr, nullptr);
  if (done) std::fprintf(stderr, "fault: trap on GPU %d\n", ordinal);
}

const bool started = [] {
  const char* where = std::getenv("QNEXT_FAULT");
  const std::string s = where ? where : "";
  if (const size_t colon = s.find(':'); colon != s.npos) std::thread(wait_and_trap, std::atoi(s.c_str()), s.substr(colon + 1)).detach();
  return true;
}();

}  // namespace
