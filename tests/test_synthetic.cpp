// Files of random weights: nothing repeats, sizes and scales are as designed, and the bytes do not depend on the threads.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <set>

#include "convert/synthetic.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/core/codec.h"
#include "tests/temp_dir.h"

namespace qn {

namespace fs = std::filesystem;
using Values = std::vector<float>;

TEST_CASE("synthetic: the same bytes from any number of threads, nothing twice, sizes as designed") {
  TempDir dir;
  ModelConfig c = synthetic_config("qwen3-next-80b-a3b", 2);
  CHECK(c.kinds == std::vector<int64_t>{0, 0});
  CHECK(synthetic_config("qwen3-next-80b-a3b", 0).layers == 48);
  CHECK(synthetic_config("qwen3-next-80b-a3b", 0).kinds[47] == 1);
  CHECK_THROWS_WITH_AS(synthetic_config("llama", 1), doctest::Contains("qwen3-next-80b-a3b"), Error);
  c.kinds = {0, 1};
  c.width = 96, c.vocab = 6001, c.experts = 24, c.chosen = 2, c.expert_width = 160, c.shared_width = 32, c.heads = 2, c.kv_heads = 1,
  c.head_dim = 64;
  c.key_heads = 1, c.value_heads = 3, c.key_dim = 32, c.value_dim = 32;
  REQUIRE(c.vocab * c.width > kBlockValues);
  SyntheticOptions o;
  for (const DType experts : {DType::INT4, DType::INT8, DType::BF16}) {
    o.convert.recipe = {experts, experts == DType::BF16 ? DType::BF16 : DType::INT8, 0, experts == DType::BF16 ? DType::INT8 : DType::INT4};
    o.convert.threads = 1;
    write_synthetic(c, dir / "a.qn", o);
    o.convert.threads = 3;
    const ConvertReport r = write_synthetic(c, dir / "b.qn", o);
    CHECK(r.file_bytes == fs::file_size(dir / "b.qn"));
    CHECK(file_bytes(dir / "a.qn") == file_bytes(dir / "b.qn"));
    o.seed = 2;
    write_synthetic(c, dir / "b.qn", o);
    o.seed = 1;

    const QnFile f = QnFile::open(dir / "a.qn"), other = QnFile::open(dir / "b.qn");
    std::set<Values> rows;
    size_t count = 0;
    auto matrix = [&](const std::string& name, const Tensor& w, double want_rms, const Tensor& w2) {
      CAPTURE(name);
      double power = 0, mean = 0;
      for (int64_t i = 0; i < w.rows(); i++) {
        Values v(static_cast<size_t>(w.cols())), v2 = v;
        decode_row(w, i, v);
        decode_row(w2, i, v2);
        CHECK(v != v2);
        for (const float x : v) power += static_cast<double>(x) * x, mean += static_cast<double>(x);
        CHECK(rows.insert(v).second);
        count++;
      }
      const double n = static_cast<double>(w.rows() * w.cols()), rms = std::sqrt(power / n);
      CHECK(rms == doctest::Approx(want_rms).epsilon(0.05 + 3 / std::sqrt(n)));
      CHECK(std::fabs(mean / n) < 5 * rms / std::sqrt(n));
    };
    for (const QnTensor& t : f.tensors()) {
      const QnTensor& t2 = *other.find(t.name);
      if (t.experts) {
        const Experts e{f.data(t).data(), t.dtype, t.group, static_cast<int32_t>(t.shape[0]), t.shape[1], t.shape[2]};
        const Experts e2{other.data(t2).data(), t.dtype, t.group, static_cast<int32_t>(t.shape[0]), t.shape[1], t.shape[2]};
        for (int64_t i = 0; i < t.shape[0]; i++) {
          matrix(t.name, e.gate_up(i), 1 / std::sqrt(96.0), e2.gate_up(i));
          matrix(t.name, e.down(i), 0.5 / std::sqrt(160.0), e2.down(i));
        }
      } else if (t.shape.size() == 2 && !t.name.ends_with("conv")) {
        const double k = static_cast<double>(t.shape[1]);
        const double gain = t.name == "embed"          ? std::sqrt(k)
                            : t.name.ends_with("head") ? 2
                            : t.name.ends_with("qkvz") ? 0.3
                            : t.name.ends_with("ba")   ? 0.4
                            : t.name.ends_with("attn.out") || t.name.ends_with("shared_down") || t.name.ends_with("shared_gate") ? 0.5
                                                                                                                                 : 1;
        matrix(t.name, weight(f.data(t).data(), t.dtype, t.shape[0], t.shape[1], t.group), gain / std::sqrt(k),
               weight(other.data(t2).data(), t.dtype, t.shape[0], t.shape[1], t.group));
      } else if (t.name.ends_with("neg_a")) {
        for (int64_t i = 0; i < t.shape[0]; i++) {
          float v;
          std::memcpy(&v, f.data(t).data() + 4 * i, 4);
          CHECK((v <= -1 && v >= -16));
        }
      } else if (t.name.ends_with("dt_bias")) {
        for (int64_t i = 0; i < t.shape[0]; i++) {
          float v;
          std::memcpy(&v, f.data(t).data() + 4 * i, 4);
          CHECK((std::log1p(std::exp(v)) >= 0.00099f && std::log1p(std::exp(v)) <= 0.1001f));
        }
      }
    }
    CHECK(f.find("mtp.head")->dtype == draft_format(o.convert.recipe, f.find("mtp.head")->shape[0], f.find("mtp.head")->shape[1]));
    CHECK(rows.size() == count);
    CHECK(count > 3 * 24 * (2 * 160 + 96));

    // What pads K and N to whole tiles means zero: the encoder's view of a panel, decoded and encoded again, keeps it.
    for (const QnTensor& t : f.tensors()) {
      if (t.experts || !is_t16(t.dtype)) continue;
      const int64_t n = t.shape[0], k = t.shape[1], kp = round_up(k, kPadK), panel = t16_panel_bytes(t.dtype, k, t.group);
      std::vector<uint8_t> codes(static_cast<size_t>(16 * kp));
      std::vector<uint16_t> scales(static_cast<size_t>(kp / t.group * 16));
      uint64_t bad = 0;
      for (int64_t p = 0; p < t16_panels(n); p++) {
        read_panel(t.dtype, k, t.group, f.data(t).data() + p * panel, codes.data(), scales.data());
        for (int64_t r = 0; r < 16; r++) {
          for (int64_t j = 0; j < kp; j++) {
            const bool pad = p * 16 + r >= n || j >= k;
            bad += pad ? codes[static_cast<size_t>(r * kp + j)] != code_zero(t.dtype) : codes[static_cast<size_t>(r * kp + j)] == 0;
          }
        }
      }
      CHECK(bad == 0);
    }
    f.verify(1);
  }
}

}  // namespace qn
