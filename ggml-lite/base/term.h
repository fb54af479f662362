// The terminal: progress bar, line editor, colours. The only place that prints a carriage return or an escape sequence.
// Everything here writes to stderr (the model's words own stdout).
#pragma once
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace qn {

bool stdin_is_terminal();
bool stdout_is_terminal();
bool stderr_is_terminal();

// The end of a program: `code`, or 1 and a line on stderr when something printed to standard output is lost, as on a full disk.
int exit_code(const char* program, int code);

enum class Style { Plain, Dim, Bold, Red, Green, Cyan };
// Escape sequences for what goes to `fd` (2 stderr, 1 stdout); "" when that is no terminal or after colours(false).
std::string_view style_on(Style s, int fd = 2);
std::string_view style_off(int fd = 2);
void colours(bool on);

// What long work reports: done of total units. Called from one thread at a time.
using Progress = std::function<void(std::string_view what, uint64_t done, uint64_t total)>;

// A bar with rate and ETA, redrawn in place at most ten times a second on a terminal and wiped by finish(); plain lines every
// five seconds and one at the end elsewhere. Unit "B" prints as GB and GB/s, others as plain counts and per second.
// Nothing at all is printed for work that ends within `quiet_seconds`.
class ProgressBar {
 public:
  ProgressBar(std::string what, std::string unit, double quiet_seconds = 1.0);
  ~ProgressBar();  // finish()
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  void update(uint64_t done, uint64_t total);
  void finish();

 private:
  struct State;
  std::unique_ptr<State> s_;
};

// A Progress that draws one bar after another: a new one whenever `what` changes; a bar ends when done reaches total or with
// the last copy of the function.
Progress progress_bars(std::string unit, double quiet_seconds = 1.0);

// Line editor with history (up/down), left/right, words (ctrl or alt with them), home/end, ctrl-a/e/b/f/p/n/d/u/k/w/l, UTF-8
// aware; falls back to plain lines, without a prompt, when stdin or stderr is no terminal. A line ending in '\' goes on with
// the next one, as does alt-enter; pasted newlines (bracketed paste) stay in the text.
// Returns false at end of input; throws nothing. Ctrl-C empties the line; on an empty one it returns with interrupted = true.
struct LineEditor {
  std::vector<std::string> history;
  bool read_line(const std::string& prompt, std::string& line, bool& interrupted);
};

std::string human_bytes(uint64_t bytes);      // "45.5 GB" (decimal), "812 kB", "17 B"
std::string human_gib(uint64_t bytes);        // "42.4 GiB", "812 MiB"
std::string human_seconds(double seconds);    // "0.8 s", "3 min 20 s", "2 h 5 min"
// "24G" is GiB; also K, M, T, plain bytes, "1.5G", "24GiB". Throws Error.
uint64_t parse_size(const std::string& text, const std::string& option);
int parse_count(const std::string& text, const char* option, int min, int max);  // throws Error naming the bounds
std::vector<uint64_t> parse_sizes(const std::string& text, const char* option);  // "24G,16G"
std::vector<int> parse_counts(const std::string& text, const char* option, int min, int max);  // "3,1,2"
double parse_number(const std::string& text, const char* option, double min, double max);  // the same of a fraction
std::string parse_choice(const std::string& text, const char* option, std::initializer_list<const char*> choices);  // one of these, or Error

// Columns that a text takes on a terminal: 2 for wide East Asian characters and emoji, 0 for combining marks.
int text_columns(std::string_view text);

}  // namespace qn
