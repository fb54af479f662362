#include "quantize/requantize.h"

#include <algorithm>
#include <atomic>
#include <filesystem>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/base/threads.h"
#include "ggml-lite/core/codec.h"
#include "ggml-lite/core/qn.h"

namespace qn {
namespace {

constexpr uint64_t kChunk = uint64_t{4} << 20;   // bytes read at once
constexpr uint64_t kMemory = uint64_t{1} << 30;  // for all threads together

struct Job {
  QnTensor from, to;
  size_t index = 0;  // in the writer
  bool copy = true;
  QuantError error;

  explicit Job(const QnTensor& t) : from(t), to(t) {}
};

bool is_weight(DType t) { return t == DType::F32 || t == DType::BF16 || is_t16(t); }
int bits(DType t) { return t == DType::INT4 ? 4 : t == DType::INT8 ? 8 : t == DType::BF16 ? 16 : 32; }

std::string format_text(const QnTensor& t) { return t.group ? format("%s g%d", name(t.dtype), t.group) : name(t.dtype); }

uint64_t weights_of(const QnTensor& t) {
  uint64_t n = t.experts ? 3 : 1;  // gate, up, down
  for (const int64_t d : t.shape) n *= static_cast<uint64_t>(d);
  return n;
}

class Requantizer {
 public:
  Requantizer(const std::string& in, const std::string& out, const RequantizeOptions& options, const Progress& progress)
      : options_(options),
        progress_(progress),
        source_(QnFile::open(in)),
        file_(File::open_read(in)),
        threads_(options.threads),
        out_path_(out) {}

  RequantizeReport run() {
    plan();
    QnWriter writer(out_path_);
    for (const auto& [key, value] : source_.meta()) writer.set(key, value);
    set_provenance(writer);
    for (Job& j : jobs_) j.index = writer.declare(j.to, j.to.experts);
    writer.layout();
    if (const uint64_t free = free_disk(out_path_); free < writer.total_bytes())
      fail("%s: needs %s, the file system has %s free", out_path_.c_str(), human_bytes(writer.total_bytes()).c_str(),
           human_bytes(free).c_str());
    for (Job& j : jobs_) {
      j.to = writer.tensor(j.index);
      total_ += j.from.bytes;
    }
    for (Job& j : jobs_) {
      try {
        if (j.to.experts)
          run_experts(writer, j);
        else if (j.copy)
          copy_dense(writer, j);
        else
          encode_dense(writer, j);
      } catch (const Error& e) {
        fail("%s: tensor %s: %s", source_.path().c_str(), j.from.name.c_str(), e.what());
      }
    }
    writer.finish();
    return report(writer.total_bytes());
  }

 private:
  void plan();
  void plan_experts(Job& j);
  void set_provenance(QnWriter& writer) const;
  void copy_dense(QnWriter& writer, const Job& j);
  void encode_dense(QnWriter& writer, Job& j);
  void run_experts(QnWriter& writer, Job& j);
  RequantizeReport report(uint64_t bytes_after) const;

  void advance(uint64_t bytes, bool draw) {
    const uint64_t done = done_ += bytes;
    if (draw && progress_) progress_("quantizing", done, total_);
  }

