// ChatML prompts and answers in three styles (model-spec 8). Rendering gives pieces rather than a string, so that only what the
// template itself writes can become control tokens. Texts that name a model come from the caller.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ggml-lite/base/json.h"
#include "ggml-lite/text/tokenizer.h"

namespace qn {

enum class ChatStyle { None, Instruct, Thinking, Coder };  // None: a base model, text is continued

struct ToolCall {
  std::string name;
  Json arguments;  // an object; or a string, inserted verbatim (Instruct, Thinking) or parsed first (Coder)
};

struct Message {
  std::string role;       // "system", "user", "assistant", "tool"
  std::string content;
  std::optional<std::string> reasoning;  // assistant of a thinking model; else taken from <think>...</think> in content
  std::vector<ToolCall> calls;
  // An assistant's answer as generated, used instead of content (and calls) where the template shows it verbatim, so that the
  // next prompt extends the last one token for token. Without the end token.
  std::vector<int32_t> ids;
};

struct ChatTemplate {
  ChatStyle style = ChatStyle::Instruct;
  std::string coder_system;  // what Coder says when there are tools but no system message
};

// tools: an array of tool objects or nullptr. Throws Error for an unknown role or tools of a wrong shape.
std::vector<TextPiece> render_chat(const ChatTemplate& t, std::span<const Message> messages, const Json* tools,
                                   bool generation_prompt);
std::string join(std::span<const TextPiece> pieces);  // the prompt as one string, for showing and tests

// Which built-in style a checkpoint's Jinja template is: by fingerprint of its text when known, else by what it says: XML tools
// are Coder, a generation prompt that opens a thought or an `enable_thinking` switch is Thinking, anything else Instruct.
// `known` tells which of the two it was.
ChatStyle recognise_template(std::string_view jinja, bool& known);
uint64_t template_fingerprint(std::string_view jinja);

struct Answer {
  std::string reasoning;         // Thinking: before </think>; empty otherwise
  std::string content;           // what is shown
  std::vector<ToolCall> calls;   // both formats are recognised in any style, the closing tag may lack at the end of the
                                 // text; a malformed call stays in content
  bool thinking = false;         // </think> has not come yet
};
// `tools` (may be nullptr) gives the declared types of parameters in the XML format.
Answer parse_answer(ChatStyle style, std::string_view text, const Json* tools);

}  // namespace qn
