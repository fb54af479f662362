// Micro-benchmark of the CPU device at the shapes of the 80B model: bytes that must be read (and written) per second, and their
// share of what the same threads read from memory in a plain loop; GFLOP/s, and their share of what products of int8 codes do in
// registers. Weights of an operation exist in as many copies as it takes to be larger than every cache. Not a test: run by hand,
// e.g.   bench_ops 2 avx512 1,4,64
// Of a GPU (bench_ops cuda 0): what a product of few tokens takes in a row of such products, which is how a token comes about: by how many rows it
// has, with weights from memory and with the same ones again, from the L2 cache. What is left at no rows is the price of a kernel.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <vector>

#include "cuda/cuda.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/cpu/cpu.h"

namespace {

using namespace qn;

constexpr int64_t kCold = int64_t{768} << 20;  // bytes of copies of one operation's weights: more than caches hold
uint64_t noise = 88172645463325252ull;
uint64_t draw() { return noise ^= noise << 13, noise ^= noise >> 7, noise ^= noise << 17; }

Tensor floats(std::vector<Buffer>& keep, Device& d, int64_t d0, int64_t d1 = 0, int64_t d2 = 0) {
  keep.push_back(d.alloc(static_cast<size_t>(d0 * std::max<int64_t>(1, d1) * std::max<int64_t>(1, d2) * 4), "bench"));
  Tensor t = view(keep.back().data(), DType::F32, d0, d1, d2);
  for (size_t i = 0; i < keep.back().bytes() / 4; i++) t.f32()[i] = static_cast<float>(static_cast<int64_t>(draw() % 2001) - 1000) * 1e-3f;
  return t;
}

void fill_weights(uint8_t* p, DType type, int64_t n, int64_t k, int group) {
  const int64_t bytes = weight_bytes(type, n, k, group);
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t v = draw();
    if (type == DType::BF16) v = (v & 0x807f807f807f807full) | 0x3c003c003c003c00ull;
    std::memcpy(p + i, &v, 8);
  }
  if (!is_t16(type)) return;
  const uint16_t scale = float_to_half(0.01f);
  for (int64_t panel = 0; panel < t16_panels(n); panel++)
    for (int64_t i = 0; i < t16_scale_bytes(k, group); i += 2) std::memcpy(p + panel * t16_panel_bytes(type, k, group) + i, &scale, 2);
}

struct Format {
  DType type;
  int group;
};

struct Benchmark {
  Device& d;
  double bandwidth, peak;
  Act act;
  double layer_ms = 0;  // summed by token()

  // `products`: multiplications and additions of a token. Runs op(copy) over all copies until 0.4 s have gone; prints and returns milliseconds per call of the best round.
  double time(const char* name, int64_t tokens, double bytes, double products, int copies, const std::function<void(int)>& op) {
    double best = 1e30, spent = 0;
    for (int round = 0; round < 3 || spent < 0.4; round++) {
      const auto start = std::chrono::steady_clock::now();
      for (int c = 0; c < copies; c++) op(c);
      const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      spent += s;
      if (round) best = std::min(best, s / copies);
    }
    const double speed = 2 * products * static_cast<double>(tokens) / best;
    std::printf("%-34s T=%-4lld %9.3f ms %8.2f GB/s %5.0f %%  %8.3f ms/token %8.1f GFLOP/s %5.1f %%\n", name, static_cast<long long>(tokens), best * 1e3, bytes / best / 1e9,
                100 * bytes / best / bandwidth, best * 1e3 / static_cast<double>(tokens), speed / 1e9, peak > 0 ? 100 * speed / peak : 0);
    std::fflush(stdout);
    return best * 1e3;
  }

