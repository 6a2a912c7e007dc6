// Which tool a request wants to be called: what upstream's server would take for "auto" without a word is held or
// refused.
#pragma once

#include <string>

class common_json;
struct common_chat_templates;

namespace superllama {

// A request that names a tool ({"type": "function", "function": {"name": ...}}) has that one only in `tools`, and
// "required" as its `choice`. Throws std::invalid_argument for a tool that is not there, a choice that is none, and one
// that has to be held by a chat template which shows no tools to the model.
void choose_tool(const common_json & request, common_json & tools, std::string & choice,
                 const common_chat_templates * templates);

} // namespace superllama
