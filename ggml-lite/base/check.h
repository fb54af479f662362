// Two words for two kinds of failure.
//   Error     bad input or a machine that lacks something. The message is one line: what, where, expected, got, what to try.
//   QN_CHECK  a broken contract between our own functions. It never vanishes in a release build; it throws Bug so that
//             tests can prove that a contract refuses, and mains print it and end with code 1.
#pragma once
#include <stdexcept>
#include <string>

namespace qn {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class NoChoice : public Error {  // of the next token
 public:
  NoChoice() : Error("sampling: no token can be chosen: every logit is NaN, -inf or of an id without a token") {}
};

class DeviceLost : public Error {  // a device failed in its work: nothing it did since can be relied on, nor anything it will be asked
 public:
  using Error::Error;
};

class Bug : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// printf-style; the result is made one line (control characters become spaces).
[[gnu::format(printf, 1, 2)]] std::string format(const char* fmt, ...);
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* fmt, ...);  // throws Error
[[noreturn, gnu::format(printf, 4, 5)]] void check_failed(const char* file, int line, const char* condition, const char* fmt, ...);

}  // namespace qn

// QN_CHECK(a == b, "matmul: x has %d columns, W has %d", a, b)
#define QN_CHECK(cond, ...) \
  do { \
    if (!(cond)) ::qn::check_failed(__FILE__, __LINE__, #cond, __VA_ARGS__); \
  } while (0)
