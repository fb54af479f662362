#include "ggml-lite/text/chatml.h"

#include <algorithm>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/text/unicode.h"

namespace qn {

using std::string;
using std::string_view;

// ---- small things of Python -----------------------------------------------------------------------------------------

static bool is_space(char32_t c) { return char_class(c) == CharClass::Space || (c >= 0x1c && c <= 0x1f); }  // str.isspace

// str.strip()
static string_view trim(string_view s) {
  int len = 0;
  while (!s.empty() && is_space(utf8_decode(s, 0, len))) s.remove_prefix(len);
  for (;;) {
    size_t at = s.size();
    while (at > 0 && s.size() - at < 4 && (at == s.size() || (s[at] & 0xc0) == 0x80)) --at;  // the last character
    if (s.empty() || !is_space(utf8_decode(s, at, len)) || at + len != s.size()) return s;
    s = s.substr(0, at);
  }
}

// str.strip("\n"), on the sides asked for.
static string_view strip_newlines(string_view s, bool left, bool right) {
  while (left && s.starts_with('\n')) s.remove_prefix(1);
  while (right && s.ends_with('\n')) s.remove_suffix(1);
  return s;
}

// str(v), or repr(v): what a template gets when it joins a value to a string.
static string python_text(const Json& v, bool repr = false) {
  string out;
  switch (v.kind()) {
    case Json::Kind::Null: return "None";
    case Json::Kind::Bool: return v.as_bool("") ? "True" : "False";
    case Json::Kind::Number: return v.dump_python();
    case Json::Kind::String: {
      const string& s = v.as_string("");
      if (!repr) return s;
      const char quote = s.find('\'') != s.npos && s.find('"') == s.npos ? '"' : '\'';
      out += quote;
      for (char c : s) {
        if (c == quote || c == '\\') out += {'\\', c};
        else if (c == '\n' || c == '\r' || c == '\t') out += {'\\', c == '\n' ? 'n' : c == '\r' ? 'r' : 't'};
        else out += c;
      }
      return out + quote;
    }
    case Json::Kind::Array:
      for (const Json& i : v.items()) out += (out.empty() ? "" : ", ") + python_text(i, true);
      return "[" + out + "]";
    case Json::Kind::Object:
      for (const auto& [k, i] : v.members())
        out += (out.empty() ? "" : ", ") + python_text(Json::string(k), true) + ": " + python_text(i, true);
      return "{" + out + "}";
  }
  return out;
}

// Objects and arrays via tojson, everything else as Python text.
static string value_text(const Json& v) { return v.is_object() || v.is_array() ? v.dump_python() : python_text(v); }

// ---- writing prompts ------------------------------------------------------------------------------------------------

// Collects pieces: templ() is what the template says, text() what somebody else says.
class Prompt {
 public:
  Prompt& templ(string_view s) { return add(s, true); }
  Prompt& text(string_view s) { return add(s, false); }
  // What an assistant generated: as these ids, when there are any.
  Prompt& add(const Prompt& body, const std::vector<int32_t>& ids) {
    if (!ids.empty()) pieces_.push_back({join(body.pieces_), false, ids});
    else
      for (const TextPiece& p : body.pieces_) add(p.text, p.control);
    return *this;
  }
  std::vector<TextPiece> take() { return std::move(pieces_); }

