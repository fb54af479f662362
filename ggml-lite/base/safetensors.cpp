#include "ggml-lite/base/safetensors.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/json.h"

namespace qn {
namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // as the format's own library
constexpr uint64_t kMaxIndex = 256'000'000;
constexpr int64_t kMaxValues = 4'000'000;  // of a parsed header; a tensor has about eight
constexpr size_t kMaxDims = 16, kMaxFiles = 10'000;

uint64_t dtype_bytes(const std::string& dtype) {  // 0: unknown
  static constexpr struct {
    const char* name;
    uint64_t bytes;
  } kinds[] = {
      {"BOOL", 1}, {"U8", 1},   {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}, {"U16", 2}, {"I16", 2},
      {"F16", 2},  {"BF16", 2}, {"U32", 4}, {"I32", 4},     {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8},
  };
  for (const auto& k : kinds)
    if (dtype == k.name) return k.bytes;
  return 0;
}

// The text of one header or index becomes a tree some fifty times its size in the worst case ("[0,0,0,..."): refuse that first.
Json parse_bounded(std::string_view text, const std::string& where) {
  const int64_t values = std::count_if(text.begin(), text.end(), [](char c) { return c == ',' || c == '[' || c == '{'; });
  if (values > kMaxValues)
    fail("%s: header has more than %lld values: not a checkpoint", where.c_str(), static_cast<long long>(kMaxValues));
  Json j = Json::parse(text, where);
  if (!j.is_object()) fail("%s: expected a JSON object at the top", where.c_str());
  return j;
}

SafeTensor parse_tensor(const Json& j, const std::string& what, uint64_t data_bytes) {
  if (!j.is_object()) fail("%s: expected an object with dtype, shape and data_offsets", what.c_str());
  const Json *dtype = j.find("dtype"), *shape = j.find("shape"), *offsets = j.find("data_offsets");
  if (!dtype || !shape || !offsets) fail("%s: %s is missing", what.c_str(), !dtype ? "dtype" : !shape ? "shape" : "data_offsets");

  SafeTensor t;
  t.dtype = dtype->as_string(what + ": dtype");
  const uint64_t item = dtype_bytes(t.dtype);
  if (item == 0) fail("%s: unknown dtype \"%s\"", what.c_str(), t.dtype.c_str());

  if (!shape->is_array() || shape->items().size() > kMaxDims) fail("%s: shape must be a list of at most %zu sizes", what.c_str(), kMaxDims);
  uint64_t bytes = item;
  for (const Json& size : shape->items()) {
    if (!size.is_integer()) fail("%s: shape must be a list of whole numbers", what.c_str());
    const int64_t n = size.as_int(what + ": shape");
    if (n < 0) fail("%s: negative size %lld in shape", what.c_str(), static_cast<long long>(n));
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(n), &bytes)) fail("%s: shape is too large", what.c_str());
    t.shape.push_back(n);
  }

  if (!offsets->is_array() || offsets->items().size() != 2 || !offsets->items()[0].is_integer() || !offsets->items()[1].is_integer())
    fail("%s: data_offsets must be two whole numbers", what.c_str());
  const int64_t begin = offsets->items()[0].as_int(what), end = offsets->items()[1].as_int(what);
  if (begin < 0 || begin > end || static_cast<uint64_t>(end) > data_bytes)
    fail("%s: data_offsets [%lld, %lld] lie outside the %llu data bytes of the file; is it truncated? fetch it again", what.c_str(),
         static_cast<long long>(begin), static_cast<long long>(end), static_cast<unsigned long long>(data_bytes));
  if (static_cast<uint64_t>(end - begin) != bytes)
    fail("%s: shape and dtype need %llu bytes, data_offsets give %lld", what.c_str(), static_cast<unsigned long long>(bytes),
         static_cast<long long>(end - begin));
  t.offset = static_cast<uint64_t>(begin);
  t.bytes = bytes;
  return t;
}

