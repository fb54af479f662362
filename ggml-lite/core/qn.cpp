#include "ggml-lite/core/qn.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstring>
#include <set>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/base/threads.h"

namespace qn {

static_assert(std::endian::native == std::endian::little, "the file is little-endian and read without swapping");

namespace {

constexpr char kMagic[8] = {'Q', 'N', 'M', 'O', 'D', 'E', 'L', '\x1a'};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kSection = uint64_t{2} << 20, kDirAlign = 64;
// No honest file comes near these; they bound what a hostile one can make us allocate.
constexpr uint64_t kMaxDirectory = uint64_t{64} << 20;
constexpr uint32_t kMaxMeta = 10000, kMaxTensors = 100000, kMaxName = 256, kMaxText = 1 << 20;
constexpr int64_t kMaxDim = int64_t{1} << 31;
constexpr int64_t kMaxExperts = 1 << 16, kMaxExpertDim = 1 << 20;
constexpr unsigned __int128 kMaxBytes = uint64_t{1} << 50;

// The header as it lies in the file.
struct Header {
  char magic[8];
  uint32_t version, header_bytes;
  uint64_t file_bytes, dir_offset, dir_bytes;
  uint32_t dir_crc, header_crc;
};
static_assert(sizeof(Header) == 48);

using ull = unsigned long long;
using ll = long long;

// "int4 g128 (512, 2048)"
std::string describe(DType dtype, int group, std::span<const int64_t> shape) {
  std::string s = name(dtype);
  if (group) s += format(" g%d", group);
  s += " (";
  for (size_t i = 0; i < shape.size(); i++) s += format("%s%lld", i ? ", " : "", static_cast<ll>(shape[i]));
  return s + ")";
}

bool is_utf8_without_nul(std::string_view s) {
  for (size_t i = 0; i < s.size();) {
    const auto at = [&](size_t j) { return j < s.size() ? static_cast<uint8_t>(s[j]) : uint8_t{0}; };
    const uint8_t c = at(i);
    const int more = c < 0x80 ? 0 : c >= 0xc2 && c < 0xe0 ? 1 : (c & 0xf0) == 0xe0 ? 2 : c >= 0xf0 && c < 0xf5 ? 3 : -1;
    if (c == 0 || more < 0) return false;
    for (int j = 1; j <= more; j++)
      if ((at(i + j) & 0xc0) != 0x80) return false;
    // overlong forms, surrogates, above U+10FFFF
    const uint8_t d = at(i + 1);
    if ((c == 0xe0 && d < 0xa0) || (c == 0xed && d >= 0xa0) || (c == 0xf0 && d < 0x90) || (c == 0xf4 && d >= 0x90)) return false;
    i += 1 + more;
  }
  return true;
}

// ---- reading the directory ------------------------------------------------------------------------------------------

struct Cursor {
  std::span<const uint8_t> bytes;
  size_t at = 0;

