// qnext-fuzz: random damage for everything that reads files.
//
//   qnext-fuzz [--seconds S] [--count N] [--seed X] [--first I] [--verbose 1] KIND FILE...
//
// FILE: a seed; for "convert" a folder, for "tokenizer-json" a file of the name tokenizer.json. --verbose 1 prints why mutants are refused. Mutants lie in TMPDIR: one in memory is faster.
//
// Case i of seed X is always the same mutant. A case is good when the reader accepts the mutant or throws qn::Error; any other
// exception, a crash, more than 10 s or more than 1.5 GiB is a failure: its mutant is kept, and the exit status is 1. The cases
// run in a child process, so that the parent sees crashes and endless loops from outside.
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <typeinfo>

#include "convert/convert.h"
#include "convert/tokenizer_json.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/base/json.h"
#include "ggml-lite/base/safetensors.h"
#include "ggml-lite/core/qn.h"
#include "ggml-lite/text/tokenizer.h"
#include "qnext.h"
#include "quantize/requantize.h"
#include "tests/temp_dir.h"

using namespace qn;
using Bytes = std::vector<uint8_t>;
using ull = unsigned long long;

namespace {

constexpr int kMaxSeconds = 10;
constexpr uint64_t kMaxMemory = uint64_t{3} << 29;  // 1.5 GiB

// ---- mutants ------------------------------------------------------------------------------------------------------------

struct SeedFile {
  std::string name;  // inside its folder; the seed's own name when it is a single file
  Bytes bytes;
};
using Seed = std::vector<SeedFile>;  // one file, or all files of a folder

uint64_t read_number(const Bytes& b, size_t at, size_t size = 8) {
  uint64_t v = 0;
  if (at + size <= b.size()) std::memcpy(&v, b.data() + at, size);
  return v;
}

void write_number(Bytes& b, size_t at, uint64_t v, size_t size) {
  if (at + size <= b.size()) std::memcpy(b.data() + at, &v, size);
}

bool is_qn(const Bytes& b) { return b.size() >= 4096 && std::memcmp(b.data(), "QNMODEL\x1a", 8) == 0; }
bool is_json(const Bytes& b) { return !b.empty() && (b[0] == '{' || b[0] == '['); }
bool is_safetensors(const Bytes& b) { return b.size() > 8 && b[8] == '{' && read_number(b, 0) <= b.size() - 8; }

struct Mutator {
  std::mt19937_64 rng;
  const std::vector<Seed>& seeds;

  size_t below(size_t n) { return n ? rng() % n : 0; }
  bool one_in(size_t n) { return below(n) == 0; }

  // Where damage is interesting: the parts with structure, mostly. Elsewhere lie weights.
  size_t place(const Bytes& b) {
    if (one_in(8)) return below(b.size());
    if (is_qn(b)) {
      const uint64_t dir = read_number(b, 24);
      const size_t size = b.size() - std::min<size_t>(dir, b.size());
      if (size && !one_in(8)) return dir + below(one_in(2) ? std::min<size_t>(size, 2000) : size);  // keys come first
      return below(48);
    }
    if (is_safetensors(b)) return below(8 + read_number(b, 0));
    if (is_json(b) && one_in(2)) return below(std::min<size_t>(b.size(), 8000));  // of tokenizer.json: all but the long lists
    return below(b.size());
  }

  uint64_t interesting() {
    static const uint64_t values[] = {
        0, 1, 2, 3, 4, 7, 8, 31, 32, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536, UINT64_MAX, 0x7fffffff, 0x80000000,
        0xffffffff, 0x100000000, 0x4000000000000000, 0x7fffffffffffffff, 0x8000000000000000,
        0x7ff0000000000000, 0x7ff8000000000000};  // the last two: infinity and NaN
    return one_in(16) ? rng() : values[below(std::size(values))];
  }