// The data must be covered without gap or overlap, as the format demands: anything else is a damaged header.
void check_coverage(std::vector<std::pair<std::string, SafeTensor>>& found, const std::string& path, uint64_t data_bytes) {
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return a.second.offset != b.second.offset ? a.second.offset < b.second.offset : a.second.bytes < b.second.bytes;
  });
  uint64_t at = 0;
  for (const auto& [name, t] : found) {
    if (t.offset != at)
      fail("%s: tensor %s starts at data byte %llu, expected %llu: %s", path.c_str(), name.c_str(),
           static_cast<unsigned long long>(t.offset), static_cast<unsigned long long>(at),
           t.offset < at ? "tensors overlap" : "bytes that belong to no tensor");
    at += t.bytes;
  }
  if (at != data_bytes)
    fail("%s: %llu bytes after the last tensor belong to none", path.c_str(), static_cast<unsigned long long>(data_bytes - at));
}

std::string join(const std::string& folder, const std::string& name) {
  return folder.empty() || folder.back() == '/' ? folder + name : folder + "/" + name;
}

// A shard is named by a file we did not write: only a plain name may leave this function.
void check_shard_name(const std::string& name, const std::string& index) {
  const bool plain = !name.empty() && name.size() <= 255 && name[0] != '.' &&
                     std::all_of(name.begin(), name.end(), [](unsigned char c) { return c > ' ' && c != '/' && c != '\\' && c != 127; });
  if (!plain) fail("%s: \"%s\" is not a plain file name", index.c_str(), name.c_str());
}

std::string only_safetensors_file(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code ec;
  for (std::filesystem::directory_iterator it(folder, ec), end; !ec && it != end; it.increment(ec))
    if (it->path().extension() == ".safetensors") names.push_back(it->path().filename().string());
  if (ec) fail("%s: cannot list the folder: %s", folder.c_str(), ec.message().c_str());
  if (names.empty()) fail("%s: no *.safetensors here; expected model.safetensors or model.safetensors.index.json", folder.c_str());
  if (names.size() > 1)
    fail("%s: %zu *.safetensors but no model.safetensors.index.json to say what is where", folder.c_str(), names.size());
  return join(folder, names[0]);
}

}  // namespace

void SafeTensors::add(const std::string& path) {
  File file = File::open_read(path);
  uint8_t raw[8];
  if (file.size() < 8) fail("%s: %llu bytes are no safetensors file", path.c_str(), static_cast<unsigned long long>(file.size()));
  file.read(0, raw);
  uint64_t header = 0;
  for (int i = 7; i >= 0; i--) header = header << 8 | raw[i];
  if (header > kMaxHeader || header > file.size() - 8)
    fail("%s: header of %llu bytes in a file of %llu: not safetensors, or truncated; fetch it again", path.c_str(),
         static_cast<unsigned long long>(header), static_cast<unsigned long long>(file.size()));

  std::string text(header, '\0');
  file.read(8, {reinterpret_cast<uint8_t*>(text.data()), text.size()});
  const Json j = parse_bounded(text, path);
  const uint64_t data_begin = 8 + header, data_bytes = file.size() - data_begin;

  std::vector<std::pair<std::string, SafeTensor>> found;
  for (const auto& [name, value] : j.members())
    if (name != "__metadata__") found.emplace_back(name, parse_tensor(value, path + ": tensor " + name, data_bytes));
  check_coverage(found, path, data_bytes);
  for (auto& [name, t] : found) {
    t.file = static_cast<int>(files_.size());
    t.offset += data_begin;
    if (!tensors_.emplace(name, std::move(t)).second) fail("%s: tensor %s is also in another file", path.c_str(), name.c_str());
  }
  files_.push_back(std::move(file));
}

SafeTensors SafeTensors::open_file(const std::string& path) {
  SafeTensors s;
  s.add(path);
  return s;
}