  double matmul(const char* name, Format f, int64_t t, int64_t n, int64_t k) {
    std::vector<Buffer> keep;
    const int64_t bytes = weight_bytes(f.type, n, k, f.group);
    const int copies = static_cast<int>(std::max<int64_t>(1, kCold / bytes));
    Arena weights(static_cast<size_t>(bytes * copies));
    for (int c = 0; c < copies; c++) fill_weights(weights.data() + c * bytes, f.type, n, k, f.group);
    NormMatmulArgs a;
    a.h = floats(keep, d, t, k), a.norm = floats(keep, d, k), a.act = act, a.y = floats(keep, d, t, n);
    return time(name, t, static_cast<double>(bytes), static_cast<double>(n * k), copies, [&](int c) {
      a.w = weight(weights.data() + c * bytes, f.type, n, k, f.group);
      d.norm_matmul(a);
    });
  }

  double moe(Format f, Format rest, int64_t t) {
    constexpr int64_t e = 512, k = 10, width = 2048, inner = 512;
    const int lists = static_cast<int>(std::max<int64_t>(24, 96 / t));  // of chosen experts: together most of them
    std::vector<Buffer> keep;
    Experts x;
    x.dtype = f.type, x.group = static_cast<uint16_t>(f.group), x.count = e, x.d = width, x.f = inner;
    const ExpertLayout l = x.layout();
    Arena experts(static_cast<size_t>(l.stride * e));
    for (int64_t i = 0; i < e; i++) {
      fill_weights(experts.data() + i * l.stride, f.type, 2 * inner, width, f.group);
      fill_weights(experts.data() + i * l.stride + l.down_offset, f.type, width, inner, f.group);
    }
    x.data = experts.data();
    const int64_t up = weight_bytes(rest.type, 2 * inner, width, rest.group), down = weight_bytes(rest.type, width, inner, rest.group);
    const int64_t router = weight_bytes(DType::BF16, e, width, 0), shared = router + up + down + 64 * 2 * width;
    const int copies = static_cast<int>(kCold / shared);
    Arena dense(static_cast<size_t>(shared * copies));
    for (int c = 0; c < copies; c++) {
      uint8_t* p = dense.data() + c * shared;
      fill_weights(p, DType::BF16, e + 64, width, 0);
      fill_weights(p + router + 128 * width, rest.type, 2 * inner, width, rest.group);
      fill_weights(p + router + 128 * width + up, rest.type, width, inner, rest.group);
    }
    MoeRouterArgs r;
    r.h = floats(keep, d, t, width), r.norm = floats(keep, d, width), r.x = floats(keep, d, t, width), r.logits = floats(keep, d, t, e);
    r.shared = floats(keep, d, t, inner), r.shared_scale = floats(keep, d, t), r.shared_act = act;
    double ms = time("moe_router", t, static_cast<double>(router + up), width * (e + 2 * inner), copies, [&](int c) {
      uint8_t* p = dense.data() + c * shared;
      r.router = weight(p, DType::BF16, e, width), r.shared_gate = weight(p + router, DType::BF16, 1, width);
      r.shared_gate_up = weight(p + router + 128 * width, rest.type, 2 * inner, width, rest.group);
      d.moe_router(r);
    });
    MoeGateUpArgs g;
    g.x = floats(keep, d, t, width), g.act = act, g.experts = x;
    keep.push_back(d.alloc(static_cast<size_t>(t * k * 4), "ids"));
    g.ids = view(keep.back().data(), DType::I32, t, k), g.weights = floats(keep, d, t, k), g.inner = floats(keep, d, t * k, inner);
    std::vector<Tensor> logits;  // other experts every time
    for (int i = 0; i < lists; i++) logits.push_back(floats(keep, d, t, e));
    std::vector<double> touched(static_cast<size_t>(lists));
    double all = 0;
    for (int i = 0; i < lists; i++) {
      g.logits = logits[static_cast<size_t>(i)];
      d.moe_gate_up(g);
      std::vector<bool> seen(e);
      for (int64_t j = 0; j < t * k; j++) seen[static_cast<size_t>(g.ids.i32()[j])] = true;
      for (bool s : seen) touched[static_cast<size_t>(i)] += s;
      all += touched[static_cast<size_t>(i)] / lists;
    }
    ms += time("moe_gate_up", t, all * static_cast<double>(l.down_offset), k * width * 2 * inner, lists, [&](int c) {
      g.logits = logits[static_cast<size_t>(c)];
      d.moe_gate_up(g);
    });
    if (t == 1) {  // as for a token of a layer with experts on a GPU, four of which are missing there
      constexpr int64_t missing = 4;
      ExpertPairsArgs p;
      p.x = g.x, p.y = floats(keep, d, 1, width), p.weight = floats(keep, d, missing), p.act = act, p.experts = x;
      keep.push_back(d.alloc((1 + lists) * missing * 4, "pairs"));
      auto* of = static_cast<int32_t*>(keep.back().data());
      p.token = view(of, DType::I32, missing);
      std::fill_n(of, missing, 0);
      for (int64_t i = missing; i < (1 + lists) * missing; i++) of[i] = static_cast<int32_t>((i * 181 + i / missing * 7) % e);
      time("expert_pairs, 4 experts", t, static_cast<double>(missing * l.bytes), missing * width * 3 * inner, lists, [&](int c) {
        p.expert = view(of + (c + 1) * missing, DType::I32, missing);
        d.expert_pairs(p);
      });
    }
    MoeDownArgs m;
    m.weights = g.weights, m.inner = g.inner, m.act = act, m.experts = x, m.shared = r.shared, m.shared_scale = r.shared_scale, m.shared_act = act;
    m.h = floats(keep, d, t, width);
    std::vector<Tensor> ids;
    for (int i = 0; i < lists; i++) {
      keep.push_back(d.alloc(static_cast<size_t>(t * k * 4), "ids"));
      ids.push_back(view(keep.back().data(), DType::I32, t, k));
      g.logits = logits[static_cast<size_t>(i)], g.ids = ids.back();
      d.moe_gate_up(g);
    }
    return ms + time("moe_down", t, all * static_cast<double>(l.bytes - l.down_offset) + static_cast<double>(down), (k + 1) * width * inner, lists, [&](int c) {
             m.ids = ids[static_cast<size_t>(c)];
             m.shared_down = weight(dense.data() + c % copies * shared + router + 128 * width + up, rest.type, width, inner, rest.group);
             d.moe_down(m);
           });
  }

