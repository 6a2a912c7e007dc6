// The form of an answer that a request asks for, in the words of the API that it comes by.
#pragma once

#include <string>

class common_json;
struct common_chat_templates;

namespace superllama {

// What a request of another API than chat completions asks of the answer's form, which upstream does not read there: as
// `response_format` and `grammar` of the chat completion that it is converted to, or as the `json_schema` of a
// completion. Throws std::invalid_argument for forms that there are not.
void carry_format(const common_json & from, common_json & chat);
common_json with_schema(common_json completion);

// What a chat completion asks of its answer: a schema, which may be null, and tools. See check_schemas(),
// choose_tool().
void check_answer(const common_json & request, const common_json & schema, common_json & tools, std::string & choice,
                  const common_chat_templates * templates);

} // namespace superllama
