// qnext-quantize: a .qn file with fewer bits per weight.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <string>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/term.h"
#include "quantize/requantize.h"

namespace {

using ull = unsigned long long;

void stop(int signal) {
  qn::remove_unfinished_files();
  _exit(128 + signal);
}

std::string percent(double v) { return qn::format("%.3f %%", 100 * v); }

void print_report(const qn::RequantizeReport& report) {
  std::printf("%-16s %-23s %7s %14s %10s %10s %10s  %10s\n", "kind", "format", "tensors", "weights", "rms error", "by maximum", "before",
              "after");
  qn::RequantizeRow all;
  for (const qn::RequantizeRow& r : report.rows) {
    const std::string formats = r.before == r.after ? r.before : r.before + " -> " + r.after;
    const bool encoded = r.error.count > 0;
    std::printf("%-16s %-23s %7d %14llu %10s %10s %10s  %10s\n", r.label.c_str(), formats.c_str(), r.tensors, static_cast<ull>(r.weights),
                encoded ? percent(r.error.relative()).c_str() : "-", encoded ? percent(r.error.relative_max()).c_str() : "-",
                qn::human_bytes(r.bytes_before).c_str(), qn::human_bytes(r.bytes_after).c_str());
    all.tensors += r.tensors;
    all.weights += r.weights;
  }
  std::printf("%-16s %-23s %7d %14llu %10s %10s %10s  %10s\n", "file", "", all.tensors, static_cast<ull>(all.weights), "", "",
              qn::human_bytes(report.bytes_before).c_str(), qn::human_bytes(report.bytes_after).c_str());
  std::printf("rms error: of what was encoded here, relative to the weights; by maximum: had the largest value set every scale\n");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Stores the weights of a .qn model with fewer bits. What the options do not touch is copied.", "qnext-quantize"};
  std::string in, out, experts, rest, scale = "search";
  qn::RequantizeOptions options;
  app.add_option("input", in, "model.qn to read, best with bf16 weights")->required();
  app.add_option("output", out, "file to write; appears when complete")->required();
  app.add_option("--experts", experts,
                 "format of the routed experts; int4 when neither --experts nor --rest is given, else as in the input")
      ->check(CLI::IsMember({"int4", "int8", "bf16"}));
  app.add_option("--rest", rest, "format of the other projections and the head; else as in the input")
      ->check(CLI::IsMember({"bf16", "int8"}));
  app.add_option("--group", options.group, "weights per scale of int4 experts; else the largest that divides their widths")
      ->check(CLI::IsMember({32, 64, 128}));
  app.add_option("--scale", scale, "search: scales of least squared error; max: from the largest weight of a group")
      ->check(CLI::IsMember({"search", "max"}));
  app.add_option("--threads", options.threads, "else one per core")->check(CLI::Range(1, 1024));
  app.add_flag("--allow-requantize", options.allow_requantize, "let int4 experts be decoded and stored again in another group");
  try {
    app.parse(argc, argv);
    if (options.group && !experts.empty() && experts != "int4") throw CLI::ValidationError("--group is for int4 experts");
  } catch (const CLI::CallForHelp& e) {
    return qn::exit_code("qnext-quantize", app.exit(e));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "qnext-quantize: %s (try --help)\n", e.what());
    return 2;
  }
  for (const int s : {SIGINT, SIGTERM, SIGHUP})
    if (std::signal(s, stop) == SIG_IGN) std::signal(s, SIG_IGN);  // as nohup left it
  try {
    if (experts.empty() && rest.empty()) experts = "int4";
    if (!experts.empty()) options.experts = qn::parse_dtype(experts, "--experts", true);
    if (!rest.empty()) options.rest = qn::parse_dtype(rest, "--rest", false);
    if (scale == "max") options.search = qn::ScaleSearch::Max;
    const qn::RequantizeReport report = qn::requantize(in, out, options, qn::progress_bars("B"));
    for (const std::string& note : report.notes) std::fprintf(stderr, "qnext-quantize: %s\n", note.c_str());
    print_report(report);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "qnext-quantize: %s\n", e.what());
    return 1;
  }
  return qn::exit_code("qnext-quantize", 0);
}