  double out(const char* name, Format f, int64_t t) {
    constexpr int64_t k = 4096, n = 2048;
    std::vector<Buffer> keep;
    const int64_t bytes = weight_bytes(f.type, n, k, f.group);
    const int copies = static_cast<int>(kCold / bytes);
    Arena weights(static_cast<size_t>(bytes * copies));
    for (int c = 0; c < copies; c++) fill_weights(weights.data() + c * bytes, f.type, n, k, f.group);
    GatedNormMatmulArgs a;
    a.o = floats(keep, d, t, k), a.z = floats(keep, d, t, k), a.norm = floats(keep, d, 128), a.act = act, a.h = floats(keep, d, t, n);
    return time(name, t, static_cast<double>(bytes), static_cast<double>(n * k), copies, [&](int c) {
      a.w = weight(weights.data() + c * bytes, f.type, n, k, f.group);
      d.gated_norm_matmul(a);
    });
  }

  double delta(int64_t t) {
    constexpr int64_t gk = 16, gv = 32, w = 128, ch = 2 * gk * w + gv * w, layers = 36;
    std::vector<Buffer> keep;
    DeltaNetArgs a;
    a.qkv = floats(keep, d, t, ch), a.ba = floats(keep, d, t, 2 * gv), a.conv = floats(keep, d, ch, 4);
    a.neg_a = floats(keep, d, gv), a.dt_bias = floats(keep, d, gv), a.o = floats(keep, d, t, gv * w);
    for (int64_t i = 0; i < gv; i++) a.neg_a.f32()[i] = -0.1f;
    const Tensor state = floats(keep, d, layers * gv, w, w), ring = floats(keep, d, layers * 4, ch);
    const StepParams step{100, static_cast<int32_t>(t)};
    a.key_heads = gk, a.value_heads = gv, a.step = &step;
    return time("delta_net (state read + written)", t, 2.0 * gv * w * w * 4, 4.0 * gv * w * w, layers, [&](int c) {
      a.state = state.slice(c * gv, gv), a.conv_ring = ring.slice(c * 4, 4);
      d.delta_net(a);
    });
  }

