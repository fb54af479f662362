#include "convert/convert.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <mutex>

#include "convert/source.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/threads.h"

namespace qn {

namespace {

constexpr uint64_t kBufferBudget = uint64_t{1} << 30;  // of all threads together

std::string format_text(const QnTensor& t) { return std::string(name(t.dtype)) + (t.group ? " g" + std::to_string(t.group) : ""); }

int64_t block_rows(const Matrix& m) {
  return std::clamp<int64_t>(kBlockValues / m.cols / kPanelRows * kPanelRows, kPanelRows, round_up(m.rows, kPanelRows));
}

// Bytes that one thread needs for a matrix: values, what is read, what is written.
uint64_t block_bytes(const Matrix& m) {
  const int64_t n = std::min(block_rows(m), m.rows);
  return static_cast<uint64_t>(n * m.cols * 8 + weight_bytes(m.dtype, n, m.cols, m.group));
}

void check_space(const std::string& out, uint64_t bytes) {
  const uint64_t free = free_disk(out);
  if (bytes > free) fail("%s: the file takes %s, the disk has %s free", out.c_str(), human_bytes(bytes).c_str(), human_bytes(free).c_str());
}

// Writing over a shard that is being read would destroy the checkpoint.
void refuse_input_as_output(const std::string& folder, const std::string& out) {
  std::error_code ec;
  for (std::filesystem::directory_iterator it(folder, ec), end; !ec && it != end; it.increment(ec)) {
    std::error_code ignored;
    if (it->path().extension() != ".qn" && std::filesystem::equivalent(it->path(), out, ignored)) {
      fail("%s: is a file of the checkpoint %s; choose another name", out.c_str(), folder.c_str());
    }
  }
}

Notice quiet_if_empty(const Notice& notice) {
  return notice ? notice : [](const std::string&) {};
}

// Means that tell a checkpoint whose norms hold 1 + w already (model-spec 10.6).
void check_norms(const Checkpoint& checkpoint, const std::vector<Target>& layout, const Notice& notice) {
  double input = 0, gated = 0;
  int inputs = 0, gateds = 0;
  std::vector<float> values;
  ReadBuffers buffers;
  for (const Target& t : layout) {
    const bool is_input = t.tensor.name.ends_with(".norm1"), is_gated = t.tensor.name.ends_with("delta.norm");
    if (!is_input && !is_gated) continue;
    values.resize(static_cast<size_t>(t.matrix.cols));
    checkpoint.read(t.matrix, 0, 1, values, buffers);
    double mean = 0;
    for (const float v : values) mean += static_cast<double>(v) / static_cast<double>(t.matrix.cols);
    (is_input ? input : gated) += mean;
    (is_input ? inputs : gateds)++;
  }
  const double stored = inputs ? input / inputs - 1 : 0;
  if (stored > 0.75 && stored < 1.25) {
    notice(format("warning: the mean of input_layernorm is %.2f, expected about 0: the norms of this checkpoint may hold 1 + w already",
                  stored));
  }
  if (gateds && gated / gateds <= 0) {
    notice(format("warning: the mean of linear_attn.norm is %.2f, expected about 1", gated / gateds));
  }
}

double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

void write_meta(QnWriter& writer, const ModelConfig& c, const TextSetup& text, const std::map<std::string, Meta>& origin,
                const std::vector<Target>& layout, const LayoutOptions& options) {
  writer.set("general.family", std::string("qwen3_next"));
  writer.set("general.converter", std::string("qnext-convert 1"));
  for (const auto& [key, value] : origin) writer.set(key, value);
  for (const auto& [key, value] : model_meta(c, options.mtp)) writer.set(key, value);
  for (const auto& [key, value] : text.meta) writer.set(key, value);
  writer.set("quant.experts", std::string(name(options.recipe.experts)));
  writer.set("quant.rest", std::string(name(options.recipe.rest)));
  for (const Target& t : layout) {
    if (t.tensor.experts) writer.set("quant.group", int64_t{t.tensor.group});
  }
}

std::vector<ConvertReport::Line> write_model(QnWriter& writer, const std::string& out, const std::vector<Target>& layout,
                                             const TextSetup& text, int threads, const RowEncoder& encode, const Progress& progress) {
  if (!text.tables.empty()) {
    QnTensor t;
    t.name = "tokenizer", t.dtype = DType::U8, t.shape = {static_cast<int64_t>(text.tables.size())};
    writer.declare(std::move(t));
  }
  struct Task {
    const Target* target;
    size_t index;    // in the file
    int64_t expert;  // -1: dense
  };
  std::vector<Task> tasks;
  uint64_t total = 0, per_thread = 0;
  for (const Target& t : layout) {
    const size_t index = writer.declare(t.tensor, t.section);
    total += writer.tensor(index).bytes;
    if (!t.tensor.experts) {
      tasks.push_back({&t, index, -1});
      per_thread = std::max(per_thread, block_bytes(t.matrix));
      continue;
    }
    for (int64_t e = 0; e < t.tensor.shape[0]; e++) tasks.push_back({&t, index, e});
    const ExpertMatrices m = expert_matrices(t, 0);
    const ExpertLayout l = expert_layout(t.tensor.dtype, t.tensor.shape[1], t.tensor.shape[2], t.tensor.group);
    per_thread = std::max(per_thread, std::max(block_bytes(m.gate_up), block_bytes(m.down)) + static_cast<uint64_t>(l.stride));
  }
  writer.layout();
  check_space(out, writer.total_bytes());
  if (per_thread > kBufferBudget)
    fail("%s: one expert takes %s: more than this program will hold in memory", out.c_str(), human_bytes(per_thread).c_str());
  // The largest dense tensors first: they are the longest tasks, and end while experts keep the other threads busy.
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
    auto size = [&](const Task& t) { return t.expert < 0 ? writer.tensor(t.index).bytes : 0; };
    return size(a) > size(b);
  });
  if (!text.tables.empty()) writer.write(0, text.tables);

