// Random numbers: word p of matrix m is mix(place of m + p + seed), a bijection of a counter that no two words of a file share.
// So no row, no expert and no tile repeats, and any thread can make any word.
//
// Sizes of the weights. Three things are wanted: activations of normal size through 48 layers, no expert that is chosen much more
// often than others, and tokens whose paths depend on their context.
//   - A matrix with K columns has weights of standard deviation gain / sqrt(K): it turns an input of rms 1 into one of rms `gain`.
//   - The embedding has rms 1. Each block adds 0.1 to 0.2 to the residual, so that after 48 layers its rms is about 1.8 and a
//     third of its power still the token's own: growth as in GPT-2's initialisation rather than doubling per layer.
//   - Routing. With router rows of equal length and inputs in random directions, a token's 512 logits are independent normal
//     numbers and every expert gets its share. A direction common to all tokens with a share r of the input's power shifts the
//     logit of every expert by a constant of standard deviation sqrt(r); the threshold for 10 of 512 is 2.06, so r = 0.05 makes the
//     busiest expert 4 times as busy as the mean, r = 0.01 twice, r = 0.005 1.7 times. Common directions come from what has a mean:
//     silu. A silu of inputs with deviation s has the share s^2/4 of its power in its mean (12 % at s = 1, 2 % at 0.3). Hence the
//     gain of 0.3 for q, k, v and z of the delta rule: its output is (state) * silu(z), so 2 % of it is common at the very most.
//     An expert's silu(gate) * up has no mean, because up has none. Measured on 8 layers and the MTP layer with 10,000 random
//     tokens: every expert is chosen 129 to 270 times, 195 on average; the common share of the residual is below 0.0002.
//   - Decay: A in [1, 16], time step from 0.001 to 0.1 as in Mamba: memories from one token to a thousand.
#include "convert/synthetic.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>

#include "ggml-lite/base/check.h"