  double attention(int64_t t, int64_t context, DType type = DType::BF16) {
    constexpr int64_t heads = 16, kv = 2, w = 256, layers = 12;
    std::vector<Buffer> keep;
    AttentionArgs a;
    a.qgkv = floats(keep, d, t, 2 * (heads + kv) * w), a.q_norm = floats(keep, d, w), a.k_norm = floats(keep, d, w), a.inv_freq = floats(keep, d, 32);
    a.o = floats(keep, d, t, heads * w);
    const int64_t one = kv * context * w * item_bytes(type), scales = kv * context * kv_row_bytes(type, w) - one;
    keep.push_back(d.alloc(static_cast<size_t>(2 * (one + scales) * layers), "cache"));  // scales, of codes, lie behind everything
    uint8_t* cache = static_cast<uint8_t*>(keep.back().data());
    fill_weights(cache, DType::BF16, (one + scales) * layers, 1, 0);
    if (scales) std::fill_n(reinterpret_cast<uint16_t*>(cache + 2 * layers * one), layers * scales, float_to_half(0.01f));
    const StepParams step{static_cast<int32_t>(context - t), static_cast<int32_t>(t)};
    a.heads = heads, a.kv_heads = kv, a.step = &step;
    char name[40];
    std::snprintf(name, sizeof name, "attention at %lld, %s", static_cast<long long>(context), qn::name(type));
    return time(name, t, 2.0 * static_cast<double>(one + scales), 2.0 * static_cast<double>(heads * w * context), layers, [&](int c) {
      a.k_cache = view(cache + 2 * c * one, type, kv, context, w), a.v_cache = view(cache + (2 * c + 1) * one, type, kv, context, w);
      uint8_t* of_codes = cache + 2 * layers * one + 2 * c * scales;
      if (scales) a.k_scales = view(of_codes, DType::F16, kv, context, w / kKvGroup), a.v_scales = view(of_codes + scales, DType::F16, kv, context, w / kKvGroup);
      d.attention(a);
    });
  }

  void token(const char* title, Format rest, int64_t t) {
    std::printf("\n%s, act %s\n", title, name(act));
    const double delta_layer = matmul("norm_matmul qkvz 12288x2048", rest, t, 12288, 2048) + delta(t) + out("gated_norm_matmul 2048x4096", rest, t);
    const double attention_layer = matmul("norm_matmul qgkv 9216x2048", rest, t, 9216, 2048) + attention(t, 4096) + out("gate_matmul (as above) 2048x4096", rest, t);
    attention(t, 4096, DType::I8);
    const double experts = moe({DType::INT4, 128}, rest, t), head = matmul("head 151936x2048", rest, t == 1 ? 1 : std::min<int64_t>(t, 4), 151936, 2048);
    const double ms = 36 * delta_layer + 12 * attention_layer + 48 * experts + head;
    std::printf("%s: whole model T=%lld: %.1f ms, %.2f tok/s\n", title, static_cast<long long>(t), ms, 1e3 * static_cast<double>(t) / ms);
  }
};

