// config.json and its companions -> what a .qn file says about the model (model-spec 1, 4, 7.3).
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ggml-lite/base/json.h"
#include "ggml-lite/core/qn.h"
#include "ggml-lite/text/chatml.h"

namespace qn {

using Notice = std::function<void(const std::string& line)>;  // warnings and lists of names, a line at a time

// Shapes are data: letters as in core/tensor.h.
struct ModelConfig {
  int64_t layers = 0, width = 0, vocab = 0, context = 0;
  double rms_eps = 1e-6;
  bool tied = false;           // the head is the embedding
  std::vector<int64_t> kinds;  // per layer: 0 delta net, 1 attention
  int64_t heads = 0, kv_heads = 0, head_dim = 0, rotary_dim = 0;
  double theta = 0;
  double yarn_factor = 1, yarn_beta_fast = 32, yarn_beta_slow = 1, attention_factor = 1;
  int64_t yarn_original = 0;
  bool yarn_truncate = true;
  int64_t key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0, conv = 4;
  int64_t experts = 0, chosen = 0, expert_width = 0, shared_width = 0;
  bool renormalise = true;
  std::vector<int64_t> end_tokens;  // config.json's eos_token_id
  std::string origin;               // config.json's _name_or_path

  int64_t qkvz_rows() const { return 2 * key_heads * key_dim + 2 * value_heads * value_dim; }
  int64_t conv_channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  int64_t attention_width() const { return heads * head_dim; }
  int64_t delta_width() const { return value_heads * value_dim; }
};

// Both spellings of config.json (transformers 4.57 and >= 5). Everything is bounded; what the engine cannot compute is refused
// by the name of its key. `where` starts the message of an Error.
ModelConfig parse_config(const Json& json, const std::string& where);
ModelConfig read_config(const std::string& folder);

// model.*, attention.*, rope.*, delta.*, moe.* (model.mtp as told).
std::map<std::string, Meta> model_meta(const ModelConfig& c, bool mtp);

// The words: tokenizer tables (empty when the folder has none), general.chat, general.template_fingerprint, token.end, sampling.*.
struct TextSetup {
  std::vector<uint8_t> tables;
  std::map<std::string, Meta> meta;
};
// vocab 0: not known. config_end: eos of config.json. chat: what the user wants instead of what the template says.
TextSetup read_text_setup(const std::string& folder, int64_t vocab, const std::vector<int64_t>& config_end,
                          const std::optional<ChatStyle>& chat, const Notice& notice);
const char* chat_name(ChatStyle style);  // none, instruct, thinking, coder

// general.name and general.source from the folder's name; a Hugging Face cache folder gives "Owner/Name@revision".
std::map<std::string, Meta> origin_meta(const std::string& folder, const std::string& origin);

}  // namespace qn
