#include "api/tool_choice.h"

#include "chat.h"
#include "json.h"

#include <stdexcept>

namespace superllama {

static std::string name_of(const common_json & tool) {
    const common_json & named = tool.contains("function") ? tool.at("function") : tool;
    return named.is_object() && named.contains("name") && named.at("name").is_string()
               ? named.at("name").get<std::string>()
               : std::string();
}

static common_json only(const common_json & tools, const std::string & name) {
    common_json found = common_json::array();
    for (size_t i = 0; tools.is_array() && i < tools.size(); i++) {
        if (tools.at(i).is_object() && name_of(tools.at(i)) == name) {
            found.push_back(tools.at(i));
        }
    }
    return found;
}

void choose_tool(const common_json & request, common_json & tools, std::string & choice,
                 const common_chat_templates * templates) {
    if (request.contains("tool_choice") && !request.at("tool_choice").is_null() &&
        !request.at("tool_choice").is_string()) {
        const common_json & wanted = request.at("tool_choice");
        const std::string name = wanted.is_object() ? name_of(wanted) : std::string();
        if (name.empty()) {
            throw std::invalid_argument("tool_choice must be \"auto\", \"none\", \"required\", or name a tool as "
                                        "{\"type\": \"function\", \"function\": {\"name\": ...}}");
        }
        tools = only(tools, name);
        if (tools.empty()) {
            throw std::invalid_argument("tool_choice names " + name + ", which is not among the tools");
        }
        choice = "required";
    }
    if (choice == "required") {
        if (!tools.is_array() || tools.empty()) {
            throw std::invalid_argument("tool_choice is \"required\", and there are no tools");
        }
        auto can = common_chat_templates_get_caps(templates);
        if (!can["supports_tools"] && common_chat_templates_source(templates, "tool_use").empty()) {
            throw std::invalid_argument(
                "this model's chat template shows no tools to it, so that none can be required; "
                "use a model, or a chat template, that knows tools");
        }
    }
}

} // namespace superllama