  const RequantizeOptions& options_;
  const Progress& progress_;
  QnFile source_;  // its directory only: the data is read through file_, so that no mapped pages pile up
  File file_;
  Threads threads_;
  std::string out_path_;
  std::vector<Job> jobs_;
  std::vector<std::string> notes_;
  std::atomic<uint64_t> done_ = 0;
  uint64_t total_ = 0;
};

[[noreturn]] void refuse_more_bits(const QnTensor& t, DType wanted, const char* option) {
  fail("tensor %s is %s already and would hold nothing new as %s: leave %s away, or start from a file with more bits", t.name.c_str(),
       format_text(t).c_str(), name(wanted), option);
}

void Requantizer::plan_experts(Job& j) {
  const QnTensor& t = j.from;
  const DType wanted = options_.experts.value_or(t.dtype);
  if (bits(wanted) > bits(t.dtype)) refuse_more_bits(t, wanted, "--experts");
  Recipe recipe;
  recipe.experts = wanted;
  recipe.group = options_.group;
  if (options_.group && wanted != DType::INT4) fail("--group is for int4 experts, these stay %s: add --experts int4", name(wanted));
  const bool regroup = wanted == DType::INT4 && options_.group != 0 && options_.group != t.group;
  if (wanted == t.dtype && !regroup) return;
  if (t.dtype == DType::INT4 && !options_.allow_requantize)
    fail("tensor %s is %s already; quantizing it again to group %d adds a second error: start from a bf16 file, or say --allow-requantize",
         t.name.c_str(), format_text(t).c_str(), options_.group);
  j.copy = false;
  j.to.dtype = wanted;
  j.to.group = static_cast<uint16_t>(expert_group(recipe, t.shape[1], t.shape[2]));
  if (is_t16(t.dtype)) {
    const std::string note = format("note: experts go from %s to %s; their errors add up and those below are against the %s values",
                                    format_text(t).c_str(), format_text(j.to).c_str(), name(t.dtype));
    if (std::find(notes_.begin(), notes_.end(), note) == notes_.end()) notes_.push_back(note);
  }
}

void Requantizer::plan() {
  try {
    for (const QnTensor& t : source_.tensors()) {
      Job j(t);
      const Kind kind = kind_of(t.name);
      if (t.experts != (kind == Kind::Experts)) fail("tensor %s: expected %s", t.name.c_str(), t.experts ? "a dense tensor" : "experts");
      if (kind == Kind::Experts) plan_experts(j);
      if (kind == Kind::Rest && options_.rest && *options_.rest != t.dtype) {
        if (t.shape.size() != 2 || !is_weight(t.dtype))
          fail("tensor %s: expected a matrix of weights, got %s", t.name.c_str(), name(t.dtype));
        if (bits(*options_.rest) > bits(t.dtype)) refuse_more_bits(t, *options_.rest, "--rest");
        j.copy = false;
        j.to.dtype = *options_.rest;
        j.to.group = static_cast<uint16_t>(is_t16(j.to.dtype) ? largest_group(t.shape[1], t.name) : 0);
      }
      jobs_.push_back(std::move(j));
    }
    if (!source_.find("embed")) fail("holds no weights: there is nothing to quantize");
  } catch (const Error& e) {
    fail("%s: %s", source_.path().c_str(), e.what());
  }
  // A tied head is the embedding itself, which stays bf16; with fewer bits the head becomes a tensor of its own.
  const QnTensor& embed = *source_.find("embed");
  const QnTensor& head = source_.find("head") ? *source_.find("head") : embed;
  const auto job = [&](std::string_view name) { return std::find_if(jobs_.begin(), jobs_.end(), [&](const Job& x) { return x.to.name == name; }); };
  const auto make = [&](const char* name, DType dtype, const char* behind) {
    Job j(head);
    j.copy = false;
    j.to.name = name, j.to.dtype = dtype;
    j.to.group = static_cast<uint16_t>(largest_group(head.shape[1], source_.path() + ": " + name));
    const auto at = job(behind);
    jobs_.insert(at == jobs_.end() ? at : at + 1, std::move(j));
  };
  if (head.shape.size() != 2 || !is_weight(head.dtype)) return;
  if (options_.rest == DType::INT8 && &head == &embed && !is_t16(embed.dtype)) make("head", DType::INT8, "norm");
  // What the head becomes here is what its copy for guesses has to be smaller than. Files from before there was one get it.
  const auto kept = job("head"), draft = job("mtp.head");
  Recipe recipe;
  recipe.draft = options_.draft;
  const uint64_t bytes = stored_bytes(kept == jobs_.end() ? embed : kept->to);
  if (draft != jobs_.end() && draft->from.bytes >= bytes) {
    notes_.push_back("note: mtp.head is left out, for the head itself is as small now");
    jobs_.erase(draft);
  } else if (draft == jobs_.end() && job("mtp.norm") != jobs_.end() && has_draft_head(recipe, head.shape[0], head.shape[1], bytes)) {
    make("mtp.head", draft_format(recipe, head.shape[0], head.shape[1]), "mtp.norm");
  }
}

void Requantizer::set_provenance(QnWriter& writer) const {
  const char* key = "general.quantizer";
  std::string text = (source_.has(key) ? source_.text(key) + "; then " : "") + "qnext-quantize:";
  for (const Job& j : jobs_) {
    const Kind kind = kind_of(j.to.name);
    if (kind == Kind::Experts) {
      writer.set("quant.experts", std::string(name(j.to.dtype)));
      writer.set("quant.group", int64_t{j.to.group});
    }
    if (kind == Kind::Rest && options_.rest) writer.set("quant.rest", std::string(name(j.to.dtype)));
  }
  if (options_.experts || options_.group) {
    const auto e = std::find_if(jobs_.begin(), jobs_.end(), [](const Job& j) { return j.to.experts; });
    if (e != jobs_.end()) text += " experts " + format_text(e->to) + ",";
  }
  if (options_.rest) text += std::string(" rest ") + name(*options_.rest) + ",";
  if (std::any_of(jobs_.begin(), jobs_.end(), [](const Job& j) { return j.to.name == "mtp.head" && !j.copy; })) text += " draft head,";
  text += options_.search == ScaleSearch::Max ? " scale max" : " scale search";
  writer.set(key, text + ", from " + std::filesystem::path(source_.path()).filename().string());
}

void check(uint32_t crc, uint32_t expected, const std::string& what) {
  if (crc != expected) fail("%s damaged (checksum %08x, expected %08x): get the file again", what.c_str(), crc, expected);
}

void Requantizer::copy_dense(QnWriter& writer, const Job& j) {
  std::vector<uint8_t> buffer(std::min(kChunk, j.from.bytes));
  uint32_t crc = 0;
  for (uint64_t at = 0; at < j.from.bytes; at += buffer.size()) {
    const std::span<uint8_t> part(buffer.data(), std::min<uint64_t>(buffer.size(), j.from.bytes - at));
    file_.read(j.from.offset + at, part);
    crc = crc32c(part, crc);
    writer.write(j.index, part);
    advance(part.size(), true);
  }
  check(crc, j.from.crc[0], "data is");
}

// Values of rows [begin, begin + n) -> floats. T16: begin is that of a panel.
void read_rows(const File& file, const QnTensor& t, int64_t begin, int64_t n, std::vector<uint8_t>& raw, float* to) {
  raw.resize(static_cast<size_t>(weight_bytes(t.dtype, n, t.shape[1], t.group)));
  file.read(t.offset + static_cast<uint64_t>(weight_bytes(t.dtype, begin, t.shape[1], t.group)), raw);
  const Tensor rows = weight(raw.data(), t.dtype, n, t.shape[1], t.group);
  for (int64_t r = 0; r < n; r++) decode_row(rows, r, {to + r * t.shape[1], static_cast<size_t>(t.shape[1])});
}

// Any format -> any other, a few rows per task; a batch of tasks runs on all threads and is written in order.
void Requantizer::encode_dense(QnWriter& writer, Job& j) {
  const QnTensor &from = j.from, &to = j.to;
  const int64_t n = from.shape[0], k = from.shape[1];
  const bool swiglu = is_t16(to.dtype) && to.name.ends_with("shared_gate_up");
  QN_CHECK(!swiglu || !is_t16(from.dtype), "encode_dense: %s from %s", to.name.c_str(), name(from.dtype));
  if (swiglu && n % 16) fail("expected a multiple of 16 rows, got %lld", static_cast<long long>(n));
  if (static_cast<uint64_t>(k) * kPanelRows * 4 > kMemory / 64) fail("rows of %lld values are too long", static_cast<long long>(k));

  // One pass for the checksum; the data comes from the page cache afterwards.
  std::vector<uint8_t> buffer(std::min(kChunk, from.bytes));
  uint32_t crc = 0;
  for (uint64_t at = 0; at < from.bytes; at += buffer.size()) {
    const std::span<uint8_t> part(buffer.data(), std::min<uint64_t>(buffer.size(), from.bytes - at));
    file_.read(from.offset + at, part);
    crc = crc32c(part, crc);
  }
  check(crc, from.crc[0], "data is");

  struct Task {
    std::vector<uint8_t> raw, out;
    std::vector<float> rows;
    QuantError error;
  };
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(kChunk / 4) / (k * kPanelRows)) * kPanelRows;
  const uint64_t task_bytes = static_cast<uint64_t>(step * k) * 12;
  std::vector<Task> tasks(std::clamp<uint64_t>(kMemory / task_bytes, 1, static_cast<uint64_t>(threads_.size())));
  for (int64_t begin = 0; begin < n; begin += step * static_cast<int64_t>(tasks.size())) {
    const auto rows_of = [&](int64_t i) { return std::clamp<int64_t>(n - begin - i * step, 0, step); };
    threads_.run([&](int) {
      for (int64_t i; (i = threads_.next_task()) < static_cast<int64_t>(tasks.size()) && rows_of(i) > 0;) {
        Task& t = tasks[static_cast<size_t>(i)];
        const int64_t first = begin + i * step, count = rows_of(i);
        t.rows.resize(static_cast<size_t>(count * k));
        t.out.resize(static_cast<size_t>(weight_bytes(to.dtype, count, k, to.group)));
        if (swiglu) {  // panels of 8 gate and 8 up rows
          float* const up = t.rows.data() + count / 2 * k;
          read_rows(file_, from, first / 2, count / 2, t.raw, t.rows.data());
          read_rows(file_, from, n / 2 + first / 2, count / 2, t.raw, up);
          encode_gate_up(to.dtype, k, count / 2, to.group, t.rows.data(), up, options_.search, t.out, &t.error);
        } else {
          read_rows(file_, from, first, count, t.raw, t.rows.data());
          encode_rows(to.dtype, count, k, to.group, t.rows.data(), options_.search, t.out, &t.error);
        }
      }
    });
    for (size_t i = 0; i < tasks.size() && rows_of(static_cast<int64_t>(i)) > 0; i++) {
      writer.write(j.index, tasks[i].out);
      advance(static_cast<uint64_t>(weight_bytes(from.dtype, rows_of(static_cast<int64_t>(i)), k, from.group)), true);
    }
  }
  for (const Task& t : tasks) j.error.add(t.error);
}

void Requantizer::run_experts(QnWriter& writer, Job& j) {
  const QnTensor &from = j.from, &to = j.to;
  const int64_t count = from.shape[0], d = from.shape[1], f = from.shape[2];
  const uint64_t in_stride = from.bytes / static_cast<uint64_t>(count);
  const uint64_t out_stride = j.copy ? 0 : static_cast<uint64_t>(expert_layout(to.dtype, d, f, to.group).stride);
  const uint64_t matrix = j.copy ? 0 : static_cast<uint64_t>(d * f);
  const uint64_t worker_bytes = in_stride + out_stride + matrix * 12;
  if (worker_bytes > kMemory)
    fail("experts of widths %lld and %lld are too large for this program", static_cast<long long>(d), static_cast<long long>(f));
  if (!j.copy && is_t16(to.dtype) && f % 8) fail("expected an expert width that is a multiple of 8, got %lld", static_cast<long long>(f));
  const int workers = static_cast<int>(std::min<uint64_t>(kMemory / worker_bytes, static_cast<uint64_t>(threads_.size())));
  std::vector<QuantError> errors(static_cast<size_t>(threads_.size()));
  std::atomic<bool> failed = false;
  threads_.run([&](int thread) {
    if (thread >= workers) return;
    std::vector<uint8_t> in(in_stride), out(out_stride);
    std::vector<float> values(3 * matrix);
    float *const gate = values.data(), *const up = gate + matrix, *const down = up + matrix;
    try {
      for (int64_t e; !failed && (e = threads_.next_task()) < count;) {
        file_.read(from.offset + static_cast<uint64_t>(e) * in_stride, in);
        check(crc32c(in), from.crc[static_cast<size_t>(e)], format("expert %lld is", static_cast<long long>(e)));
        if (j.copy) {
          writer.write_expert(j.index, e, in);
        } else {
          decode_expert(from.dtype, d, f, from.group, in.data(), gate, up, down);
          encode_expert(to.dtype, d, f, to.group, gate, up, down, options_.search, out, &errors[static_cast<size_t>(thread)]);
          writer.write_expert(j.index, e, out);
        }
        advance(in_stride, thread == 0);
      }
    } catch (...) {
      failed = true;
      throw;
    }
  });
  for (const QuantError& e : errors) j.error.add(e);
}

RequantizeReport Requantizer::report(uint64_t bytes_after) const {
  RequantizeReport r;
  for (const Job& j : jobs_) {
    const bool made = j.from.name != j.to.name;  // from a tensor that stays
    const RequantizeRow fresh = {kind_label(j.to.name), !made ? format_text(j.from) : j.to.name == "head" ? "tied" : "absent", format_text(j.to), 0, 0, 0, 0, {}};
    auto row = std::find_if(r.rows.begin(), r.rows.end(), [&](const RequantizeRow& x) {
      return x.label == fresh.label && x.before == fresh.before && x.after == fresh.after;
    });
    if (row == r.rows.end()) row = r.rows.insert(row, fresh);
    row->tensors++;
    row->weights += weights_of(j.to);
    row->bytes_before += made ? 0 : j.from.bytes;
    row->bytes_after += j.to.bytes;
    row->error.add(j.error);
  }
  r.notes = notes_;
  r.bytes_before = file_.size();
  r.bytes_after = bytes_after;
  return r;
}

}  // namespace

RequantizeReport requantize(const std::string& in, const std::string& out, const RequantizeOptions& options, const Progress& progress) {
  std::error_code ec;
  if (std::filesystem::equivalent(in, out, ec)) fail("%s: output and input are the same file; name another output", out.c_str());
  return Requantizer(in, out, options, progress).run();
}

}  // namespace qn