 private:
  Prompt& add(string_view s, bool control) {
    if (s.empty()) return *this;
    if (pieces_.empty() || pieces_.back().control != control || !pieces_.back().ids.empty())
      pieces_.push_back({string(), control, {}});
    pieces_.back().text += s;
    return *this;
  }
  std::vector<TextPiece> pieces_;
};

static const Json& function_of(const Json& tool) {
  const Json* f = tool.find("function");
  return f ? *f : tool;
}

static void check_tools(const Json& tools) {
  if (!tools.is_array()) fail("tools: expected a JSON array of tool objects, got %s", tools.dump().substr(0, 60).c_str());
  for (size_t i = 0; i < tools.items().size(); ++i) {
    const Json* name = function_of(tools.items()[i]).find("name");
    if (!name || !name->is_string())
      fail("tools: tool %zu: expected {\"type\": \"function\", \"function\": {\"name\": ..., \"parameters\": ...}}, got %s", i,
           tools.items()[i].dump().substr(0, 60).c_str());
  }
}

static void check_roles(std::span<const Message> messages) {
  for (size_t i = 0; i < messages.size(); ++i) {
    const string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant" && role != "tool")
      fail("message %zu: expected the role system, user, assistant or tool, got %s", i, json_quote(role.substr(0, 40)).c_str());
  }
}

static constexpr string_view kEnd = "<|im_end|>\n";

static void write_turn(Prompt& p, const Message& m) {
  p.templ("<|im_start|>" + m.role + "\n").text(m.content).templ(kEnd);
}

// What an assistant of a thinking model thought and said.
struct Thought {
  string_view reasoning, content;
};
static Thought split_thought(const Message& m) {
  constexpr string_view kOpen = "<think>", kClose = "</think>";
  const string_view s = m.content;
  if (m.reasoning) return {*m.reasoning, s};
  const size_t first = s.find(kClose);
  if (first == s.npos) return {"", s};
  string_view reasoning = strip_newlines(s.substr(0, first), false, true);
  if (const size_t open = reasoning.rfind(kOpen); open != reasoning.npos) reasoning.remove_prefix(open + kOpen.size());
  return {strip_newlines(reasoning, true, false), strip_newlines(s.substr(s.rfind(kClose) + kClose.size()), true, false)};
}

// {"name": ..., "arguments": ...} in tags. A newline parts a call from what precedes it in the turn.
static void write_json_calls(Prompt& p, const Message& m, string_view content) {
  for (size_t i = 0; i < m.calls.size(); ++i) {
    const ToolCall& call = m.calls[i];
    if (i > 0 || !content.empty()) p.templ("\n");
    p.templ("<tool_call>\n{\"name\": \"").text(call.name).templ("\", \"arguments\": ");
    p.text(call.arguments.is_string() ? call.arguments.as_string("") : call.arguments.dump_python()).templ("}\n</tool_call>");
  }
}

static void render_json_style(Prompt& p, bool thinking, std::span<const Message> messages, const Json* tools) {
  const bool system = !messages.empty() && messages[0].role == "system";
  if (tools) {
    p.templ("<|im_start|>system\n");
    if (system) p.text(messages[0].content).templ("\n\n");
    p.templ(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>");
    for (const Json& tool : tools->items()) p.templ("\n").text(tool.dump_python());
    p.templ(
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n"
        "</tool_call>").templ(kEnd);
  } else if (system) {
    write_turn(p, messages[0]);
  }

  // Thoughts are shown only after the last question of a user; tool results in a user's turn are no question.
  size_t last_query = messages.size() - 1;
  for (size_t i = messages.size(); i-- > 0;) {
    const string& s = messages[i].content;
    if (messages[i].role != "user" || (s.starts_with("<tool_response>") && s.ends_with("</tool_response>"))) continue;
    last_query = i;
    break;
  }
  for (size_t i = system ? 1 : 0; i < messages.size(); ++i) {
    const Message& m = messages[i];
    const bool last = i + 1 == messages.size();
    if (m.role == "tool") {
      if (i == 0 || messages[i - 1].role != "tool") p.templ("<|im_start|>user");
      p.templ("\n<tool_response>\n").text(m.content).templ("\n</tool_response>");
      if (last || messages[i + 1].role != "tool") p.templ(kEnd);
    } else if (m.role == "assistant") {
      const Thought t = thinking ? split_thought(m) : Thought{"", m.content};
      const bool show = thinking && i > last_query && (last || !t.reasoning.empty());
      p.templ("<|im_start|>assistant\n").templ(show ? "<think>\n" : "");
      Prompt body;
      if (show) body.text(strip_newlines(t.reasoning, true, true)).templ("\n</think>\n\n");
      body.text(show ? strip_newlines(t.content, true, false) : t.content);
      write_json_calls(body, m, t.content);
      p.add(body, show || !thinking ? m.ids : std::vector<int32_t>()).templ(kEnd);
    } else {
      write_turn(p, m);
    }
  }
}

// Every key but those in `handled`, as an element of its own.
static void write_keys(Prompt& p, const Json& object, std::initializer_list<string_view> handled) {
  for (const auto& [k, v] : object.members())
    if (std::find(handled.begin(), handled.end(), k) == handled.end())
      p.templ("\n<").text(k).templ(">").text(value_text(v)).templ("</").text(k).templ(">");
}

static void write_described(Prompt& p, const Json& object) {
  if (const Json* d = object.find("description")) p.templ("\n<description>").text(trim(python_text(*d))).templ("</description>");
}

static void write_xml_tools(Prompt& p, const Json& tools) {
  p.templ("\n\n# Tools\n\nYou have access to the following tools:\n\n<tools>");
  for (const Json& tool : tools.items()) {
    const Json& f = function_of(tool);
    p.templ("\n<function>\n<name>").text(f.find("name")->as_string("")).templ("</name>");
    write_described(p, f);
    p.templ("\n<parameters>");
    if (const Json* parameters = f.find("parameters")) {
      const Json* properties = parameters->find("properties");
      if (properties && properties->is_object())
        for (const auto& [name, field] : properties->members()) {
          p.templ("\n<parameter>\n<name>").text(name).templ("</name>");
          if (const Json* type = field.find("type")) p.templ("\n<type>").text(python_text(*type)).templ("</type>");
          write_described(p, field);
          write_keys(p, field, {"name", "type", "description"});
          p.templ("\n</parameter>");
        }
      write_keys(p, *parameters, {"type", "properties"});
    }
    p.templ("\n</parameters>");
    write_keys(p, f, {"type", "name", "description", "parameters"});
    p.templ("\n</function>");
  }
  p.templ(
      "\n</tools>\n\nIf you choose to call a tool ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
      "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n<parameter=example_parameter_2>\n"
      "value_2\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
      "format: the tool calling block MUST begin with an opening <tool_call> tag and end with a closing </tool_call> tag.\n"
      "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in natural language "
      "BEFORE the function call, but NOT after\n- If there is no function call available, answer the question like normal with "
      "your current knowledge and do not tell the user about function calls\n</IMPORTANT>");
}

static void write_xml_calls(Prompt& p, const Message& m) {
  const string_view said = trim(m.content);
  if (!said.empty()) p.text(said).templ("\n\n");
  for (const ToolCall& call : m.calls) {
    const string where = "arguments of the call of " + json_quote(call.name.substr(0, 60));
    const Json parsed = call.arguments.is_string() ? Json::parse(call.arguments.as_string(""), where) : call.arguments;
    if (!parsed.is_object()) fail("%s: expected a JSON object, got %s", where.c_str(), parsed.dump().substr(0, 60).c_str());
    p.templ(&call == m.calls.data() ? "" : "\n").templ("<tool_call>\n<function=").text(call.name).templ(">\n");
    for (const auto& [k, v] : parsed.members())
      p.templ("<parameter=").text(k).templ(">\n").text(value_text(v)).templ("\n</parameter>\n");
    p.templ("</function>\n</tool_call>");
  }
}

static void render_xml_style(Prompt& p, const string& default_system, std::span<const Message> messages, const Json* tools) {
  const bool system = !messages.empty() && messages[0].role == "system";
  if (system || tools) {
    p.templ("<|im_start|>system\n");
    system ? p.text(messages[0].content) : p.templ(default_system);
    if (tools) write_xml_tools(p, *tools);
    p.templ(kEnd);
  }
  for (size_t i = system ? 1 : 0; i < messages.size(); ++i) {
    const Message& m = messages[i];
    if (m.role == "tool") {
      if (i == 0 || messages[i - 1].role != "tool") p.templ("<|im_start|>user\n");
      p.templ("<tool_response>\n").text(m.content).templ("\n</tool_response>\n");
      if (i + 1 == messages.size() || messages[i + 1].role != "tool") p.templ(kEnd);
    } else if (m.role == "assistant") {
      Prompt body;
      if (m.calls.empty()) body.text(m.content);
      else write_xml_calls(body, m);
      p.templ("<|im_start|>assistant\n").add(body, m.ids).templ(kEnd);
    } else {
      write_turn(p, m);
    }
  }
}

std::vector<TextPiece> render_chat(const ChatTemplate& t, std::span<const Message> messages, const Json* tools,
                                   bool generation_prompt) {
  if (t.style == ChatStyle::None) fail("chat: this model has no chat template: continue plain text instead (--raw)");
  check_roles(messages);
  if (tools) check_tools(*tools);
  if (tools && tools->items().empty()) tools = nullptr;
  Prompt p;
  if (t.style == ChatStyle::Coder) render_xml_style(p, t.coder_system, messages, tools);
  else render_json_style(p, t.style == ChatStyle::Thinking, messages, tools);
  if (generation_prompt) p.templ("<|im_start|>assistant\n").templ(t.style == ChatStyle::Thinking ? "<think>\n" : "");
  return p.take();
}

string join(std::span<const TextPiece> pieces) {
  string out;
  for (const TextPiece& p : pieces) out += p.text;
  return out;
}

// ---- recognising templates ------------------------------------------------------------------------------------------

uint64_t template_fingerprint(string_view jinja) { return fnv1a64(jinja); }

ChatStyle recognise_template(string_view jinja, bool& known) {
  struct Known {
    uint64_t fingerprint;
    ChatStyle style;
  };
  // The template of the first models of this family (2025-04), which think unless told not to: rendered as Thinking.
  static constexpr Known kKnown[] = {{0x2bfdb7aa9754484eull, ChatStyle::Thinking}};
  const uint64_t fingerprint = template_fingerprint(jinja);
  for (const Known& k : kKnown)
    if (k.fingerprint == fingerprint) {
      known = true;
      return k.style;
    }
  known = false;
  if (jinja.find("<function=") != jinja.npos) return ChatStyle::Coder;
  if (jinja.find("enable_thinking") != jinja.npos) return ChatStyle::Thinking;
  // A generation prompt that opens a thought and leaves it open; newlines may be written as \n or as themselves.
  const size_t generation = jinja.rfind("add_generation_prompt");
  if (generation == jinja.npos) return ChatStyle::Instruct;
  const size_t open = jinja.rfind("<think>");
  const bool opens = open != jinja.npos && open > generation && jinja.find("</think>", open) == jinja.npos;
  return opens ? ChatStyle::Thinking : ChatStyle::Instruct;
}

// ---- reading answers ------------------------------------------------------------------------------------------------

static std::optional<Json> try_json(string_view text) {
  try {
    return Json::parse(text, "");
  } catch (const Error&) {
    return std::nullopt;
  }
}

// Reads one call at the beginning of `rest`; on success `rest` starts after it.
class CallReader {
 public:
  explicit CallReader(string_view rest, const Json* tools) : rest_(rest), tools_(tools) {}
  string_view rest() const { return rest_; }

  bool read(ToolCall& call) {
    const bool opened = take("<tool_call>");
    skip_space();
    if (rest_.starts_with("<function=")) {
      if (!xml(call)) return false;
      const string_view end = rest_;
      skip_space();
      if (take("</tool_call>") || rest_.empty()) return true;
      rest_ = end;       // a bare <function=...> may be followed by anything
      return !opened;
    }
    if (!opened || !json(call)) return false;
    skip_space();
    return take("</tool_call>") || rest_.empty();
  }

 private:
  bool take(string_view s) {
    if (!rest_.starts_with(s)) return false;
    rest_.remove_prefix(s.size());
    return true;
  }
  void skip_space() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size())); }
  // What stands before the next '>'.
  bool name(string& out) {
    const size_t end = rest_.find('>');
    if (end == rest_.npos) return false;
    out = trim(rest_.substr(0, end));
    rest_.remove_prefix(end + 1);
    return !out.empty() && out.find_first_of("<\n") == out.npos;
  }

  // The object is found by its braces, since a string in it may hold "</tool_call>".
  bool json(ToolCall& call) {
    int depth = 0;
    bool quoted = false;
    size_t at = 0;
    for (; at < rest_.size(); ++at) {
      const char c = rest_[at];
      if (quoted && c == '\\') ++at;
      else if (c == '"') quoted = !quoted;
      else if (!quoted && c == '{') ++depth;
      else if (!quoted && c == '}' && --depth <= 0) break;
      if (depth == 0) return false;
    }
    if (at >= rest_.size()) return false;
    const auto object = try_json(rest_.substr(0, at + 1));
    const Json* name = object ? object->find("name") : nullptr;
    if (!name || !name->is_string() || name->as_string("").empty()) return false;
    const Json* arguments = object->find("arguments");
    if (arguments && !arguments->is_object() && !arguments->is_string()) return false;
    call = {name->as_string(""), arguments ? *arguments : Json::object()};
    rest_.remove_prefix(at + 1);
    return true;
  }

  bool xml(ToolCall& call) {
    constexpr int kMaxParameters = 1024;
    call = {"", Json::object()};
    if (!take("<function=") || !name(call.name)) return false;
    for (int i = 0; i < kMaxParameters; ++i) {
      skip_space();
      if (take("</function>")) return true;
      string key;
      string_view value;
      if (!take("<parameter=") || !name(key) || !xml_value(value)) return false;
      call.arguments.set(key, typed(call.name, key, value));
    }
    return false;
  }

  // A value ends at the first </parameter> that another parameter or the end of the function follows: it may hold anything else.
  bool xml_value(string_view& value) {
    constexpr string_view kClose = "</parameter>";
    for (size_t at = rest_.find(kClose); at != rest_.npos; at = rest_.find(kClose, at + 1)) {
      const string_view after = rest_.substr(at + kClose.size());
      const size_t next = after.find_first_not_of(" \t\r\n");
      const string_view tag = next == after.npos ? string_view() : after.substr(next);
      if (!tag.starts_with("<parameter=") && !tag.starts_with("</function>")) continue;
      value = rest_.substr(0, at);
      if (value.starts_with('\n')) value.remove_prefix(1);
      if (value.ends_with('\n')) value.remove_suffix(1);
      rest_ = after;
      return true;
    }
    return false;
  }

  const Json* declared_type(string_view function, string_view parameter) const {
    if (!tools_) return nullptr;
    for (const Json& tool : tools_->items()) {
      const Json& f = function_of(tool);
      const Json* name = f.find("name");
      if (!name || !name->is_string() || name->as_string("") != function) continue;
      const Json* at = f.find("parameters");
      for (string_view key : {string_view("properties"), parameter, string_view("type")}) at = at ? at->find(key) : nullptr;
      return at;
    }
    return nullptr;
  }

  // "string", alone or among others, stays as it is; anything else is JSON, or one of Python's words, or else still a string.
  Json typed(string_view function, string_view parameter, string_view value) const {
    if (const Json* type = declared_type(function, parameter)) {
      const auto is = [](const Json& t) { return t.is_string() && t.as_string("") == "string"; };
      if (is(*type) || std::any_of(type->items().begin(), type->items().end(), is)) return Json::string(string(value));
    }
    const string_view word = trim(value);
    if (word == "True" || word == "False") return Json::boolean(word == "True");
    if (word == "None") return Json();
    if (auto v = try_json(value)) return *std::move(v);
    return Json::string(string(value));
  }

  string_view rest_;
  const Json* tools_;
};

