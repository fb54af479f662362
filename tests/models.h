// Converted test models, made once per run in a temporary folder that is removed at exit.
#pragma once
#include <unistd.h>

#include <filesystem>
#include <map>
#include <string>

#include "convert/convert.h"
#include "ggml-lite/core/qn.h"

namespace qn {

class TestModels {
 public:
  static TestModels& get() {
    static TestModels m;
    return m;
  }
  // name: tiny, tiny-yarn, tiny-fp8, stories
  std::string path(const std::string& name, DType experts = DType::BF16, DType rest = DType::BF16, int group = 0,
                   ScaleSearch scale = ScaleSearch::LeastSquares) {
    const std::string key = name + "-" + qn::name(experts) + "-" + qn::name(rest) + "-" + std::to_string(group) + (scale == ScaleSearch::Max ? "-max" : "");
    const std::string out = (folder_ / (key + ".qn")).string();
    if (made_[key]) return out;
    ConvertOptions o;
    o.recipe.experts = experts, o.recipe.rest = rest, o.recipe.group = group;
    o.scale = scale, o.threads = 2;
    convert_folder(source(name), out, o);
    made_[key] = true;
    return out;
  }
  std::filesystem::path folder() const { return folder_; }
  std::string source(const std::string& name) {
    namespace fs = std::filesystem;
    if (name == "stories") return QN_STORIES;
    const fs::path from = fs::path(QN_TEST_DATA) / name;
    if (fs::exists(from / "model.safetensors")) return from.string();
    const fs::path to = folder_ / (name + "-hf");  // tiny-yarn: the weights of tiny
    fs::create_directories(to);
    fs::copy(from, to, fs::copy_options::overwrite_existing | fs::copy_options::recursive);
    fs::copy(fs::path(QN_TEST_DATA) / "tiny" / "model.safetensors", to, fs::copy_options::overwrite_existing);
    return to.string();
  }

 private:
  TestModels() : folder_(std::filesystem::temp_directory_path() / ("qnext-tests-" + std::to_string(::getpid()))) {
    std::filesystem::create_directories(folder_);
  }
  ~TestModels() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  std::filesystem::path folder_;
  std::map<std::string, bool> made_;
};

// A copy of a file in which a tensor is left out, or is another.
inline void copy_file(const std::string& from, const std::string& to, std::string_view name, const QnTensor* other = nullptr, std::span<const uint8_t> bytes = {}) {
  const QnFile f = QnFile::open(from);
  QnWriter w(to);
  for (const auto& [key, value] : f.meta()) w.set(key, value);
  for (const QnTensor& t : f.tensors())
    if (t.name != name) w.declare(t, t.experts);
  const size_t at = other ? w.declare(*other) : 0;
  w.layout();
  size_t i = 0;
  for (const QnTensor& t : f.tensors()) {
    if (t.name == name) continue;
    const auto data = f.data(t);
    const size_t count = t.experts ? static_cast<size_t>(t.shape[0]) : 1, one = data.size() / count;
    for (size_t e = 0; e < count; e++) t.experts ? w.write_expert(i, static_cast<int64_t>(e), data.subspan(e * one, one)) : w.write(i, data);
    i++;
  }
  if (other) w.write(at, bytes);
  w.finish();
}

}  // namespace qn
