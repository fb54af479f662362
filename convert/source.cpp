#include "convert/source.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "ggml-lite/base/check.h"

namespace qn {

namespace {

constexpr int64_t kBlock = 128;  // FP8 scales: one per 128 x 128 values

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

std::string scale_name(const std::string& weight) { return weight + "_scale_inv"; }

int64_t item_size(const std::string& dtype) { return dtype == "F32" ? 4 : dtype == "F8_E4M3" ? 1 : 2; }

// Layouts of other programs, by a part of a tensor name that only they use.
void refuse_other_layouts(const std::string& folder, const SafeTensors& tensors) {
  struct Sign {
    const char *part, *what;
  };
  static const Sign signs[] = {
      {".switch_mlp.", "an MLX checkpoint"},
      {".in_proj_qkv.", "a Qwen3.5 checkpoint (another model)"},
      {".in_proj_z.", "a Qwen3.5 checkpoint (another model)"},
      {"language_model.", "a multimodal checkpoint (another model)"},
      {"eh_proj", "a Megatron checkpoint"},
      {"self_attention.linear_qkv", "a Megatron checkpoint"},
      {".linear_fc1.", "a Megatron checkpoint"},
      {".qweight", "a GPTQ or AWQ checkpoint"},
      {".weight_packed", "a compressed-tensors checkpoint"},
      {".lora_A.", "a LoRA adapter"},
  };
  for (const auto& [name, t] : tensors.tensors()) {
    for (const Sign& s : signs) {
      if (name.find(s.part) == std::string::npos) continue;
      fail("%s: this is %s (tensor %s); expected the layout of the published BF16 or FP8 checkpoints: convert those", folder.c_str(),
           s.what, name.c_str());
    }
    if (name.ends_with("conv1d.weight") && t.shape.size() == 3 && t.shape[1] == 4 && t.shape[2] == 1) {
      fail(
          "%s: this is an MLX checkpoint (tensor %s has shape %s); expected the layout of the published BF16 or FP8 checkpoints: convert "
          "those",
          folder.c_str(), name.c_str(), shape_text(t.shape).c_str());
    }
  }
}

// The complaints about a checkpoint. Lines that differ only in the number of an expert become one:
// "missing model.layers.3.mlp.experts.{0..6,8..511}.up_proj.weight [512, 2048]".
class Complaints {
 public:
  uint64_t missing = 0, unexpected = 0, misshapen = 0;
  std::string first;

  void add(uint64_t& counter, const std::string& line) {
    if (first.empty()) first = line;
    counter++;
    static const std::string mark = ".experts.";
    const size_t at = line.find(mark), begin = at == line.npos ? line.size() : at + mark.size();
    size_t end = begin;
    while (end < line.size() && line[end] >= '0' && line[end] <= '9') end++;
    const bool plain = end == begin || end - begin > 9 || (line[begin] == '0' && end - begin > 1);  // no expert's number
    const std::string head = plain ? line : line.substr(0, begin), tail = plain ? "" : line.substr(end);
    const auto [known, fresh] = places_.emplace(head + '\n' + tail, lines_.size());  // no line holds a '\n'
    if (fresh) lines_.push_back({head, tail, {}});
    if (!plain) lines_[known->second].experts.push_back(std::stoi(line.substr(begin, end - begin)));
  }

  void tell(const Notice& notice) {
    constexpr size_t kMost = 20;
    for (size_t n = 0; n < std::min(lines_.size(), kMost); n++) {
      Line& l = lines_[n];
      std::vector<int>& e = l.experts;
      std::sort(e.begin(), e.end());
      std::string runs;
      for (size_t i = 0, j; i < e.size(); i = j) {
        for (j = i + 1; j < e.size() && e[j] == e[j - 1] + 1;) j++;
        runs += (i ? "," : "") + std::to_string(e[i]) + (j > i + 1 ? ".." + std::to_string(e[j - 1]) : "");
      }
      notice(l.head + (e.size() > 1 ? "{" + runs + "}" : runs) + l.tail);
    }
    if (lines_.size() > kMost) notice(format("and %zu more like these", lines_.size() - kMost));
  }