SafeTensors SafeTensors::open_folder(const std::string& folder) {
  if (!is_directory(folder)) fail("%s: not a folder; expected one with config.json and *.safetensors", folder.c_str());
  const std::string index = join(folder, "model.safetensors.index.json"), single = join(folder, "model.safetensors");
  if (!file_exists(index)) return open_file(file_exists(single) ? single : only_safetensors_file(folder));

  std::map<std::string, std::string> shard_of;
  std::set<std::string> shards;
  {
    const std::string text = read_small_file(index, kMaxIndex);
    const Json j = parse_bounded(text, index);
    const Json* map = j.find("weight_map");
    if (!map || !map->is_object() || map->members().empty()) fail("%s: weight_map is missing or empty", index.c_str());
    for (const auto& [name, value] : map->members()) {
      const std::string& shard = value.as_string(index + ": " + name);
      check_shard_name(shard, index);
      shards.insert(shard);
      shard_of[name] = shard;
    }
  }
  if (shards.size() > kMaxFiles) fail("%s: names %zu shards, at most %zu", index.c_str(), shards.size(), kMaxFiles);

  SafeTensors s;
  std::vector<std::string> names;  // of files_
  for (const std::string& shard : shards) {
    const std::string path = join(folder, shard);
    if (!file_exists(path)) fail("%s: shard %s is missing from the folder; fetch it", index.c_str(), shard.c_str());
    s.add(path);
    names.push_back(shard);
  }
  for (const auto& [name, shard] : shard_of) {
    const SafeTensor* t = s.find(name);
    if (!t) fail("%s: tensor %s is not in %s", index.c_str(), name.c_str(), shard.c_str());
    if (names[static_cast<size_t>(t->file)] != shard)
      fail("%s: tensor %s should be in %s but is in %s", index.c_str(), name.c_str(), shard.c_str(),
           names[static_cast<size_t>(t->file)].c_str());
  }
  for (const auto& [name, t] : s.tensors_)
    if (!shard_of.count(name))
      fail("%s: does not list tensor %s of %s", index.c_str(), name.c_str(), names[static_cast<size_t>(t.file)].c_str());
  return s;
}

const SafeTensor* SafeTensors::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

void SafeTensors::read(const SafeTensor& t, uint64_t begin, std::span<uint8_t> to) const {
  QN_CHECK(begin <= t.bytes && to.size() <= t.bytes - begin, "safetensors: bytes [%llu, +%zu) of a tensor of %llu",
           static_cast<unsigned long long>(begin), to.size(), static_cast<unsigned long long>(t.bytes));
  files_[static_cast<size_t>(t.file)].read(t.offset + begin, to);
}

namespace {

const SafeTensor& require(const SafeTensors& s, const std::string& name) {
  const SafeTensor* t = s.find(name);
  if (!t) fail("%s: tensor %s is missing", s.files().empty() ? "safetensors" : s.files()[0].path().c_str(), name.c_str());
  return *t;
}

float half_bits_to_float(uint16_t h) {
  const float sign = h & 0x8000 ? -1.0f : 1.0f, mantissa = static_cast<float>(h & 1023);
  const int exponent = h >> 10 & 31;
  if (exponent == 31) return mantissa == 0 ? sign * __builtin_inff() : __builtin_nanf("");
  return sign * (exponent == 0 ? __builtin_ldexpf(mantissa, -24) : __builtin_ldexpf(mantissa + 1024, exponent - 25));
}

template <class T>
std::vector<T> read_items(const SafeTensors& s, const SafeTensor& t) {
  std::vector<T> v(t.bytes / sizeof(T));
  s.read(t, 0, {reinterpret_cast<uint8_t*>(v.data()), v.size() * sizeof(T)});
  return v;
}

}  // namespace

std::vector<float> SafeTensors::read_f32(const std::string& name) const {
  const SafeTensor& t = require(*this, name);
  if (t.dtype == "F32") return read_items<float>(*this, t);
  if (t.dtype != "BF16" && t.dtype != "F16") fail("tensor %s: expected F32, BF16 or F16, got %s", name.c_str(), t.dtype.c_str());
  const std::vector<uint16_t> bits = read_items<uint16_t>(*this, t);
  std::vector<float> out(bits.size());
  for (size_t i = 0; i < bits.size(); i++) {
    const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
    out[i] = t.dtype == "F16" ? half_bits_to_float(bits[i]) : __builtin_bit_cast(float, wide);
  }
  return out;
}

std::vector<int32_t> SafeTensors::read_i32(const std::string& name) const {
  const SafeTensor& t = require(*this, name);
  if (t.dtype == "I32") return read_items<int32_t>(*this, t);
  if (t.dtype != "I64") fail("tensor %s: expected I32 or I64, got %s", name.c_str(), t.dtype.c_str());
  const std::vector<int64_t> wide = read_items<int64_t>(*this, t);
  for (int64_t v : wide)
    if (v < INT32_MIN || v > INT32_MAX) fail("tensor %s: %lld does not fit 32 bits", name.c_str(), static_cast<long long>(v));
  return {wide.begin(), wide.end()};
}

}  // namespace qn