  // Replaces [at, at + n) by `with`. The length that a safetensors file gives for its header mostly follows, or else no damage
  // inside would ever be looked at.
  void splice(Bytes& b, size_t at, size_t n, const Bytes& with) {
    n = std::min(n, b.size() - at);
    const bool header = is_safetensors(b) && at >= 8 && at < 8 + read_number(b, 0);
    const uint64_t length = read_number(b, 0) + with.size() - n;
    b.erase(b.begin() + static_cast<ptrdiff_t>(at), b.begin() + static_cast<ptrdiff_t>(at + n));
    b.insert(b.begin() + static_cast<ptrdiff_t>(at), with.begin(), with.end());
    if (header && !one_in(8)) write_number(b, 0, length, 8);
  }

  // A number written as text near `at` becomes another one, or something else.
  void tweak_text(Bytes& b, size_t at) {
    static const char* const words[] = {
        "0", "-1", "1", "3", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "1e999", "-0", "1.5",
        "1e-320", "null", "true", "[]", "{}", "\"x\"", "[1,2,3]", "1000000", "00", "\"\\ud800\"", "NaN"};
    const auto digit = [&](size_t i) { return i < b.size() && b[i] >= '0' && b[i] <= '9'; };
    const size_t limit = std::min(b.size(), at + 4096);
    while (at < limit && !digit(at)) at++;
    if (at == limit) return;
    size_t end = at;
    while (digit(end)) end++;
    const std::string word = words[below(std::size(words))];
    splice(b, at, end - at, Bytes(word.begin(), word.end()));
  }

  // A whole token of JSON near `at`: what comes after the next bracket, colon or comma.
  static std::pair<size_t, size_t> token(const Bytes& b, size_t at) {
    const auto one_of = [&](size_t i, const char* set) { return b[i] != 0 && std::strchr(set, b[i]); };
    while (at < b.size() && !one_of(at, "{[:,")) at++;
    for (at = std::min(at + 1, b.size()); at < b.size() && std::isspace(b[at]);) at++;
    size_t end = at;
    if (at < b.size() && b[at] == '"') {
      for (end++; end < b.size() && b[end] != '"';) end += b[end] == '\\' ? 2 : 1;
      end++;
    } else {
      while (end < b.size() && !one_of(end, "{}[]:,\" \n")) end++;
    }
    return {at, std::min(std::max(end, at + 1), b.size())};
  }

  // Such a token is replaced by another one of some seed or by a value of another kind, doubled, or taken out.
  void damage_token(Bytes& b, size_t at) {
    static const char* const values[] = {"null", "true", "{}", "[]", "\"\"", "\" \"", "0", "-1", "\"a b\"", "[\"a\",\"b\"]", "1e999"};
    const auto [begin, end] = token(b, at);
    const size_t n = end - begin;
    const Bytes same(b.begin() + static_cast<ptrdiff_t>(begin), b.begin() + static_cast<ptrdiff_t>(end));
    switch (below(4)) {
      case 0: {
        const std::string value = values[below(std::size(values))];
        return splice(b, begin, n, Bytes(value.begin(), value.end()));
      }
      case 1: {
        const Seed& s = seeds[below(seeds.size())];
        const Bytes& from = s[below(s.size())].bytes;
        const auto [first, last] = token(from, from.empty() ? 0 : place(from));
        return splice(b, begin, n, Bytes(from.begin() + static_cast<ptrdiff_t>(first), from.begin() + static_cast<ptrdiff_t>(last)));
      }
      case 2: {
        Bytes twice = same;
        twice.push_back(',');
        twice.insert(twice.end(), same.begin(), same.end());
        return splice(b, begin, n, twice);
      }
      default: return splice(b, begin, n + (end < b.size() && b[end] == ','), {});
    }
  }

