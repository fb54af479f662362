#include "convert/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "convert/tokenizer_json.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/core/limits.h"
#include "ggml-lite/text/unicode.h"

namespace qn {

namespace {

constexpr uint64_t kMaxText = 16 << 20;   // config.json and the like
constexpr int64_t kMaxConverted = 4096;  // experts of a layer: their places in convert.cpp have 14 bits
static_assert(kMaxConverted <= kMaxExperts);

std::string shown(const Json& v) {
  const std::string text = v.dump();
  return text.size() > 100 ? text.substr(0, utf8_complete(std::string_view(text).substr(0, 100))) + "..." : text;
}

// Keys of one JSON object, each with its bounds; `where` and the key start every message.
struct Keys {
  const Json& json;
  const std::string& where;

  const Json* find(const char* key) const {
    const Json* v = json.find(key);
    return v && !v->is_null() ? v : nullptr;
  }
  std::string what(const char* key) const { return where + ": " + key; }
  int64_t integer(const char* key, int64_t min, int64_t max, std::optional<int64_t> otherwise = {}) const {
    const Json* v = find(key);
    if (!v && otherwise) return *otherwise;
    if (!v) fail("%s: missing (expected a number from %lld to %lld)", what(key).c_str(), (long long)min, (long long)max);
    const int64_t n = v->as_int(what(key));
    if (n < min || n > max) {
      fail("%s: expected %lld to %lld, got %lld", what(key).c_str(), (long long)min, (long long)max, (long long)n);
    }
    return n;
  }
  double real(const char* key, double min, double max, std::optional<double> otherwise = {}) const {
    const Json* v = find(key);
    if (!v && otherwise) return *otherwise;
    if (!v) fail("%s: missing (expected a number from %g to %g)", what(key).c_str(), min, max);
    const double x = v->as_double(what(key));
    if (!(x >= min && x <= max)) fail("%s: expected %g to %g, got %g", what(key).c_str(), min, max, x);
    return x;
  }
  bool flag(const char* key, bool otherwise) const {
    const Json* v = find(key);
    return v ? v->as_bool(what(key)) : otherwise;
  }
  std::string text(const char* key, const std::string& otherwise) const {
    const Json* v = find(key);
    return v ? v->as_string(what(key)) : otherwise;
  }
  // Its items, or null when the key is missing.
  const Json::Items* list(const char* key) const {
    const Json* v = find(key);
    if (v && !v->is_array()) fail("%s: expected a list, got %s", what(key).c_str(), shown(*v).c_str());
    return v ? &v->items() : nullptr;
  }
};

void refuse_other_families(const Keys& k) {
  std::string architecture;
  if (const auto* a = k.list("architectures"); a && !a->empty()) architecture = (*a)[0].as_string(k.what("architectures"));
  const std::string type = k.text("model_type", "");
  if (type != "qwen3_next" && !(type.empty() && architecture == "Qwen3NextForCausalLM")) {
    const bool later = type.rfind("qwen3_5", 0) == 0;
    fail("%s: model_type: expected qwen3_next, got \"%s\"%s", k.where.c_str(), type.empty() ? architecture.c_str() : type.c_str(),
         later ? " (Qwen3.5 is another model: other projections, other head order)" : "");
  }
  for (const char* key : {"attention_bias", "qkv_bias", "layer_scale", "use_sliding_window"}) {
    if (k.flag(key, false)) fail("%s: expected false, got true: this variant is not supported", k.what(key).c_str());
  }
  if (!k.flag("attn_output_gate", true))
    fail("%s: expected true, got false: this variant is not supported", k.what("attn_output_gate").c_str());
  if (const std::string act = k.text("hidden_act", "silu"); act != "silu") {
    fail("%s: expected silu, got %s", k.what("hidden_act").c_str(), act.c_str());
  }
  if (k.integer("decoder_sparse_step", 1, 1 << 20, 1) != 1)
    fail("%s: expected 1: dense layers are not supported", k.what("decoder_sparse_step").c_str());
  if (const auto* dense = k.list("mlp_only_layers"); dense && !dense->empty()) {
    fail("%s: expected []: dense layers are not supported", k.what("mlp_only_layers").c_str());
  }
  k.integer("num_nextn_predict_layers", 0, 1, 1);
  if (const Json* q = k.find("quantization_config")) {
    const std::string where = k.what("quantization_config");
    const Keys keys{*q, where};
    if (const std::string method = keys.text("quant_method", "?"); method != "fp8") {
      fail("%s: quant_method: expected fp8, got %s: convert the BF16 or FP8 checkpoint instead", where.c_str(), method.c_str());
    }
    if (const auto* b = keys.list("weight_block_size")) {
      const std::string what = keys.what("weight_block_size");
      if (b->size() != 2 || (*b)[0].as_int(what) != 128 || (*b)[1].as_int(what) != 128)
        fail("%s: expected [128, 128], got %s", what.c_str(), shown(*keys.find("weight_block_size")).c_str());
    }
  }
}

std::vector<int64_t> layer_kinds(const Keys& k, int64_t layers) {
  std::vector<int64_t> kinds;
  if (const auto* types = k.list("layer_types")) {
    for (const Json& t : *types) {
      const std::string& s = t.as_string(k.what("layer_types"));
      if (s != "linear_attention" && s != "full_attention") {
        fail("%s: expected linear_attention or full_attention, got %s", k.what("layer_types").c_str(), s.c_str());
      }
      kinds.push_back(s == "full_attention");
    }
    if (static_cast<int64_t>(kinds.size()) != layers) {
      fail("%s: expected %lld entries (num_hidden_layers), got %zu", k.what("layer_types").c_str(), (long long)layers, kinds.size());
    }
    return kinds;
  }
  const int64_t interval = k.integer("full_attention_interval", 1, 1 << 20, 4);
  for (int64_t i = 0; i < layers; i++) kinds.push_back((i + 1) % interval == 0);
  return kinds;
}

// The factor on cos and sin, model-spec 4 step 4.
double yarn_attention_factor(const Keys& k, double s) {
  auto m = [s](double c) { return s <= 1 ? 1.0 : 0.1 * c * std::log(s) + 1; };
  if (k.find("attention_factor")) return k.real("attention_factor", 1e-3, 1e3);
  if (k.find("mscale") && k.find("mscale_all_dim")) return m(k.real("mscale", 1e-3, 1e3)) / m(k.real("mscale_all_dim", 1e-3, 1e3));
  return m(1);
}

void parse_rope(const Keys& k, ModelConfig& c) {
  static const Json empty = Json::object();
  const Json* parameters = k.find("rope_parameters");
  const Json* old_scaling = k.find("rope_scaling");
  const std::string new_where = k.what("rope_parameters"), old_where = k.what("rope_scaling");
  const Keys modern{parameters ? *parameters : empty, new_where}, old{old_scaling ? *old_scaling : empty, old_where};
  if ((parameters && !parameters->is_object()) || (old_scaling && !old_scaling->is_object())) {
    fail("%s: rope_parameters or rope_scaling: expected an object", k.where.c_str());
  }
  if (!modern.find("rope_theta") && !k.find("rope_theta")) {
    fail("%s: missing, and it has no safe default (published models use 1e7 and 5e6)", k.what("rope_theta").c_str());
  }
  c.theta = modern.find("rope_theta") ? modern.real("rope_theta", kMinRopeTheta, kMaxRopeTheta)
                                     : k.real("rope_theta", kMinRopeTheta, kMaxRopeTheta);
  const double partial =
      modern.find("partial_rotary_factor") ? modern.real("partial_rotary_factor", 0, 1) : k.real("partial_rotary_factor", 0, 1, 0.25);
  c.rotary_dim = static_cast<int64_t>(static_cast<double>(c.head_dim) * partial);
  if (c.rotary_dim < kMinRotaryDim || c.rotary_dim % kRotaryDimMultiple) {
    fail("%s: partial_rotary_factor: expected an even number of rotated dims, got %lld of %lld", k.where.c_str(), (long long)c.rotary_dim,
         (long long)c.head_dim);
  }

  auto type_of = [](const Keys& s) { return s.text("rope_type", s.text("type", "default")); };
  const bool use_modern = type_of(modern) != "default";
  const Keys& s = use_modern ? modern : old;
  const std::string type = type_of(s);
  c.yarn_original = c.context;
  if (type == "default") return;
  if (type != "yarn") fail("%s: rope_type: expected default or yarn, got %s", s.where.c_str(), type.c_str());
  c.yarn_factor = s.real("factor", 1, kMaxYarnFactor);
  c.yarn_original = s.integer("original_max_position_embeddings", 1, kMaxYarnContext, c.context);
  c.yarn_beta_fast = s.real("beta_fast", 1e-3, 1e6, 32);
  c.yarn_beta_slow = s.real("beta_slow", 1e-3, 1e6, 1);
  c.yarn_truncate = s.flag("truncate", true);
  c.attention_factor = yarn_attention_factor(s, c.yarn_factor);
  // The model card switches YaRN on without touching max_position_embeddings.
  const double reach = static_cast<double>(c.yarn_original) * c.yarn_factor;
  c.context = std::max(c.context, static_cast<int64_t>(std::min(reach, double{kMaxContext})));
}

void check_shapes(const ModelConfig& c, const std::string& where) {
  const auto multiple = [&](const char* what, int64_t n, int64_t of) {
    if (n % of) fail("%s: %s: expected a multiple of %lld, got %lld", where.c_str(), what, (long long)of, (long long)n);
  };
  const auto most = [&](const char* what, int64_t n, int64_t max) {
    if (n > max) fail("%s: %s: expected at most %lld, got %lld", where.c_str(), what, (long long)max, (long long)n);
  };
  multiple("hidden_size", c.width, kWidthMultiple);
  multiple("moe_intermediate_size", c.expert_width, kWidthMultiple);
  multiple("shared_expert_intermediate_size", c.shared_width, kWidthMultiple);
  multiple("head_dim", c.head_dim, kHeadDimMultiple);
  multiple("linear_key_head_dim", c.key_dim, kHeadDimMultiple);
  multiple("linear_value_head_dim", c.value_dim, kHeadDimMultiple);
  multiple("num_attention_heads (by num_key_value_heads)", c.heads, c.kv_heads);
  multiple("linear_num_value_heads (by linear_num_key_heads)", c.value_heads, c.key_heads);
  most("num_attention_heads * head_dim", c.attention_width(), kMaxWidth);
  most("linear_num_value_heads * linear_value_head_dim", c.delta_width(), kMaxWidth);
  most("rows of in_proj_qkvz, from linear_num_*_heads and linear_*_head_dim", c.qkvz_rows(), kMaxProjectionRows);
  most("rows of q_proj, k_proj and v_proj, from num_*_heads and head_dim", 2 * (c.heads + c.kv_heads) * c.head_dim, kMaxProjectionRows);
  most("num_experts_per_tok (by num_experts)", c.chosen, c.experts);
  most("num_hidden_layers * num_experts", c.layers * c.experts, kMaxExpertRecords);
}

std::vector<int64_t> token_list(const Json* v, const std::string& what) {
  std::vector<int64_t> ids;
  if (!v || v->is_null()) return ids;
  if (v->is_array()) {
    if (v->items().size() > kMaxEndTokens)
      fail("%s: expected at most %lld ids, got %zu", what.c_str(), (long long)kMaxEndTokens, v->items().size());
    for (const Json& i : v->items()) ids.push_back(i.as_int(what));
  } else {
    ids.push_back(v->as_int(what));
  }
  return ids;
}

std::optional<Json> read_json(const std::string& path) {
  if (!file_exists(path)) return {};
  Json j = Json::parse(read_small_file(path, kMaxText), path);
  if (!j.is_object()) fail("%s: expected a JSON object", path.c_str());
  return j;
}

// The Jinja text of the checkpoint, "" when it has none: its own file, or a string or a list of named ones in tokenizer_config.json.
std::string chat_template(const std::string& folder, const std::optional<Json>& tokenizer_config) {
  const std::string own = folder + "/chat_template.jinja";
  if (file_exists(own)) return read_small_file(own, kMaxText);
  const Json* t = tokenizer_config ? tokenizer_config->find("chat_template") : nullptr;
  if (!t || t->is_null()) return "";
  if (t->is_string()) return t->as_string("chat_template");
  if (!t->is_array()) fail("%s/tokenizer_config.json: chat_template: expected a text or a list, got %s", folder.c_str(), shown(*t).c_str());
  for (const Json& entry : t->items()) {
    const Json *name = entry.find("name"), *text = entry.find("template");
    if (name && text && name->is_string() && text->is_string() && name->as_string("name") == "default") return text->as_string("template");
  }
  return "";
}

// Generation defaults. What generation_config.json leaves out is left out; without that file, the model card's values of the style.
void sampling_meta(const std::optional<Json>& generation, ChatStyle style, std::map<std::string, Meta>& meta, const Notice& notice) {
  if (!generation) {
    const double temperature = style == ChatStyle::Instruct ? 0.7 : style == ChatStyle::Thinking ? 0.6 : 1.0;
    if (style == ChatStyle::None) return;
    meta["sampling.temperature"] = temperature;
    meta["sampling.top_p"] = style == ChatStyle::Instruct ? 0.8 : 0.95;
    meta["sampling.top_k"] = int64_t{style == ChatStyle::Coder ? 40 : 20};
    return;
  }
  auto number = [&](const char* key, double min, double max) -> std::optional<double> {
    const Json* v = generation->find(key);
    if (!v || v->is_null()) return {};
    try {
      if (const double x = v->as_double(key); x >= min && x <= max) return x;
    } catch (const Error&) {  // another kind, or beyond what a double holds
    }
    notice(format("warning: generation_config.json: %s: %s is ignored (expected a number from %g to %g)", key, shown(*v).c_str(), min, max));
    return {};
  };
  if (const auto x = number("temperature", 0, 100)) meta["sampling.temperature"] = *x;
  if (const auto x = number("top_p", 1e-6, 1)) meta["sampling.top_p"] = *x;
  if (const auto x = number("top_k", 0, 1e6)) meta["sampling.top_k"] = static_cast<int64_t>(*x);
  if (const auto x = number("min_p", 0, 1)) meta["sampling.min_p"] = *x;
  if (const auto x = number("repetition_penalty", 1e-3, 100)) meta["sampling.repetition_penalty"] = *x;
  const Json* sample = generation->find("do_sample");
  if (!sample || sample->is_null()) return;
  if (!sample->is_bool())
    notice(format("warning: generation_config.json: do_sample: %s is ignored (expected true or false)", shown(*sample).c_str()));
  else if (!sample->as_bool("do_sample")) meta["sampling.temperature"] = 0.0;
}

}  // namespace

ModelConfig parse_config(const Json& json, const std::string& where) {
  if (!json.is_object()) fail("%s: expected a JSON object", where.c_str());
  const Keys k{json, where};
  refuse_other_families(k);
  ModelConfig c;
  c.layers = k.integer("num_hidden_layers", 1, kMaxLayers);
  c.width = k.integer("hidden_size", kMinWidth, kMaxWidth);
  c.vocab = k.integer("vocab_size", 1, kMaxVocab);
  c.context = k.integer("max_position_embeddings", 1, kMaxContext);
  c.rms_eps = k.real("rms_norm_eps", 0, 0.1, 1e-6);
  c.tied = k.flag("tie_word_embeddings", false);
  c.kinds = layer_kinds(k, c.layers);
  c.heads = k.integer("num_attention_heads", 1, kMaxHeads);
  c.kv_heads = k.integer("num_key_value_heads", 1, kMaxHeads);
  c.head_dim = k.integer("head_dim", kMinHeadDim, kMaxHeadDim, 256);
  c.key_heads = k.integer("linear_num_key_heads", 1, kMaxHeads);
  c.value_heads = k.integer("linear_num_value_heads", 1, kMaxHeads);
  c.key_dim = k.integer("linear_key_head_dim", kMinHeadDim, kMaxHeadDim);
  c.value_dim = k.integer("linear_value_head_dim", kMinHeadDim, kMaxHeadDim);
  c.conv = k.integer("linear_conv_kernel_dim", kConv, kConv, kConv);
  c.experts = k.integer("num_experts", 1, kMaxConverted);
  c.chosen = k.integer("num_experts_per_tok", 1, kMaxChosen);
  c.expert_width = k.integer("moe_intermediate_size", kMinWidth, kMaxWidth);
  c.shared_width = k.integer("shared_expert_intermediate_size", kMinWidth, kMaxWidth);
  c.renormalise = k.flag("norm_topk_prob", true);
  c.end_tokens = token_list(k.find("eos_token_id"), k.what("eos_token_id"));
  c.origin = k.text("_name_or_path", "");
  parse_rope(k, c);
  check_shapes(c, where);
  return c;
}

ModelConfig read_config(const std::string& folder) {
  const std::string path = folder + "/config.json";
  return parse_config(Json::parse(read_small_file(path, kMaxText), path), path);
}

std::map<std::string, Meta> model_meta(const ModelConfig& c, bool mtp) {
  return {
      {"model.layers", c.layers},
      {"model.width", c.width},
      {"model.vocab", c.vocab},
      {"model.context", c.context},
      {"model.rms_eps", c.rms_eps},
      {"model.layer_kinds", c.kinds},
      {"model.mtp", int64_t{mtp}},
      {"attention.heads", c.heads},
      {"attention.kv_heads", c.kv_heads},
      {"attention.head_dim", c.head_dim},
      {"attention.rotary_dim", c.rotary_dim},
      {"rope.theta", c.theta},
      {"rope.yarn_factor", c.yarn_factor},
      {"rope.yarn_original_context", c.yarn_original},
      {"rope.yarn_beta_fast", c.yarn_beta_fast},
      {"rope.yarn_beta_slow", c.yarn_beta_slow},
      {"rope.yarn_truncate", int64_t{c.yarn_truncate}},
      {"rope.attention_factor", c.attention_factor},
      {"delta.key_heads", c.key_heads},
      {"delta.value_heads", c.value_heads},
      {"delta.key_dim", c.key_dim},
      {"delta.value_dim", c.value_dim},
      {"delta.conv", c.conv},
      {"moe.experts", c.experts},
      {"moe.chosen", c.chosen},
      {"moe.expert_width", c.expert_width},
      {"moe.shared_width", c.shared_width},
      {"moe.renormalise", int64_t{c.renormalise}},
  };
}

const char* chat_name(ChatStyle style) {
  switch (style) {
    case ChatStyle::Instruct:
      return "instruct";
    case ChatStyle::Thinking:
      return "thinking";
    case ChatStyle::Coder:
      return "coder";
    case ChatStyle::None:
      break;
  }
  return "none";
}

TextSetup read_text_setup(const std::string& folder, int64_t vocab, const std::vector<int64_t>& config_end,
                          const std::optional<ChatStyle>& chat, const Notice& notice) {
  TextSetup out;
  const std::string tokenizer_path = folder + "/tokenizer.json";
  TokenizerData data;
  if (file_exists(tokenizer_path)) {
    data = read_tokenizer(folder);
    out.tables = pack(data);
    int64_t top = static_cast<int64_t>(data.tokens.size());
    for (const auto& a : data.added) top = std::max<int64_t>(top, int64_t{a.id} + 1);
    if (vocab && top > vocab) {
      notice(
          format("warning: tokenizer.json has %lld ids, the model only %lld: the others cannot be used", (long long)top, (long long)vocab));
    }
  } else {
    notice("warning: no tokenizer.json: the file will hold a model that knows token ids only");
  }
  const std::optional<Json> tokenizer_config = read_json(folder + "/tokenizer_config.json");
  const std::optional<Json> generation = read_json(folder + "/generation_config.json");

  // End tokens: generation_config.json, config.json, and the two that end every ChatML answer.
  std::vector<int64_t> wanted, end;
  try {
    if (generation) wanted = token_list(generation->find("eos_token_id"), "generation_config.json: eos_token_id");
  } catch (const Error& e) {
    notice(format("warning: %s; ignored", e.what()));
  }
  wanted.insert(wanted.end(), config_end.begin(), config_end.end());
  bool im_end_ends = false;
  for (const char* text : {"<|im_end|>", "<|endoftext|>"}) {
    for (const auto& a : data.added) {
      if (a.text != text) continue;
      im_end_ends |= std::string(text) == "<|im_end|>" && std::find(wanted.begin(), wanted.end(), a.id) != wanted.end();
      wanted.push_back(a.id);
    }
  }
  for (const int64_t id : wanted) {
    if (id < 0 || id >= (vocab ? vocab : kMaxVocab)) {
      notice(format("warning: end token %lld is outside the vocabulary and ignored", (long long)id));
    } else if (std::find(end.begin(), end.end(), id) == end.end()) {
      end.push_back(id);
    }
  }
  if (end.size() > kMaxEndTokens)
    fail("%s: eos_token_id: expected at most %lld end tokens in all, got %zu", folder.c_str(), (long long)kMaxEndTokens, end.size());
  out.meta["token.end"] = end;

  const std::string jinja = chat_template(folder, tokenizer_config);
  ChatStyle style = ChatStyle::None;
  std::string fingerprint;
  if (!jinja.empty()) {
    bool known = false;
    style = recognise_template(jinja, known);
    fingerprint = format("%016llx", (unsigned long long)template_fingerprint(jinja));
    if (!known && !chat)
      notice(format("warning: the chat template (%s) is not one we know; taken for \"%s\"", fingerprint.c_str(), chat_name(style)));
  } else if (im_end_ends && !chat) {
    // A base model ends with <|endoftext|>; one that was taught to end with <|im_end|> was taught ChatML.
    style = ChatStyle::Instruct;
    notice("warning: no chat template; the end token is <|im_end|>, so ChatML is assumed");
  }
  if (chat) style = *chat;
  out.meta["general.chat"] = std::string(chat_name(style));
  out.meta["general.template_fingerprint"] = fingerprint;
  sampling_meta(generation, style, out.meta, notice);
  return out;
}

std::map<std::string, Meta> origin_meta(const std::string& folder, const std::string& origin) {
  std::filesystem::path p = std::filesystem::path(folder).lexically_normal();
  if (p.filename().empty()) p = p.parent_path();
  std::error_code ignored;
  if (p.empty() || p == "." || p.filename() == "..") p = std::filesystem::canonical(folder, ignored);
  std::string name = p.filename().string(), source = origin.empty() ? name : origin;
  // .../models--Owner--Name/snapshots/<revision>
  const std::string repo = p.parent_path().parent_path().filename().string();
  if (p.parent_path().filename() == "snapshots" && repo.rfind("models--", 0) == 0) {
    const std::string rest = repo.substr(8);
    const size_t cut = rest.find("--");
    if (cut != std::string::npos) {
      source = rest.substr(0, cut) + "/" + rest.substr(cut + 2) + "@" + name;
      name = rest.substr(cut + 2);
    }
  }
  return {{"general.name", name}, {"general.source", source}};
}

}  // namespace qn