// Takes the calls out of `text`; what is left of it becomes answer.content, without the blanks round the calls.
static void read_calls(Answer& answer, string_view text, const Json* tools) {
  constexpr int kMaxFailures = 256;  // each may cost a look at the whole rest
  constexpr string_view kOpen = "<tool_call>", kFunction = "<function=";
  size_t shown = 0, at = 0;  // text before `shown` is dealt with
  const auto show = [&](string_view s, bool after_call, bool before_call) {
    const string_view trimmed = trim(s);
    if (trimmed.empty() && (after_call || before_call)) return;
    const size_t from = after_call ? size_t(trimmed.data() - s.data()) : 0;
    const size_t to = before_call ? size_t(trimmed.data() - s.data()) + trimmed.size() : s.size();
    if (!answer.content.empty()) answer.content += '\n';
    answer.content += s.substr(from, to - from);
  };
  for (int failures = 0; failures < kMaxFailures;) {
    at = std::min(text.find(kOpen, at), text.find(kFunction, at));
    if (at == text.npos) break;
    CallReader reader(text.substr(at), tools);
    ToolCall call;
    if (!reader.read(call)) {
      ++failures;
      ++at;
      continue;
    }
    show(text.substr(shown, at - shown), !answer.calls.empty(), true);
    answer.calls.push_back(std::move(call));
    shown = at = text.size() - reader.rest().size();
  }
  show(text.substr(shown), !answer.calls.empty(), false);
}

Answer parse_answer(ChatStyle style, string_view text, const Json* tools) {
  Answer answer;
  if (style == ChatStyle::Thinking) {
    constexpr string_view kOpen = "<think>", kClose = "</think>";
    const size_t close = text.find(kClose);
    string_view reasoning = text.substr(0, close);
    if (const string_view s = trim(reasoning); s.starts_with(kOpen)) reasoning = s.substr(kOpen.size());
    answer.reasoning = strip_newlines(reasoning, true, true);
    answer.thinking = close == text.npos;
    if (answer.thinking) return answer;
    text = strip_newlines(text.substr(close + kClose.size()), true, false);
  }
  if (style == ChatStyle::None) answer.content = text;
  else read_calls(answer, text, tools);
  return answer;
}

}  // namespace qn