 private:
  struct Line {
    std::string head, tail;    // around the number
    std::vector<int> experts;  // empty: the line is `head`
  };
  std::vector<Line> lines_;
  std::unordered_map<std::string, size_t> places_;  // in lines_
};

}  // namespace

float e4m3_to_float(uint8_t code) {
  const int e = (code >> 3) & 15, m = code & 7;
  if (e == 15 && m == 7) return std::nanf("");
  const float v = e == 0 ? std::ldexp(static_cast<float>(m), -9) : std::ldexp(static_cast<float>(8 + m), e - 10);
  return code & 0x80 ? -v : v;
}

Checkpoint::Checkpoint(const std::string& folder) : folder_(folder), tensors_(SafeTensors::open_folder(folder)) {
  refuse_other_layouts(folder, tensors_);
}

bool Checkpoint::has_mtp() const {
  const auto at = tensors_.tensors().lower_bound("mtp.");
  return at != tensors_.tensors().end() && at->first.rfind("mtp.", 0) == 0;
}

bool Checkpoint::is_fp8(const std::string& name) const {
  const SafeTensor* t = tensors_.find(name);
  return t && t->dtype == "F8_E4M3";
}

void Checkpoint::check(const std::vector<Target>& layout, const ModelConfig& c, bool mtp, const Notice& notice) const {
  Complaints bad;
  std::unordered_set<std::string> used;
  for_each_source(layout, [&](const SourceTensor& s) {
    const SafeTensor* t = tensors_.find(s.name);
    if (!used.insert(s.name).second) return;
    if (!t) return bad.add(bad.missing, format("missing %s %s", s.name.c_str(), shape_text(s.shape).c_str()));
    if (t->shape != s.shape) {
      bad.add(bad.misshapen,
              format("misshapen %s: expected %s, got %s", s.name.c_str(), shape_text(s.shape).c_str(), shape_text(t->shape).c_str()));
    } else if (t->dtype == "F8_E4M3") {
      const SafeTensor* scale = tensors_.find(scale_name(s.name));
      const bool matrix = s.shape.size() == 2;
      const std::vector<int64_t> want =
          matrix ? std::vector<int64_t>{(s.shape[0] + kBlock - 1) / kBlock, (s.shape[1] + kBlock - 1) / kBlock} : s.shape;
      if (!matrix) {
        bad.add(bad.misshapen, format("misshapen %s: F8_E4M3 is read for matrices of two dims only", s.name.c_str()));
      } else if (!scale) {
        bad.add(bad.missing, format("missing %s %s (its weight is F8_E4M3)", scale_name(s.name).c_str(), shape_text(want).c_str()));
      } else if (scale->shape != want || (scale->dtype != "F32" && scale->dtype != "BF16")) {
        bad.add(bad.misshapen, format("misshapen %s: expected F32 or BF16 %s, got %s %s", scale_name(s.name).c_str(),
                                      shape_text(want).c_str(), scale->dtype.c_str(), shape_text(scale->shape).c_str()));
      }
      used.insert(scale_name(s.name));
    } else if (t->dtype != "BF16" && t->dtype != "F32" && t->dtype != "F16") {
      bad.add(bad.misshapen, format("misshapen %s: expected BF16, F32, F16 or F8_E4M3 values, got %s", s.name.c_str(), t->dtype.c_str()));
    }
  });
  for (const auto& [name, t] : tensors_.tensors()) {
    if (used.count(name) || (!mtp && name.rfind("mtp.", 0) == 0)) continue;
    if (c.tied && name == "lm_head.weight") continue;  // tied: never read, whatever it holds
    bad.add(bad.unexpected, format("unexpected %s %s", name.c_str(), shape_text(t.shape).c_str()));
  }
  if (bad.first.empty()) return;
  bad.tell(notice);
  fail("%s: the tensors do not fit config.json: %llu missing, %llu unexpected, %llu misshapen; first: %s", folder_.c_str(),
       (unsigned long long)bad.missing, (unsigned long long)bad.unexpected, (unsigned long long)bad.misshapen, bad.first.c_str());
}

// Source rows [begin, begin + count) go to out rows at, at + 1, ...; with run > 0, `run` rows are followed by a gap of `run`.
struct Checkpoint::Rows {
  int64_t begin, count, at, run;
  int64_t place(int64_t i) const { return run ? at + i / run * 2 * run + i % run : at + i; }
};

void Checkpoint::read_rows(const SourceTensor& s, int64_t cols, const Rows& rows, std::span<float> out, ReadBuffers& buffers) const {
  const SafeTensor* t = tensors_.find(s.name);
  QN_CHECK(t, "%s was not checked", s.name.c_str());
  const int64_t size = item_size(t->dtype), row_bytes = cols * size;
  const uint64_t begin = static_cast<uint64_t>(rows.begin * row_bytes), bytes = static_cast<uint64_t>(rows.count * row_bytes);
  if (buffers.raw.size() < bytes) buffers.raw.resize(bytes);
  tensors_.read(*t, begin, {buffers.raw.data(), bytes});
  tensors_.files()[t->file].drop_cache(t->offset + begin, bytes);

  int64_t scale_row = 0;
  const int64_t scale_cols = (cols + kBlock - 1) / kBlock;
  const bool fp8 = t->dtype == "F8_E4M3";
  if (fp8) {
    const SafeTensor* scale = tensors_.find(scale_name(s.name));
    scale_row = rows.begin / kBlock;
    const int64_t n = ((rows.begin + rows.count - 1) / kBlock - scale_row + 1) * scale_cols;
    std::vector<uint8_t> raw(static_cast<size_t>(n * item_size(scale->dtype)));
    tensors_.read(*scale, static_cast<uint64_t>(scale_row * scale_cols * item_size(scale->dtype)), raw);
    buffers.scales.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i++) {
      if (scale->dtype == "F32") {
        std::memcpy(&buffers.scales[i], raw.data() + 4 * i, 4);
      } else {
        uint16_t h;
        std::memcpy(&h, raw.data() + 2 * i, 2);
        buffers.scales[i] = bf16_to_float(h);
      }
    }
  }
  static const std::array<float, 256> e4m3 = [] {
    std::array<float, 256> a;
    for (int i = 0; i < 256; i++) a[i] = e4m3_to_float(static_cast<uint8_t>(i));
    return a;
  }();