  Threads pool(
      static_cast<int>(std::min<uint64_t>(threads > 0 ? threads : default_threads(), kBufferBudget / std::max<uint64_t>(per_thread, 1))));
  std::vector<std::vector<QuantError>> errors(pool.size(), std::vector<QuantError>(layout.size()));  // by thread and target
  std::atomic<uint64_t> done{0};
  std::atomic<bool> failed{false};
  std::mutex reporting;
  auto advance = [&](uint64_t bytes) {
    done += bytes;
    if (!progress) return;
    if (std::unique_lock lock(reporting, std::try_to_lock); lock) progress("writing", done, total);
  };

  pool.run([&](int thread) {
    std::vector<uint8_t> bytes;
    auto room = [&](int64_t n) {
      if (static_cast<int64_t>(bytes.size()) < n) bytes.resize(static_cast<size_t>(n));
      return std::span(bytes).first(static_cast<size_t>(n));
    };
    try {
      for (int64_t i; !failed && (i = pool.next_task()) < static_cast<int64_t>(tasks.size());) {
        const Task& task = tasks[i];
        const QnTensor& t = task.target->tensor;
        QuantError& error = errors[thread][task.target - layout.data()];
        const uint64_t place = static_cast<uint64_t>(task.target - layout.data()) << 44;
        // Blocks of m in order; `to` tells where the bytes of rows [begin, begin + n) go, `after` takes them.
        auto blocks = [&](const Matrix& m, uint64_t at, auto&& to, auto&& after) {
          for (int64_t begin = 0; begin < m.rows && !failed; begin += block_rows(m)) {
            const int64_t n = std::min(block_rows(m), m.rows - begin);
            const std::span<uint8_t> dest = to(begin, weight_bytes(m.dtype, n, m.cols, m.group));
            encode({m, at, begin, n, dest, error, thread});
            after(dest);
          }
        };
        if (task.expert < 0) {
          blocks(
              task.target->matrix, place, [&](int64_t, int64_t size) { return room(size); },
              [&](std::span<const uint8_t> block) {
                writer.write(task.index, block);
                advance(block.size());
              });
        } else {
          const ExpertMatrices m = expert_matrices(*task.target, task.expert);
          const ExpertLayout l = expert_layout(t.dtype, t.shape[1], t.shape[2], t.group);
          const std::span<uint8_t> record = room(l.bytes);
          auto part = [&](const Matrix& of, int64_t offset) {
            return [&, offset](int64_t begin, int64_t size) {
              return record.subspan(static_cast<size_t>(offset + weight_bytes(of.dtype, begin, of.cols, of.group)),
                                    static_cast<size_t>(size));
            };
          };
          const uint64_t at = place | static_cast<uint64_t>(task.expert) << 30;
          blocks(m.gate_up, at, part(m.gate_up, 0), [](std::span<const uint8_t>) {});
          blocks(m.down, at | uint64_t{1} << 29, part(m.down, l.down_offset), [](std::span<const uint8_t>) {});
          if (failed) break;
          writer.write_expert(task.index, task.expert, record);
          advance(static_cast<uint64_t>(l.stride));
        }
      }
    } catch (...) {
      failed = true;
      throw;
    }
  });
  if (progress) progress("writing", done, total);

