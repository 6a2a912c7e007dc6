#include "api/answer_format.h"

#include "api/schema_check.h"
#include "api/tool_choice.h"

#include "json.h"

#include <stdexcept>
#include <string>

namespace superllama {

// What a request says of the answer's form, wherever its API has it; null: nothing.
static const common_json * format_of(const common_json & request) {
    const auto member = [](const common_json * of, const char * name) -> const common_json * {
        return of != nullptr && of->is_object() && of->contains(name) ? &of->at(name) : nullptr;
    };
    for (const common_json * found : {
             member(member(&request, "text"), "format"),                             // responses
             member(member(&request, "output_config"), "format"),                    // messages
             member(&request, "output_format"), member(&request, "response_format"), // completions
         }) {
        if (found != nullptr && !found->is_null()) {
            return found;
        }
    }
    return nullptr;
}

// The schema that a request asks for; null where any text will do. Its place in a format differs between the APIs.
static common_json schema_of(const common_json & request) {
    const common_json * format = format_of(request);
    if (format == nullptr) {
        return common_json();
    }
    const std::string type = format->is_object() && format->contains("type") && format->at("type").is_string()
                                 ? format->at("type").get<std::string>()
                                 : "";
    if (type == "text") {
        return common_json();
    }
    if (type != "json_object" && type != "json_schema") {
        throw std::invalid_argument(
            "the format of the answer: its type is \"text\", \"json_object\" or \"json_schema\", not \"" + type + "\"");
    }
    const common_json & holder = format->contains("json_schema") ? format->at("json_schema") : *format;
    if (holder.is_object() && holder.contains("schema")) {
        return holder.at("schema");
    }
    if (type == "json_schema") {
        throw std::invalid_argument("the format of the answer: a json_schema needs its \"schema\"");
    }
    return common_json{ { "type", "object" } };
}

void carry_format(const common_json & from, common_json & chat) {
    const common_json schema = schema_of(from);
    if (!schema.is_null()) {
        chat["response_format"] = common_json{ { "type", "json_schema" }, { "json_schema", { { "schema", schema } } } };
    }
    for (const char * name : { "grammar", "json_schema" }) {
        if (from.contains(name) && !chat.contains(name)) {
            chat[name] = from.at(name);
        }
    }
}

common_json with_schema(common_json completion) {
    const common_json schema = schema_of(completion);
    if (!schema.is_null()) {
        completion["json_schema"] = schema;
    }
    return completion;
}

void check_answer(const common_json & request, const common_json & schema, common_json & tools, std::string & choice,
                  const common_chat_templates * templates) {
    check_schemas(schema, tools);
    choose_tool(request, tools, choice, templates);
}

} // namespace superllama
