// qnext-convert: a checkpoint from Hugging Face, or random weights, -> one .qn file.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <initializer_list>

#include "convert/convert.h"
#include "convert/synthetic.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/term.h"

namespace {

void on_signal(int signal) {
  qn::remove_unfinished_files();
  _exit(128 + signal);
}

struct Arguments {
  std::string folder, synthetic, tokenizer_only, tokenizer, out;
  std::string experts = "int4", rest = "bf16", scale = "search", chat = "auto";
  int group = 0, threads = 0, layers = 0;
  uint64_t seed = 1;
  bool no_mtp = false;
};

// What CLI11 cannot say about options: throws CLI::ValidationError or qn::Error, both wrong usage.
qn::ConvertOptions options_of(const CLI::App& app, const Arguments& a) {
  if (a.folder.empty() + a.synthetic.empty() + a.tokenizer_only.empty() != 2) {
    throw CLI::ValidationError("expected one of: DIR, --synthetic MODEL, --tokenizer-only DIR");
  }
  const auto need = [&](bool met, const char* text, std::initializer_list<const char*> options) {
    for (const char* o : options)
      if (!met && app.count(o)) throw CLI::ValidationError(qn::format("%s: %s", o, text));
  };
  need(!a.synthetic.empty(), "only with --synthetic", {"--layers", "--seed", "--tokenizer"});
  need(a.tokenizer_only.empty(), "a tokenizer has no weights", {"--experts", "--rest", "--group", "--scale", "--no-mtp"});
  need(a.synthetic.empty(), "random weights are made in their format, not rounded to it", {"--scale"});
  qn::ConvertOptions o;
  o.recipe = {qn::parse_dtype(a.experts, "--experts", true), qn::parse_dtype(a.rest, "--rest", false), a.group};
  need(o.recipe.experts == qn::DType::INT4, "only for int4 experts", {"--group"});
  o.scale = a.scale == "max" ? qn::ScaleSearch::Max : qn::ScaleSearch::LeastSquares;
  o.threads = a.threads;
  o.mtp = !a.no_mtp;
  for (const auto style : {qn::ChatStyle::None, qn::ChatStyle::Instruct, qn::ChatStyle::Thinking, qn::ChatStyle::Coder}) {
    if (a.chat == qn::chat_name(style)) o.chat = style;
  }
  o.notice = [](const std::string& line) { std::fprintf(stderr, "qnext-convert: %s\n", line.c_str()); };
  return o;
}

void add_options(CLI::App& app, Arguments& a) {
  app.add_option("DIR", a.folder, "folder with config.json, *.safetensors and tokenizer.json");
  app.add_option("-o,--output", a.out, "the file to write")->required()->type_name("FILE.qn");
  app.add_option("--experts", a.experts, "format of the routed experts: int4, int8 or bf16")->type_name("FORMAT")->capture_default_str();
  app.add_option("--rest", a.rest, "format of the other large matrices: bf16 or int8")->type_name("FORMAT")->capture_default_str();
  app.add_option("--group", a.group, "weights per scale of int4 (default: the largest that fits)")
      ->check(CLI::IsMember({32, 64, 128}))
      ->type_name("32|64|128");
  app.add_option("--scale", a.scale, "how scales are chosen: search (least squared error) or max")
      ->check(CLI::IsMember({"search", "max"}))
      ->type_name("HOW")
      ->capture_default_str();
  app.add_option("-t,--threads", a.threads, "threads (default: physical cores)")->check(CLI::Range(1, 1024))->type_name("N");
  app.add_flag("--no-mtp", a.no_mtp, "leave out the multi-token-prediction layer");
  app.add_option("--chat", a.chat, "chat template instead of the checkpoint's: none, instruct, thinking, coder")
      ->check(CLI::IsMember({"auto", "none", "instruct", "thinking", "coder"}))
      ->type_name("STYLE");
  app.add_option("--tokenizer-only", a.tokenizer_only, "write only the tokenizer of DIR")->type_name("DIR");
  app.add_option("--synthetic", a.synthetic, "random weights of this model's shapes: qwen3-next-80b-a3b")->type_name("MODEL");
  app.add_option("--layers", a.layers, "with --synthetic: number of layers (default 48)")->check(CLI::Range(1, 256))->type_name("N");
  app.add_option("--tokenizer", a.tokenizer, "with --synthetic: folder of the tokenizer to put in")->type_name("DIR");
  app.add_option("--seed", a.seed, "with --synthetic: another seed, other weights")->type_name("N");
}

void print_report(const Arguments& a, const qn::ConvertReport& r) {
  std::fprintf(stderr, "%s: %s in %s%s\n", a.out.c_str(), qn::human_bytes(r.file_bytes).c_str(), qn::human_seconds(r.seconds).c_str(),
               r.mtp ? ", with MTP layer" : "");
  for (const auto& line : r.lines) {
    std::fprintf(stderr, "  %-16s %-10s %10s", line.label.c_str(), line.format.c_str(), qn::human_bytes(line.bytes).c_str());
    if (line.error.squared > 0) std::fprintf(stderr, "   relative error %.3g %%", 100 * line.error.relative());
    std::fprintf(stderr, "\n");
  }
}

qn::ConvertReport convert(const Arguments& a, const qn::ConvertOptions& o) {
  if (!a.tokenizer_only.empty()) return qn::convert_tokenizer(a.tokenizer_only, a.out, o);
  qn::ProgressBar bar("writing " + a.out, "B");
  const qn::Progress progress = [&](std::string_view, uint64_t done, uint64_t total) { bar.update(done, total); };
  qn::ConvertReport r;
  if (a.synthetic.empty()) {
    r = qn::convert_folder(a.folder, a.out, o, progress);
  } else {
    qn::SyntheticOptions s;
    s.convert = o, s.tokenizer = a.tokenizer, s.name = "synthetic " + a.synthetic, s.seed = a.seed;
    r = qn::write_synthetic(qn::synthetic_config(a.synthetic, a.layers), a.out, s, progress);
  }
  bar.finish();
  return r;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments a;
  qn::ConvertOptions options;
  CLI::App app("Writes a .qn file from a Hugging Face checkpoint of Qwen3-Next (BF16 or FP8), or with random weights.", "qnext-convert");
  add_options(app, a);
  try {
    app.parse(argc, argv);
    options = options_of(app, a);
    if (!a.synthetic.empty()) qn::synthetic_config(a.synthetic, a.layers);
  } catch (const CLI::CallForHelp& e) {
    return qn::exit_code("qnext-convert", app.exit(e));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "qnext-convert: %s (try --help)\n", e.what());
    return 2;
  }
  for (const int s : {SIGINT, SIGTERM, SIGHUP})
    if (std::signal(s, on_signal) == SIG_IGN) std::signal(s, SIG_IGN);  // as nohup left it
  try {
    print_report(a, convert(a, options));
    return qn::exit_code("qnext-convert", 0);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "qnext-convert: %s\n", e.what());
    return 1;
  }
}