  std::vector<ConvertReport::Line> lines;
  for (size_t i = 0; i < layout.size(); i++) {
    const QnTensor& t = layout[i].tensor;
    const std::string label = kind_label(t.name), format = format_text(t);
    auto line = std::find_if(lines.begin(), lines.end(), [&](const auto& l) { return l.label == label && l.format == format; });
    if (line == lines.end()) line = lines.insert(line, {label, format, 0, {}});
    line->bytes += stored_bytes(t);
    for (const auto& of_thread : errors) line->error.add(of_thread[i]);
  }
  return lines;
}

ConvertReport convert_folder(const std::string& folder, const std::string& out, const ConvertOptions& options, const Progress& progress) {
  const auto start = std::chrono::steady_clock::now();
  const Notice notice = quiet_if_empty(options.notice);
  if (!is_directory(folder)) fail("%s: not a folder; expected one with config.json and *.safetensors", folder.c_str());
  refuse_input_as_output(folder, out);
  const ModelConfig config = read_config(folder);
  const Checkpoint checkpoint(folder);
  LayoutOptions wanted;
  wanted.recipe = options.recipe;
  wanted.mtp = options.mtp && checkpoint.has_mtp();
  wanted.in_checkpoint = [&](const std::string& name) { return checkpoint.has(name); };
  const std::vector<Target> layout = model_layout(config, wanted);
  checkpoint.check(layout, config, wanted.mtp, notice);
  const TextSetup text = read_text_setup(folder, config.vocab, config.end_tokens, options.chat, notice);
  check_norms(checkpoint, layout, notice);

  QnWriter writer(out);
  write_meta(writer, config, text, origin_meta(folder, config.origin), layout, wanted);
  struct Buffers {
    ReadBuffers read;
    std::vector<float> values;
  };
  std::vector<Buffers> buffers(static_cast<size_t>(options.threads > 0 ? options.threads : default_threads()));
  auto encode = [&](const RowJob& job) {
    Buffers& b = buffers[job.thread];
    const size_t n = static_cast<size_t>(job.n * job.matrix.cols);
    if (b.values.size() < n) b.values.resize(n);
    const std::span<float> values = std::span(b.values).first(n);
    checkpoint.read(job.matrix, job.begin, job.n, values, b.read);
    try {
      encode_rows(job.matrix.dtype, job.n, job.matrix.cols, job.matrix.group, values.data(), options.scale, job.to, &job.error);
    } catch (const Error& e) {
      fail("%s: %s: %s", folder.c_str(), job.matrix.from[0].name.c_str(), e.what());
    }
  };
  ConvertReport report;
  report.lines = write_model(writer, out, layout, text, options.threads, encode, progress);
  report.file_bytes = writer.total_bytes();
  writer.finish();
  report.mtp = wanted.mtp;
  report.seconds = since(start);
  return report;
}

ConvertReport convert_tokenizer(const std::string& folder, const std::string& out, const ConvertOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  if (!is_directory(folder)) fail("%s: not a folder; expected one with tokenizer.json", folder.c_str());
  refuse_input_as_output(folder, out);
  if (!file_exists(folder + "/tokenizer.json")) fail("%s: no tokenizer.json here", folder.c_str());
  ModelConfig config;
  if (file_exists(folder + "/config.json")) config = read_config(folder);
  const TextSetup text = read_text_setup(folder, config.vocab, config.end_tokens, options.chat, quiet_if_empty(options.notice));

  QnWriter writer(out);
  writer.set("general.family", std::string("qwen3_next"));
  writer.set("general.converter", std::string("qnext-convert 1"));
  for (const auto& [key, value] : origin_meta(folder, config.origin)) writer.set(key, value);
  for (const auto& [key, value] : text.meta) {
    if (key.rfind("general.", 0) == 0 || key.rfind("token.", 0) == 0) writer.set(key, value);
  }
  ConvertReport report;
  report.lines = write_model(writer, out, {}, text, 1, {}, {});
  report.file_bytes = writer.total_bytes();
  writer.finish();
  report.seconds = since(start);
  return report;
}

}  // namespace qn