  std::span<const uint8_t> take(size_t n) {
    if (n > bytes.size() - at) fail("directory: ends inside an entry, %zu bytes wanted at byte %zu of %zu", n, at, bytes.size());
    at += n;
    return bytes.subspan(at - n, n);
  }
  template <class T>
  T number() {
    T v;
    std::memcpy(&v, take(sizeof v).data(), sizeof v);
    return v;
  }
  std::string string(uint32_t max, const char* what) {
    const uint32_t n = number<uint32_t>();
    if (n > max) fail("directory: %s: expected at most %u bytes, got %u", what, max, n);
    const auto b = take(n);
    std::string s(b.begin(), b.end());
    if (!is_utf8_without_nul(s)) fail("directory: %s: not UTF-8, or holds a NUL", what);
    return s;
  }
  uint32_t count(uint32_t max, const char* what) {
    const uint32_t n = number<uint32_t>();
    if (n > max) fail("directory: expected at most %u %s, got %u", max, what, n);
    return n;
  }
};

Meta read_meta(Cursor& c, const std::string& key) {
  const uint8_t type = c.number<uint8_t>();
  if (type == 0) return c.number<int64_t>();
  if (type == 1) return c.number<double>();
  if (type == 2) return c.string(kMaxText, key.c_str());
  if (type != 3) fail("directory: key %s: unknown type %u", key.c_str(), type);
  const auto b = c.take(size_t{8} * c.number<uint32_t>());  // before anything is allocated
  std::vector<int64_t> list(b.size() / 8);
  if (!list.empty()) std::memcpy(list.data(), b.data(), b.size());
  return list;
}

QnTensor read_tensor(Cursor& c, uint64_t data_end) {
  QnTensor t;
  t.name = c.string(kMaxName, "name of a tensor");
  if (t.name.empty()) fail("directory: a tensor without a name");
  const char* name = t.name.c_str();
  const uint8_t dtype = c.number<uint8_t>(), kind = c.number<uint8_t>();
  t.group = c.number<uint16_t>();
  const uint8_t ndim = c.number<uint8_t>();
  const auto zero = c.take(3);
  if (dtype >= kDTypes) fail("tensor %s: unknown dtype %u", name, dtype);
  if (kind > 1) fail("tensor %s: unknown kind %u", name, kind);
  if (ndim < 1 || ndim > 4) fail("tensor %s: expected 1 to 4 dims, got %u", name, ndim);
  if (zero[0] | zero[1] | zero[2]) fail("tensor %s: padding is not zero", name);
  t.dtype = static_cast<DType>(dtype);
  t.experts = kind == 1;
  for (int i = 0; i < ndim; i++) {
    const uint64_t d = c.number<uint64_t>();
    if (d < 1 || d > kMaxDim) fail("tensor %s: dim %d: expected 1 to 2^31, got %llu", name, i, static_cast<ull>(d));
    t.shape.push_back(static_cast<int64_t>(d));
  }
  t.offset = c.number<uint64_t>();
  t.bytes = c.number<uint64_t>();
  const uint64_t expected = stored_bytes(t);
  if (t.bytes != expected)
    fail("tensor %s: %s takes %llu bytes, got %llu", name, describe(t.dtype, t.group, t.shape).c_str(), static_cast<ull>(expected),
         static_cast<ull>(t.bytes));
  if (t.offset % kPage || t.offset < kPage || t.offset > data_end || t.bytes > data_end - t.offset)
    fail("tensor %s: %llu bytes at offset %llu: expected whole pages between 4096 and %llu", name, static_cast<ull>(t.bytes),
         static_cast<ull>(t.offset), static_cast<ull>(data_end));
  const uint64_t crcs = t.experts ? static_cast<uint64_t>(t.shape[0]) : 1;
  if (const uint32_t n = c.number<uint32_t>(); n != crcs)
    fail("tensor %s: expected %llu checksums, got %u", name, static_cast<ull>(crcs), n);
  const auto b = c.take(4 * crcs);
  t.crc.resize(crcs);
  std::memcpy(t.crc.data(), b.data(), b.size());
  return t;
}

void check_overlaps(const std::vector<QnTensor>& tensors) {
  std::vector<const QnTensor*> order;
  for (const QnTensor& t : tensors) order.push_back(&t);
  std::sort(order.begin(), order.end(), [](const QnTensor* a, const QnTensor* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); i++)
    if (order[i]->offset - order[i - 1]->offset < order[i - 1]->bytes)
      fail("tensors %s and %s overlap", order[i - 1]->name.c_str(), order[i]->name.c_str());
}

Header read_header(std::span<const uint8_t> file) {
  if (file.size() < sizeof kMagic || std::memcmp(file.data(), kMagic, sizeof kMagic) != 0)
    fail("not a .qn model file (its first bytes differ): make one with qnext-convert");
  if (file.size() < kPage) fail("truncated: the header takes 4096 bytes, file has %zu", file.size());
  Header h;
  std::memcpy(&h, file.data(), sizeof h);
  if (h.version != kVersion)
    fail("format version %u, this program reads version %u: %s", h.version, kVersion,
         h.version > kVersion ? "use a newer qnext, or convert the model again" : "convert the model again");
  if (h.header_bytes != kPage) fail("header: expected 4096 bytes, got %u", h.header_bytes);
  std::vector<uint8_t> page(file.begin(), file.begin() + kPage);
  std::memset(page.data() + offsetof(Header, header_crc), 0, 4);
  if (const uint32_t crc = crc32c(page); crc != h.header_crc)
    fail("header is damaged (checksum %08x, expected %08x): get the file again", crc, h.header_crc);
  if (std::any_of(page.begin() + sizeof h, page.end(), [](uint8_t b) { return b != 0; })) fail("header: padding is not zero");
  if (h.file_bytes != file.size())
    fail("%s: header says %llu bytes, file has %zu", file.size() < h.file_bytes ? "truncated" : "too long",
         static_cast<ull>(h.file_bytes), file.size());
  if (h.dir_bytes < 8 || h.dir_bytes > kMaxDirectory || h.dir_offset < kPage || h.dir_offset % kDirAlign ||
      h.dir_offset > file.size() || h.dir_bytes != file.size() - h.dir_offset)
    fail("header: directory of %llu bytes at offset %llu does not fit a file of %zu bytes", static_cast<ull>(h.dir_bytes),
         static_cast<ull>(h.dir_offset), file.size());
  return h;
}

}  // namespace

uint64_t stored_bytes(const QnTensor& t) {
  const char* name = t.name.c_str();
  const size_t dims = t.shape.size();
  const auto bad = [&](const char* why) {
    fail("tensor %s: %s%s: %s", name, t.experts ? "experts " : "", describe(t.dtype, t.group, t.shape).c_str(), why);
  };
  if (t.experts && (t.dtype == DType::I32 || t.dtype == DType::U8)) bad("experts are f32, bf16, int8 or int4");
  if (t.experts ? dims != 3 : dims < 1 || dims > 4) bad(t.experts ? "expected 3 dims" : "expected 1 to 4 dims");
  if (!t.experts && is_t16(t.dtype) && dims != 2) bad("expected 2 dims");
  for (size_t i = 0; i < dims; i++)
    if (t.shape[i] < 1 || t.shape[i] > (t.experts ? i ? kMaxExpertDim : kMaxExperts : kMaxDim)) bad("a dim is out of range");
  if (!is_t16(t.dtype) && t.group) bad("this dtype has no groups");
  if (is_t16(t.dtype)) {
    if (t.group != 32 && t.group != 64 && t.group != 128) bad("expected a group of 32, 64 or 128");
    for (size_t i = 1; i < dims; i++)  // dense (N, K): K; experts (E, D, F): both
      if (t.shape[i] % t.group) bad("the group does not divide the columns");
  }
  // With the bounds above nothing here exceeds 2^63 but the plain product of dims.
  unsigned __int128 bytes = 1;
  if (t.experts) {
    bytes = static_cast<uint64_t>(expert_layout(t.dtype, t.shape[1], t.shape[2], t.group).stride);
    bytes *= static_cast<uint64_t>(t.shape[0]);
  } else if (is_t16(t.dtype)) {
    bytes = static_cast<uint64_t>(t16_bytes(t.dtype, t.shape[0], t.shape[1], t.group));
  } else {
    bytes = static_cast<uint64_t>(item_bytes(t.dtype));
    for (const int64_t d : t.shape) bytes *= static_cast<uint64_t>(d);  // at most 4 * 2^124
  }
  if (bytes > kMaxBytes) bad("too large");
  return static_cast<uint64_t>(bytes);
}

// ---- QnFile ---------------------------------------------------------------------------------------------------------

QnFile QnFile::open(const std::string& path) {
  QnFile f(File::open_read(path));
  f.path_ = path;
  f.map_ = f.file_.map();
  try {
    const auto file = f.map_.bytes();
    const Header h = read_header(file);
    Cursor c{file.subspan(h.dir_offset, h.dir_bytes)};
    if (const uint32_t crc = crc32c(c.bytes); crc != h.dir_crc)
      fail("directory is damaged (checksum %08x, expected %08x): get the file again", crc, h.dir_crc);
    const uint32_t metas = c.count(kMaxMeta, "keys"), tensors = c.count(kMaxTensors, "tensors");
    for (uint32_t i = 0; i < metas; i++) {
      const std::string key = c.string(kMaxName, "name of a key");
      if (!f.meta_.emplace(key, read_meta(c, key)).second) fail("directory: key %s comes twice", key.c_str());
    }
    for (uint32_t i = 0; i < tensors; i++) {
      f.tensors_.push_back(read_tensor(c, h.dir_offset));
      const std::string& name = f.tensors_.back().name;
      if (!f.index_.emplace(name, i).second) fail("directory: tensor %s comes twice", name.c_str());
    }
    if (c.at != c.bytes.size()) fail("directory: %zu bytes left over after its last entry", c.bytes.size() - c.at);
    check_overlaps(f.tensors_);
  } catch (const Error& e) {
    fail("%s: %s", path.c_str(), e.what());
  }
  return f;
}

const QnTensor* QnFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

Tensor QnFile::dense(const std::string& name, std::span<const DType> dtypes, std::initializer_list<int64_t> shape) const {
  std::string wanted;
  for (size_t i = 0; i < dtypes.size(); i++) wanted += (i ? " or " : "") + std::string(qn::name(dtypes[i]));
  const QnTensor* t = find(name);
  const std::vector<int64_t> dims(shape);
  const std::string expected = describe(DType::F32, 0, dims).substr(3);  // " (64, 2048)"
  if (!t)
    fail("%s: tensor %s is missing, expected %s%s: convert the model again", path_.c_str(), name.c_str(), wanted.c_str(),
         expected.c_str());
  if (t->experts || t->shape != dims || std::find(dtypes.begin(), dtypes.end(), t->dtype) == dtypes.end())
    fail("%s: tensor %s: expected %s%s, got %s%s", path_.c_str(), name.c_str(), wanted.c_str(), expected.c_str(),
         t->experts ? "experts " : "", describe(t->dtype, t->group, t->shape).c_str());
  void* p = const_cast<uint8_t*>(data(*t).data());
  Tensor v = view(p, t->dtype, dims[0]);
  v.ndim = static_cast<uint8_t>(dims.size());
  v.group = t->group;
  for (size_t i = 1; i < dims.size(); i++) {
    v.shape[i] = dims[i];
    v.row_stride *= dims[i];
  }
  return v;
}

Experts QnFile::experts(const std::string& name, int64_t e, int64_t d, int64_t f) const {
  const QnTensor* t = find(name);
  const std::string expected = format("experts (%lld, %lld, %lld)", static_cast<ll>(e), static_cast<ll>(d), static_cast<ll>(f));
  if (!t) fail("%s: tensor %s is missing, expected %s: convert the model again", path_.c_str(), name.c_str(), expected.c_str());
  if (!t->experts || t->shape != std::vector<int64_t>{e, d, f})
    fail("%s: tensor %s: expected %s, got %s%s", path_.c_str(), name.c_str(), expected.c_str(), t->experts ? "experts " : "dense ",
         describe(t->dtype, t->group, t->shape).c_str());
  return {data(*t).data(), t->dtype, t->group, static_cast<int32_t>(e), d, f};
}

// The value of a key as T, or an error that says what is there instead.
template <class T>
static const T& get(const QnFile& f, std::string_view key, const std::string& expected) {
  static const char* const kinds[] = {"an integer", "a real number", "text", "a list of integers"};
  const auto it = f.meta().find(key);
  const std::string where = format("%s: key %.*s", f.path().c_str(), static_cast<int>(key.size()), key.data());
  if (it == f.meta().end()) fail("%s is missing, expected %s: convert the model again", where.c_str(), expected.c_str());
  const T* v = std::get_if<T>(&it->second);
  if (!v) fail("%s: expected %s, got %s", where.c_str(), expected.c_str(), kinds[it->second.index()]);
  return *v;
}

int64_t QnFile::integer(std::string_view key, int64_t min, int64_t max) const {
  const std::string expected = format("an integer from %lld to %lld", static_cast<ll>(min), static_cast<ll>(max));
  const int64_t v = get<int64_t>(*this, key, expected);
  if (v < min || v > max)
    fail("%s: key %.*s: expected %s, got %lld", path_.c_str(), static_cast<int>(key.size()), key.data(), expected.c_str(),
         static_cast<ll>(v));
  return v;
}

double QnFile::real(std::string_view key, double min, double max) const {
  const std::string expected = format("a real number from %g to %g", min, max);
  const double v = get<double>(*this, key, expected);
  if (!(v >= min && v <= max))  // so written, NaN is refused
    fail("%s: key %.*s: expected %s, got %g", path_.c_str(), static_cast<int>(key.size()), key.data(), expected.c_str(), v);
  return v;
}

std::string QnFile::text(std::string_view key) const { return get<std::string>(*this, key, "text"); }

std::vector<int64_t> QnFile::integers(std::string_view key, size_t max_count, int64_t min, int64_t max) const {
  const std::string expected =
      format("at most %zu integers from %lld to %lld", max_count, static_cast<ll>(min), static_cast<ll>(max));
  const auto& v = get<std::vector<int64_t>>(*this, key, expected);
  const std::string where = format("%s: key %.*s", path_.c_str(), static_cast<int>(key.size()), key.data());
  if (v.size() > max_count) fail("%s: expected %s, got %zu of them", where.c_str(), expected.c_str(), v.size());
  for (const int64_t i : v)
    if (i < min || i > max) fail("%s: expected %s, got %lld", where.c_str(), expected.c_str(), static_cast<ll>(i));
  return v;
}

bool QnFile::intact(const QnTensor& t, size_t record, const std::function<void(uint64_t)>& progress) const {
  QN_CHECK(record < t.crc.size(), "tensor %s: record %zu of %zu", t.name.c_str(), record, t.crc.size());
  const uint64_t bytes = t.bytes / t.crc.size(), begin = t.offset + record * bytes, step = uint64_t{4} << 20;
  uint32_t crc = 0;
  for (uint64_t at = 0; at < bytes; at += step) {
    const uint64_t n = std::min(step, bytes - at);
    map_.will_need(begin + at, 2 * step);  // page faults alone would read a disk 128 kB at a time
    crc = crc32c(map_.bytes().subspan(begin + at, n), crc);
    if (progress) progress(n);
  }
  return crc == t.crc[record];
}

void QnFile::damaged(const QnTensor& t, size_t record) const {
  fail("%s: tensor %s%s is damaged (checksum differs): get the file again", path_.c_str(), t.name.c_str(),
       t.experts ? format(", expert %zu,", record).c_str() : "");
}

void QnFile::check(const QnTensor& t, size_t record) const {
  if (!intact(t, record)) damaged(t, record);
}

void QnFile::verify(int threads, const std::function<void(uint64_t done, uint64_t total)>& progress,
                    const std::function<bool(const QnTensor&)>& which) const {
  struct Piece {
    const QnTensor* tensor;
    size_t record;
  };
  std::vector<Piece> pieces;
  uint64_t total = 0;
  for (const QnTensor& t : tensors_) {
    if (which && !which(t)) continue;
    total += t.bytes;
    for (size_t e = 0; e < t.crc.size(); e++) pieces.push_back({&t, e});
  }
  // Pieces are handed out in order and all before the first bad one are finished, so the one named does not depend on luck.
  std::atomic<size_t> bad = pieces.size();
  std::atomic<uint64_t> done = 0;
  Threads pool(threads);
  pool.run([&](int thread) {
    for (size_t i; (i = static_cast<size_t>(pool.next_task())) < bad.load();) {
      const bool good = intact(*pieces[i].tensor, pieces[i].record, [&](uint64_t n) {
        done += n;
        if (thread == 0 && progress) progress(done, total);
      });
      if (good) continue;
      for (size_t first = bad.load(); i < first && !bad.compare_exchange_weak(first, i);) {
      }
    }
  });
  if (bad < pieces.size()) damaged(*pieces[bad].tensor, pieces[bad].record);
  if (progress) progress(total, total);
}

double QnFile::hold(int threads, bool must, const std::function<void(uint64_t done, uint64_t total)>& progress) {
  constexpr uint64_t kPiece = 8ull << 20;  // whole huge pages: the thread that fills one has touched it first
  const uint64_t total = size();
  const auto start = std::chrono::steady_clock::now();
  Arena memory;
  try {
    memory = Arena(total);
  } catch (const Error&) {
    if (must) throw;
    return 0;
  }
  std::atomic<uint64_t> done = 0;
  Threads pool(threads);
  pool.run([&](int thread) {
    for (uint64_t at; (at = static_cast<uint64_t>(pool.next_task()) * kPiece) < total;) {
      const uint64_t n = std::min(kPiece, total - at);
      file_.read(at, {memory.data() + at, n});
      done += n;
      if (thread == 0 && progress) progress(done, total);
    }
  });
  map_ = Mapping(std::move(memory));
  if (progress) progress(total, total);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// ---- QnWriter -------------------------------------------------------------------------------------------------------

namespace {

struct Encoder {
  std::vector<uint8_t> bytes;

  void raw(const void* p, size_t n) {
    bytes.insert(bytes.end(), static_cast<const uint8_t*>(p), static_cast<const uint8_t*>(p) + n);
  }
  template <class T>
  void number(T v) {
    raw(&v, sizeof v);
  }
  void string(const std::string& s) {
    number(static_cast<uint32_t>(s.size()));
    raw(s.data(), s.size());
  }
  void meta(const Meta& m) {
    number(static_cast<uint8_t>(m.index()));
    if (const auto* i = std::get_if<int64_t>(&m)) number(*i);
    if (const auto* d = std::get_if<double>(&m)) number(*d);
    if (const auto* s = std::get_if<std::string>(&m)) string(*s);
    if (const auto* list = std::get_if<std::vector<int64_t>>(&m)) {
      number(static_cast<uint32_t>(list->size()));
      for (const int64_t v : *list) number(v);
    }
  }
  void tensor(const QnTensor& t) {
    string(t.name);
    number(static_cast<uint8_t>(t.dtype));
    number(static_cast<uint8_t>(t.experts));
    number(t.group);
    number(static_cast<uint32_t>(t.shape.size()));  // u8 ndim and three zeros
    for (const int64_t d : t.shape) number(static_cast<uint64_t>(d));
    number(t.offset);
    number(t.bytes);
    number(static_cast<uint32_t>(t.crc.size()));
    for (const uint32_t c : t.crc) number(c);
  }
};

}  // namespace

struct QnWriter::Impl {
  struct Declared {
    QnTensor t;
    bool section;
    uint64_t written = 0;        // dense: bytes so far
    std::vector<uint8_t> done;   // experts: one flag per record (bytes, so that threads may set neighbours)
  };

  std::string path;
  OutFile out;
  std::map<std::string, Meta> meta;
  std::vector<Declared> tensors;
  std::set<std::string> names;
  uint64_t dir_offset = 0;  // 0 until layout()

  explicit Impl(const std::string& p) : path(p), out(p) {}

  Declared& at(size_t i) {
    QN_CHECK(dir_offset && i < tensors.size(), "tensor %zu of %zu, layout() %s", i, tensors.size(),
             dir_offset ? "done" : "not done");
    return tensors[i];
  }

  std::vector<uint8_t> directory() const {
    Encoder e;
    e.number(static_cast<uint32_t>(meta.size()));
    e.number(static_cast<uint32_t>(tensors.size()));
    for (const auto& [key, value] : meta) {
      e.string(key);
      e.meta(value);
    }
    for (const Declared& d : tensors) e.tensor(d.t);
    return std::move(e.bytes);
  }
};

QnWriter::QnWriter(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
QnWriter::~QnWriter() = default;

void QnWriter::set(const std::string& key, Meta value) {
  const auto* s = std::get_if<std::string>(&value);
  const bool good_key = !key.empty() && key.size() <= kMaxName && is_utf8_without_nul(key);
  if (!good_key || (s && (s->size() > kMaxText || !is_utf8_without_nul(*s))))
    fail("%s: cannot store key %s: expected UTF-8 text without NUL, a name of at most %u and a value of at most %u bytes",
         impl_->path.c_str(), key.c_str(), kMaxName, kMaxText);
  impl_->meta.insert_or_assign(key, std::move(value));
}

size_t QnWriter::declare(QnTensor t, bool section) {
  QN_CHECK(!impl_->dir_offset, "declare(%s) after layout()", t.name.c_str());
  if (t.name.empty() || t.name.size() > kMaxName || !is_utf8_without_nul(t.name) || impl_->tensors.size() == kMaxTensors)
    fail("%s: cannot store tensor %s: bad name, or too many tensors", impl_->path.c_str(), t.name.c_str());
  if (!impl_->names.insert(t.name).second) fail("%s: tensor %s comes twice", impl_->path.c_str(), t.name.c_str());
  t.bytes = stored_bytes(t);
  const size_t crcs = t.experts ? static_cast<size_t>(t.shape[0]) : 1;
  t.crc.assign(crcs, 0);
  impl_->tensors.push_back({std::move(t), section, 0, std::vector<uint8_t>(crcs)});
  return impl_->tensors.size() - 1;
}

void QnWriter::layout() {
  QN_CHECK(!impl_->dir_offset, "layout() twice");
  uint64_t end = kPage;
  for (auto& d : impl_->tensors) {
    d.t.offset = round_up(static_cast<int64_t>(end), d.section ? kSection : kPage);
    end = d.t.offset + d.t.bytes;
    if (end > kMaxBytes) fail("%s: too large at tensor %s", impl_->path.c_str(), d.t.name.c_str());
  }
  impl_->dir_offset = round_up(static_cast<int64_t>(end), kDirAlign);
}

const QnTensor& QnWriter::tensor(size_t i) const {
  QN_CHECK(i < impl_->tensors.size(), "tensor %zu of %zu", i, impl_->tensors.size());
  return impl_->tensors[i].t;
}

uint64_t QnWriter::total_bytes() const {
  QN_CHECK(impl_->dir_offset, "total_bytes() before layout()");
  return impl_->dir_offset + impl_->directory().size();
}

void QnWriter::write(size_t i, std::span<const uint8_t> bytes) {
  auto& d = impl_->at(i);
  QN_CHECK(!d.t.experts && bytes.size() <= d.t.bytes - d.written, "tensor %s: %zu bytes after %llu of %llu", d.t.name.c_str(),
           bytes.size(), static_cast<ull>(d.written), static_cast<ull>(d.t.bytes));
  impl_->out.write(d.t.offset + d.written, bytes);
  d.t.crc[0] = crc32c(bytes, d.t.crc[0]);
  d.written += bytes.size();
}

void QnWriter::write_expert(size_t i, int64_t e, std::span<const uint8_t> record) {
  auto& d = impl_->at(i);
  QN_CHECK(d.t.experts && e >= 0 && e < d.t.shape[0] && !d.done[e], "tensor %s: expert %lld is none, or written before",
           d.t.name.c_str(), static_cast<ll>(e));
  const ExpertLayout l = expert_layout(d.t.dtype, d.t.shape[1], d.t.shape[2], d.t.group);
  const int64_t size = static_cast<int64_t>(record.size());
  QN_CHECK(size == l.bytes || size == l.stride, "tensor %s: record of %lld bytes, expected %lld or %lld", d.t.name.c_str(),
           static_cast<ll>(size), static_cast<ll>(l.bytes), static_cast<ll>(l.stride));
  impl_->out.write(d.t.offset + static_cast<uint64_t>(e * l.stride), record);
  static const uint8_t zeros[kPage] = {};  // what is left of the last page is a hole in the file, that is zero
  d.t.crc[e] = crc32c({zeros, static_cast<size_t>(l.stride - size)}, crc32c(record));
  d.done[e] = 1;
}

void QnWriter::finish() {
  Impl& w = *impl_;
  QN_CHECK(w.dir_offset, "finish() before layout()");
  for (const auto& d : w.tensors) {
    const char* name = d.t.name.c_str();
    if (!d.t.experts && d.written != d.t.bytes)
      fail("%s: tensor %s: %llu of %llu bytes were written", w.path.c_str(), name, static_cast<ull>(d.written),
           static_cast<ull>(d.t.bytes));
    const auto missing = std::find(d.done.begin(), d.done.end(), 0);
    if (d.t.experts && missing != d.done.end())
      fail("%s: tensor %s: expert %zd was not written", w.path.c_str(), name, missing - d.done.begin());
  }
  const std::vector<uint8_t> dir = w.directory();
  if (w.meta.size() > kMaxMeta || dir.size() > kMaxDirectory)
    fail("%s: directory too large: %zu bytes", w.path.c_str(), dir.size());
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.header_bytes = kPage;
  h.file_bytes = w.dir_offset + dir.size();
  h.dir_offset = w.dir_offset;
  h.dir_bytes = dir.size();
  h.dir_crc = crc32c(dir);
  std::vector<uint8_t> page(kPage);
  std::memcpy(page.data(), &h, sizeof h);
  h.header_crc = crc32c(page);
  std::memcpy(page.data(), &h, sizeof h);
  w.out.write(w.dir_offset, dir);
  w.out.write(0, page);
  w.out.commit();
}

}  // namespace qn