  void damage(Bytes& b) {
    if (b.empty()) return b.push_back(static_cast<uint8_t>(rng()));
    const size_t at = place(b);
    switch (below(is_qn(b) ? 8 : 12)) {
      case 0: b[at] ^= static_cast<uint8_t>(1 << below(8)); break;
      case 1: b[at] = static_cast<uint8_t>(rng()); break;
      case 2:
      case 3:
      case 4: write_number(b, at, interesting(), size_t{1} << below(4)); break;
      case 5: {  // a number plus or minus a little
        const size_t size = size_t{1} << below(4);
        write_number(b, at, read_number(b, at, size) + below(17) - 8, size);
        break;
      }
      case 6: {  // a stretch of some seed
        const Seed& s = seeds[below(seeds.size())];
        const Bytes& from = s[below(s.size())].bytes;
        const size_t begin = from.empty() ? 0 : place(from), n = std::min(from.size() - begin, below(one_in(4) ? 5000 : 40));
        const Bytes piece(from.begin() + static_cast<ptrdiff_t>(begin), from.begin() + static_cast<ptrdiff_t>(begin + n));
        splice(b, at, one_in(2) ? n : below(40), piece);
        break;
      }
      case 7:
        if (one_in(3)) b.resize(at);                                              // truncation
        else if (one_in(2)) splice(b, at, below(64), {});                         // removal
        else splice(b, at, 0, Bytes(1 + below(64), static_cast<uint8_t>(rng())));  // insertion
        break;
      case 8:
      case 9: tweak_text(b, at); break;
      default: damage_token(b, at); break;
    }
  }
};

// Makes the checksums of a .qn file right again, and mostly its sizes, so that hostile values get past the first checks.
void repair(Bytes& b, Mutator& m) {
  if (b.size() < 4096) return;
  if (!m.one_in(8)) std::memcpy(b.data(), "QNMODEL\x1a\1\0\0\0\0\x10\0\0", 16);
  if (!m.one_in(8)) write_number(b, 16, b.size(), 8);
  const uint64_t dir = read_number(b, 24);
  if (dir <= b.size() && !m.one_in(8)) write_number(b, 32, b.size() - dir, 8);
  const uint64_t size = read_number(b, 32);
  if (dir <= b.size() && size <= b.size() - dir) write_number(b, 40, crc32c(std::span(b).subspan(dir, size)), 4);
  write_number(b, 44, 0, 4);
  write_number(b, 44, crc32c(std::span(b).first(4096)), 4);
}

// ---- kinds --------------------------------------------------------------------------------------------------------------

// `path` is the mutant's file or folder, `bytes` the content of the file that was damaged, `out` a name nothing has yet.
struct Case {
  const std::string& path;
  const Bytes& bytes;
  const std::string& out;
};

void feed_json(const Case& c) {
  const std::string text(c.bytes.begin(), c.bytes.end());
  const Json j = Json::parse(text, "fuzz");
  const std::string again = j.dump();
  if (Json::parse(again, "fuzz").dump() != again) throw std::runtime_error("dump() is not stable");
  j.dump_python();
}

void use_tokenizer(const Tokenizer& t) {
  const auto ids = t.encode("Hello <|im_start|>w\xc3\xb6rld 123\n\n  \xe4\xbd\xa0\xe5\xa5\xbd", true);
  t.decode(ids);
  for (const int32_t id : {-1, 0, 1, t.size() - 1, t.size(), INT32_MAX}) {
    if (t.has(id) != !t.bytes(id).empty() && !t.special(id)) throw std::runtime_error("has() and bytes() disagree");
  }
  t.find_added("<|im_end|>");
}

void feed_tokenizer(const Case& c) { use_tokenizer(Tokenizer(c.bytes)); }

void feed_tokenizer_json(const Case& c) {
  const std::vector<uint8_t> tables = pack(read_tokenizer(c.path));
  use_tokenizer(Tokenizer(tables));
}

void feed_safetensors(const Case& c) {
  const SafeTensors s = SafeTensors::open_file(c.path);
  for (const auto& [name, t] : s.tensors()) {
    Bytes end(std::min<uint64_t>(t.bytes, 64));
    s.read(t, t.bytes - end.size(), end);
  }
}

void feed_qn(const Case& c) {
  const QnFile f = QnFile::open(c.path);
  uint64_t sum = 0;
  for (const QnTensor& t : f.tensors()) sum += f.data(t).front() + f.data(t).back();
  if (sum == UINT64_MAX) throw std::runtime_error("cannot be");
  for (const auto& [key, value] : f.meta())
    if (std::holds_alternative<std::vector<int64_t>>(value)) f.integers(key, SIZE_MAX, INT64_MIN, INT64_MAX);
  f.verify(1);
}

void feed_engine(const Case& c) {
  qnext::Options options;
  options.device = "cpu";
  options.threads = 1;
  options.ctx = 64;
  options.ram = kMaxMemory;
  options.verify = qnext::Verify::No;
  qnext::Engine engine = qnext::Engine::open(c.path, options);
  qnext::Session session(engine);
  const int last = engine.info().vocab - 1;
  const std::vector<int32_t> tokens{0, std::min(1, last), std::min(2, last)};
  session.sync(tokens);
  qnext::GenerateParams generate;
  generate.max_tokens = 4;
  session.generate(generate, [](const qnext::Delivery&) { return true; });
  if (engine.has_tokenizer()) engine.tokenize("Hello <|im_end|>", true);
}

// What was just written must be sound, whatever it was made from.
void reopen(const std::string& path) {
  try {
    QnFile::open(path).verify(1);
  } catch (const Error& e) {
    throw std::runtime_error(std::string("what was written cannot be read: ") + e.what());
  }
}

void feed_convert(const Case& c) {
  ConvertOptions options;
  options.threads = 1;
  convert_folder(c.path, c.out, options);
  reopen(c.out);
}

void feed_quantize(const Case& c) {
  RequantizeOptions options;
  options.experts = DType::INT4, options.rest = DType::INT8, options.group = 32;
  options.threads = 1, options.allow_requantize = true;
  requantize(c.path, c.out, options);
  reopen(c.out);
}

struct FuzzKind {
  const char* name;
  void (*feed)(const Case&);
  enum { Memory, File, Folder } in;  // what the mutant lies in
  bool repaired;                     // .qn: with checksums made right
};

constexpr FuzzKind kKinds[] = {
    {"json", feed_json, FuzzKind::Memory, false},
    {"tokenizer", feed_tokenizer, FuzzKind::Memory, false},  // packed tables, or a .qn that holds them
    {"tokenizer-json", feed_tokenizer_json, FuzzKind::Folder, false},
    {"safetensors", feed_safetensors, FuzzKind::File, false},
    {"qn", feed_qn, FuzzKind::File, false},
    {"qn-repaired", feed_qn, FuzzKind::File, true},
    {"quantize", feed_quantize, FuzzKind::File, true},
    {"engine", feed_engine, FuzzKind::File, true},
    {"convert", feed_convert, FuzzKind::Folder, false},
};

// ---- running ------------------------------------------------------------------------------------------------------------

struct Run {
  const FuzzKind* kind = nullptr;
  uint64_t count = UINT64_MAX, seed = 1, first = 0;
  double seconds = 0;
  bool verbose = false;
  std::vector<Seed> seeds;
};

// The same model without the room between sections, which small models hardly use.
Bytes compact(const std::string& path) {
  const TempDir dir;
  const QnFile f = QnFile::open(path);
  QnWriter w(dir / "compact");
  for (const auto& [key, value] : f.meta()) w.set(key, value);
  for (const QnTensor& t : f.tensors()) w.declare(t);
  w.layout();
  for (size_t i = 0; i < f.tensors().size(); i++) {
    const QnTensor& t = f.tensors()[i];
    const size_t record = t.bytes / t.crc.size();
    if (!t.experts) w.write(i, f.data(t));
    for (size_t e = 0; t.experts && e < t.crc.size(); e++)
      w.write_expert(i, static_cast<int64_t>(e), f.data(t).subspan(e * record, record));
  }
  w.finish();
  return file_bytes(dir / "compact");
}

Seed load(const FuzzKind& kind, const std::string& path) {
  Seed s;
  if (!is_directory(path)) {
    s.push_back({std::filesystem::path(path).filename().string(), file_bytes(path)});
    if (!is_qn(s[0].bytes)) return s;
    if (kind.feed != feed_tokenizer) {
      s[0].bytes = compact(path);
    } else {
      const QnFile f = QnFile::open(path);
      const QnTensor* t = f.find("tokenizer");
      if (!t) fail("%s: holds no tokenizer", path.c_str());
      s[0].bytes.assign(f.data(*t).begin(), f.data(*t).end());
    }
    return s;
  }
  for (const auto& e : std::filesystem::directory_iterator(path)) {
    const std::string name = e.path().filename().string();
    const bool json = name.ends_with(".json"), weights = name.ends_with(".safetensors") && !name.starts_with("expected");
    if (e.is_regular_file() && (json || weights)) s.push_back({name, file_bytes(e.path().string())});
  }
  std::sort(s.begin(), s.end(), [](const SeedFile& a, const SeedFile& b) { return a.name < b.name; });
  if (s.empty()) fail("%s: nothing to damage in this folder", path.c_str());
  return s;
}

// Case i: which seed, which of its files, and what became of that.
struct Mutant {
  const Seed* seed;
  size_t file;
  Bytes bytes;
};

Mutant make_mutant(const Run& run, uint64_t i) {
  std::seed_seq sequence{run.seed, run.seed >> 32, i, i >> 32};  // takes the low half of each
  Mutator m{std::mt19937_64(sequence), run.seeds};
  const Seed& seed = run.seeds[m.below(run.seeds.size())];
  Mutant r{&seed, m.below(seed.size()), {}};
  r.bytes = seed[r.file].bytes;
  const bool whole_tokens = is_json(r.bytes) && m.one_in(2);  // mostly still JSON: for what comes after the parser
  for (size_t n = m.one_in(2) ? 1 : 1 + m.below(5); n > 0; n--) {
    if (whole_tokens) m.damage_token(r.bytes, m.place(r.bytes));
    else m.damage(r.bytes);
  }
  if (run.kind->repaired) repair(r.bytes, m);
  return r;
}

enum Outcome : uint8_t { kStarted, kAccepted, kRefused, kFailed };
struct Report {
  uint64_t index;
  Outcome outcome;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Outcome run_case(const Run& run, uint64_t i, const std::string& temp) {
  const Mutant m = make_mutant(run, i);
  const std::string out = temp + "/out.qn", single = temp + "/mutant", folder = temp + "/folder";
  const bool is_folder = run.kind->in == FuzzKind::Folder;
  std::filesystem::remove(out);
  if (run.kind->in == FuzzKind::File) put_file(single, m.bytes);
  if (is_folder) {
    std::filesystem::remove_all(folder);  // the last seed may have had other files
    std::filesystem::create_directories(folder);
    for (size_t f = 0; f < m.seed->size(); f++)
      put_file(folder + "/" + (*m.seed)[f].name, f == m.file ? m.bytes : (*m.seed)[f].bytes);
  }
  Outcome outcome = kAccepted;
  try {
    run.kind->feed({is_folder ? folder : single, m.bytes, out});
  } catch (const Error& e) {
    outcome = kRefused;
    if (run.verbose) std::fprintf(stderr, "%llu: %s\n", ull(i), e.what());
    if (std::strlen(e.what()) > 10000) {
      std::fprintf(stderr, "message of %zu bytes\n", std::strlen(e.what()));
      return kFailed;
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", typeid(e).name(), e.what());
    return kFailed;
  }
  if (peak_rss() > kMaxMemory) {
    std::fprintf(stderr, "memory: %.2f GiB\n", static_cast<double>(peak_rss()) / (1 << 30));
    return kFailed;
  }
  return outcome;
}

[[noreturn]] void child(const Run& run, int pipe, const std::string& temp) {
#if !defined(__SANITIZE_ADDRESS__)
  const rlimit limit{kMaxMemory, kMaxMemory};
  ::setrlimit(RLIMIT_AS, &limit);
#endif
  const auto tell = [&](uint64_t i, Outcome o) {
    const Report r{i, o};
    if (::write(pipe, &r, sizeof r) != sizeof r) ::_exit(3);
  };
  const double end = now() + run.seconds;
  uint64_t done = 0;
  for (uint64_t i = run.first; done < run.count && (run.seconds == 0 || now() < end); i++, done++) {
    tell(i, kStarted);
    const Outcome outcome = run_case(run, i, temp);
    tell(i, outcome);
    if (outcome == kFailed) ::_exit(1);
  }
  ::_exit(0);
}

void keep(const Run& run, uint64_t i) {
  const Mutant m = make_mutant(run, i);
  const std::string name = format("fuzz-%s-%llu-%llu-%s", run.kind->name, ull(run.seed), ull(i), (*m.seed)[m.file].name.c_str());
  put_file(name, m.bytes);
  std::fprintf(stderr, "the mutant is in %s; again: --seed %llu --first %llu --count 1\n", name.c_str(), ull(run.seed),
               ull(i));
}

int parent(const Run& run) {
  int fds[2];
  if (::pipe(fds) != 0) fail("no pipe");
  const TempDir dir;
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::close(fds[0]);
    child(run, fds[1], dir.path);
  }
  ::close(fds[1]);
  Report last{run.first, kStarted};
  uint64_t counts[4] = {};
  const char* failure = nullptr;
  for (bool open = true; open && !failure;) {
    pollfd p{fds[0], POLLIN, 0};
    const int ready = ::poll(&p, 1, kMaxSeconds * 1000);
    if (ready < 0 && errno == EINTR) continue;
    open = ready <= 0 || ::read(fds[0], &last, sizeof last) == sizeof last;  // reports are far below the size a pipe writes at once
    if (ready == 0) failure = "no answer for 10 s";
    else if (open) counts[last.outcome]++;
    if (open && last.outcome == kFailed) failure = "failed";
  }
  if (failure) ::kill(pid, SIGKILL);
  int status = 0;
  ::waitpid(pid, &status, 0);
  if (!failure && status != 0) failure = "crashed";
  std::printf("%s: %llu cases: %llu accepted, %llu refused%s%s\n", run.kind->name, ull(counts[kStarted]),
              ull(counts[kAccepted]), ull(counts[kRefused]), failure ? ", then one " : "",
              failure ? failure : "");
  if (failure) keep(run, last.index);
  return failure ? 1 : 0;
}

int usage() {
  std::fprintf(stderr, "usage: qnext-fuzz [--seconds S] [--count N] [--seed X] [--first I] [--verbose 1] KIND FILE...\nkinds:");
  for (const FuzzKind& k : kKinds) std::fprintf(stderr, " %s", k.name);
  std::fprintf(stderr, "\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  Run run;
  int at = 1;
  for (; at + 1 < argc && argv[at][0] == '-'; at += 2) {
    const std::string option = argv[at];
    const uint64_t value = std::strtoull(argv[at + 1], nullptr, 10);
    if (option == "--seconds") run.seconds = std::strtod(argv[at + 1], nullptr);
    else if (option == "--count") run.count = value;
    else if (option == "--seed") run.seed = value;
    else if (option == "--first") run.first = value;
    else if (option == "--verbose") run.verbose = value != 0;
    else return usage();
  }
  for (const FuzzKind& k : kKinds)
    if (at < argc && std::string(argv[at]) == k.name) run.kind = &k;
  if (!run.kind || at + 1 >= argc) return usage();
  if (run.seconds == 0 && run.count == UINT64_MAX) run.seconds = 10;
  try {
    for (int i = at + 1; i < argc; i++) run.seeds.push_back(load(*run.kind, argv[i]));
    return parent(run);
  } catch (const Error& e) {
    std::fprintf(stderr, "qnext-fuzz: %s\n", e.what());
    return 2;
  }
}