namespace qn {

namespace {

using Clock = std::chrono::steady_clock;

// splitmix64: the golden-ratio step makes counters far apart, the mixer is a bijection of 64 bits.
inline uint64_t random_word(uint64_t counter) {
  uint64_t x = counter * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

inline double unit(uint64_t word) { return (static_cast<double>(word >> 11) + 0.5) * 0x1p-53; }  // (0, 1)

// The normal distribution in 4096 equal steps of probability: element i is its quantile at (i + 0.5) / 4096.
constexpr int kQuantiles = 4096;
const std::array<float, kQuantiles>& normal_quantiles() {
  static const std::array<float, kQuantiles> table = [] {
    std::array<float, kQuantiles> t;
    double x = 0, power = 0;
    for (int i = kQuantiles / 2; i < kQuantiles; i++) {
      const double p = (i + 0.5) / kQuantiles;
      for (int round = 0; round < 30; round++) {  // Newton from the left: the distribution is concave here
        x -= (0.5 * std::erfc(-x / std::sqrt(2.0)) - p) * std::sqrt(2 * M_PI) * std::exp(x * x / 2);
      }
      t[i] = static_cast<float>(x), t[kQuantiles - 1 - i] = static_cast<float>(-x);
      power += 2 * x * x / kQuantiles;
    }
    for (float& v : t) v = static_cast<float>(v / std::sqrt(power));
    return t;
  }();
  return table;
}

// rms of the output for an input of rms 1.
double gain(const std::string& name) {
  static const std::pair<const char*, double> gains[] = {
      {"delta.qkvz", 0.3}, {"delta.ba", 0.4},        {"delta.conv", 1},     {"delta.out", 1},     {"attn.qgkv", 1},   {"attn.out", 0.5},
      {"moe.router", 1},   {"moe.shared_gate", 0.5}, {"shared_gate_up", 1}, {"shared_down", 0.5}, {"moe.experts", 1}, {"mtp.fc", 1},
      {"head", 2},
  };
  for (const auto& [part, g] : gains) {
    if (name.ends_with(part)) return g;
  }
  fail("%s: no size is known for this tensor", name.c_str());
}

double deviation(const Matrix& m, bool expert_down) {
  if (m.name == "embed") return 1;
  return (expert_down ? 0.5 : gain(m.name)) / std::sqrt(static_cast<double>(m.cols));
}

// F32 vectors: norms near 1, and the parameters of the decay.
float vector_value(const std::string& name, double u) {
  if (name.ends_with("delta.neg_a")) return static_cast<float>(-(1 + 15 * u));
  if (name.ends_with("delta.dt_bias"))
    return static_cast<float>(std::log(std::expm1(0.001 * std::pow(100.0, u))));  // softplus of it: 0.001 to 0.1
  return static_cast<float>(0.9 + 0.2 * u);
}

void fill_f32(const RowJob& job, uint64_t base) {
  for (int64_t i = 0; i < job.n * job.matrix.cols; i++) {
    const float v = vector_value(job.matrix.name, unit(random_word(base + job.begin * job.matrix.cols + i)));
    std::memcpy(job.to.data() + 4 * i, &v, 4);
  }
}

// Four values from a word; a row begins a new word.
void fill_bf16(const RowJob& job, uint64_t base, double std_dev) {
  std::array<uint16_t, kQuantiles> values;
  for (int i = 0; i < kQuantiles; i++) values[i] = float_to_bf16(static_cast<float>(normal_quantiles()[i] * std_dev));
  const int64_t cols = job.matrix.cols, words = (cols + 3) / 4;
  for (int64_t r = 0; r < job.n; r++) {
    uint8_t* to = job.to.data() + r * cols * 2;
    const uint64_t counter = base + static_cast<uint64_t>((job.begin + r) * words);
    for (int64_t w = 0; w < words; w++) {
      const uint64_t x = random_word(counter + static_cast<uint64_t>(w));
      const uint16_t four[4] = {values[x & 4095], values[x >> 16 & 4095], values[x >> 32 & 4095], values[x >> 48 & 4095]};
      std::memcpy(to + 8 * w, four, static_cast<size_t>(2 * std::min<int64_t>(4, cols - 4 * w)));
    }
  }
}

// Codes of T16 as random bytes: INT4 uniform in 1..15 with 0 (which stands for -8) turned into 8, INT8 uniform in 1..255 with 0
// turned into 128: no mean. Scales: a fixed size times 0.75 to 1.25.
void fill_t16(const RowJob& job, uint64_t base, double std_dev) {
  const Matrix& m = job.matrix;
  const bool four = m.dtype == DType::INT4;
  const double code_dev = four ? std::sqrt(280.0 / 16) : std::sqrt(127.0 * 128 * 255 / 3 / 256);
  uint16_t scales[256];
  for (int i = 0; i < 256; i++) scales[i] = float_to_half(static_cast<float>(std_dev / code_dev * (0.75 + i / 510.0)));

  const int64_t kp = round_up(m.cols, kPadK), scale_count = kp / m.group * kPanelRows, tile_words = kp / tile_k(m.dtype) * kTileBytes / 8;
  const int64_t scale_words = scale_count / 8, panel_bytes = t16_panel_bytes(m.dtype, m.cols, m.group);
  const uint64_t low = four ? 0x1111111111111111ull : 0x0101010101010101ull;
  for (int64_t p = 0; p < t16_panels(job.n); p++) {
    uint8_t* panel = job.to.data() + p * panel_bytes;
    const uint64_t counter = base + static_cast<uint64_t>((job.begin / kPanelRows + p) * (scale_words + tile_words));
    const int64_t real_rows = std::min<int64_t>(kPanelRows, job.n - p * kPanelRows);
    for (int64_t w = 0; w < scale_words; w++) {
      const uint64_t x = random_word(counter + static_cast<uint64_t>(w));
      uint16_t eight[8];
      for (int64_t i = 0; i < 8; i++) {
        const int64_t group = (8 * w + i) / kPanelRows, row = (8 * w + i) % kPanelRows;
        eight[i] = group * m.group < m.cols && row < real_rows ? scales[x >> (8 * i) & 255] : 0;
      }
      std::memcpy(panel + 16 * w, eight, 16);
    }
    uint8_t* tiles = panel + t16_scale_bytes(m.cols, m.group);
    for (int64_t w = 0; w < tile_words; w++) {
      uint64_t x = random_word(counter + static_cast<uint64_t>(scale_words + w));
      uint64_t any = x | x >> 1;
      any |= any >> 2;
      if (!four) any |= any >> 4;
      x |= (~any & low) << (four ? 3 : 7);
      std::memcpy(tiles + 8 * w, &x, 8);
    }
    if (kp == m.cols && real_rows == kPanelRows) continue;
    for (int r = 0; r < kPanelRows; r++) {  // padding means zero
      for (int64_t k = r < real_rows ? m.cols : 0; k < kp; k++) {
        uint8_t* tile = tiles + k / tile_k(m.dtype) * kTileBytes;
        const int in = static_cast<int>(k % tile_k(m.dtype));
        if (four) {
          uint8_t& byte = tile[int4_byte(r, in)];
          byte = static_cast<uint8_t>((byte & (0xf0 >> int4_shift(in))) | 8 << int4_shift(in));
        } else {
          tile[int8_byte(r, in)] = 128;
        }
      }
    }
  }
}

}  // namespace

ModelConfig synthetic_config(const std::string& model, int64_t layers) {
  if (model != "qwen3-next-80b-a3b") fail("--synthetic %s: expected qwen3-next-80b-a3b", model.c_str());
  if (layers < 0 || layers > 256) fail("--layers %lld: expected 1 to 256", (long long)layers);
  ModelConfig c;
  c.layers = layers ? layers : 48;
  c.width = 2048, c.vocab = 151936, c.context = 262144;
  for (int64_t i = 0; i < c.layers; i++) c.kinds.push_back((i + 1) % 4 == 0);
  c.heads = 16, c.kv_heads = 2, c.head_dim = 256, c.rotary_dim = 64;
  c.theta = 1e7, c.yarn_original = c.context;
  c.key_heads = 16, c.value_heads = 32, c.key_dim = 128, c.value_dim = 128;
  c.experts = 512, c.chosen = 10, c.expert_width = 512, c.shared_width = 512;
  c.end_tokens = {151645, 151643};
  return c;
}

ConvertReport write_synthetic(const ModelConfig& c, const std::string& out, const SyntheticOptions& options, const Progress& progress) {
  const auto start = Clock::now();
  LayoutOptions wanted;
  wanted.recipe = options.convert.recipe;
  wanted.mtp = options.convert.mtp;
  const std::vector<Target> layout = model_layout(c, wanted);
  TextSetup text;
  if (options.tokenizer.empty()) {
    text.meta = {{"general.chat", std::string("none")}, {"general.template_fingerprint", std::string()}, {"token.end", c.end_tokens}};
  } else {
    text = read_text_setup(options.tokenizer, c.vocab, c.end_tokens, options.convert.chat, options.convert.notice);
  }

  QnWriter writer(out);
  write_meta(writer, c, text, {{"general.name", options.name}, {"general.source", std::string("synthetic: random weights")}}, layout,
             wanted);
  const uint64_t seed = random_word(options.seed);
  auto encode = [&](const RowJob& job) {
    const uint64_t base = seed + job.place;
    const Matrix& m = job.matrix;
    if (m.dtype == DType::F32) return fill_f32(job, base);
    const double std_dev = deviation(m, m.name.ends_with("moe.experts") && !m.interleaved && m.order.size() == 1);
    if (is_t16(m.dtype)) return fill_t16(job, base, std_dev);
    fill_bf16(job, base, std_dev);
  };
  ConvertReport report;
  report.lines = write_model(writer, out, layout, text, options.convert.threads, encode, progress);
  report.file_bytes = writer.total_bytes();
  writer.finish();
  report.mtp = wanted.mtp;
  report.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return report;
}

}  // namespace qn