  for (int64_t i = 0; i < rows.count; i++) {
    const uint8_t* from = buffers.raw.data() + i * row_bytes;
    float* to = out.data() + rows.place(i) * cols;
    if (fp8) {
      const float* scale = buffers.scales.data() + ((rows.begin + i) / kBlock - scale_row) * scale_cols;
      for (int64_t j = 0; j < cols; j++) to[j] = round_bf16(e4m3[from[j]] * scale[j / kBlock]);
    } else if (t->dtype == "F32") {
      std::memcpy(to, from, static_cast<size_t>(row_bytes));
    } else {
      const bool half = t->dtype == "F16";
      for (int64_t j = 0; j < cols; j++) {
        uint16_t h;
        std::memcpy(&h, from + 2 * j, 2);
        to[j] = half ? half_to_float(h) : bf16_to_float(h);
      }
    }
    uint32_t bad = 0;  // an exponent of all ones: infinite or NaN
    for (int64_t j = 0; j < cols; j++) bad |= (float_to_bits(to[j]) & 0x7f800000u) == 0x7f800000u;
    if (bad) fail("%s: tensor %s: row %lld holds a value that is not finite", folder_.c_str(), s.name.c_str(), (long long)(rows.begin + i));
  }
}

void Checkpoint::read(const Matrix& m, int64_t begin, int64_t n, std::span<float> out, ReadBuffers& buffers) const {
  QN_CHECK(begin >= 0 && n > 0 && begin + n <= m.rows && static_cast<int64_t>(out.size()) == n * m.cols,
           "%s: rows %lld + %lld of %lld into %zu values", m.name.c_str(), (long long)begin, (long long)n, (long long)m.rows, out.size());
  if (m.interleaved) {
    QN_CHECK(begin % 16 == 0 && n % 16 == 0 && m.order.size() == 2, "%s: rows %lld + %lld cut a panel", m.name.c_str(), (long long)begin,
             (long long)n);
    for (int half = 0; half < 2; half++) {
      const RowRun& r = m.order[half];
      read_rows(m.from[r.from], m.cols, {r.begin + begin / 2, n / 2, 8 * half, 8}, out, buffers);
    }
  } else {
    int64_t at = 0;  // stored row at which the run begins
    for (const RowRun& r : m.order) {
      const int64_t lo = std::max(begin, at), hi = std::min(begin + n, at + r.count);
      if (lo < hi) read_rows(m.from[r.from], m.cols, {r.begin + lo - at, hi - lo, lo - begin, 0}, out, buffers);
      at += r.count;
    }
  }
  if (m.fold == Fold::None) return;
  for (float& v : out) {
    v = m.fold == Fold::OnePlus ? 1.0f + v : -std::exp(v);
    if (!std::isfinite(v)) fail("%s: tensor %s: a value is too large", folder_.c_str(), m.from[0].name.c_str());
  }
}

}  // namespace qn