int chains_of_products(int index) {
  if (list_cuda_devices().empty()) return std::puts("no GPU was found"), 1;
  const auto d = make_cuda_device(index);
  constexpr int64_t k = 2048, most = 49152;
  OpLimits l;
  l.tokens = 8, l.width = most, l.model_width = k;
  d->reserve(l);
  const double bandwidth = d->read_bandwidth(0);
  std::printf("%s, reads %.0f GB/s; y = W norm(x), K = %lld\n", d->name().c_str(), bandwidth / 1e9, static_cast<long long>(k));
  const std::vector<float> ones(8 * k, 1.f);
  for (const Format f : {Format{DType::INT8, 128}, {DType::BF16, 0}})
    for (int64_t n : {int64_t{2048}, int64_t{4096}, int64_t{12288}, most}) {
      const int64_t bytes = weight_bytes(f.type, n, k, f.group), copies = kCold / bytes;
      const Buffer w = d->alloc(static_cast<size_t>(bytes * copies), "weights"), x = d->alloc(ones.size() * 4, "x"), norm = d->alloc(k * 4, "norm"),
                   y = d->alloc(static_cast<size_t>(8 * n * 4), "y");
      d->upload(x.data(), ones.data(), ones.size() * 4), d->upload(norm.data(), ones.data(), k * 4);
      for (int t : {1, 4})
        for (bool cold : {true, false}) {
          if (!cold && bytes > int64_t{28} << 20) continue;  // no L2 cache holds that
          NormMatmulArgs a;
          a.h = view(x.data(), DType::F32, t, k), a.norm = view(norm.data(), DType::F32, k), a.act = Act::BF16, a.y = view(y.data(), DType::F32, t, n);
          double best = 1e30;
          for (int round = 0; round < 6; round++) {  // as it is, recording, replaying
            d->sync();
            const auto start = std::chrono::steady_clock::now();
            d->recorded(&w, static_cast<uint64_t>(2 * t + cold), [&] {
              for (int64_t c = 0; c < copies; c++)
                a.w = weight(static_cast<uint8_t*>(w.data()) + (cold ? c * bytes : 0), f.type, n, k, f.group), d->norm_matmul(a);
            });
            d->sync();
            const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / static_cast<double>(copies);
            if (round > 1) best = std::min(best, s);
          }
          std::printf("%-5s N=%-6lld T=%d  %-16s %8.2f us %8.0f GB/s %5.0f %%\n", name(f.type), static_cast<long long>(n), t,
                      cold ? "from memory" : "from L2 cache", best * 1e6, static_cast<double>(bytes) / best / 1e9, 100 * static_cast<double>(bytes) / best / bandwidth);
        }
      d->forget(&w);
    }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "cuda") == 0) return chains_of_products(argc > 2 ? std::atoi(argv[2]) : 0);
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::string level = argc > 2 ? argv[2] : "auto";
  std::stringstream list(argc > 3 ? argv[3] : "1");
  const Isa isa = level == "scalar" ? Isa::Scalar : level == "avx2" ? Isa::Avx2 : level == "avx512" ? Isa::Avx512 : Isa::Auto;
  const auto device = make_cpu_device(threads, isa);
  OpLimits l;
  l.tokens = 512, l.width = 4096, l.experts = 512, l.chosen = 10, l.expert_width = 512, l.model_width = 2048;
  l.heads = 16, l.context = 65536, l.value_heads = 32, l.key_heads = 16, l.key_dim = 128, l.value_dim = 128;
  device->reserve(l);
  const double bandwidth = cpu_read_bandwidth(threads), peak = cpu_peak(threads, isa);
  std::printf("%s, reads %.1f GB/s, multiplies and adds int8 codes at %.1f GFLOP/s\n", device->name().c_str(), bandwidth / 1e9, peak / 1e9);
  for (std::string t; std::getline(list, t, ',');) {
    Benchmark b{*device, bandwidth, peak, Act::INT8};
    b.token("INT4 g128 experts, BF16 rest", {DType::BF16, 0}, std::atoi(t.c_str()));
    b.token("INT4 g128 experts, INT8 g128 rest", {DType::INT8, 128}, std::atoi(t.c_str()));
  }
}
