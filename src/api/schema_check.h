// JSON schemas for constrained answers: what the grammar made of one cannot hold is refused, not dropped.
#pragma once

class common_json;

namespace superllama {

// Throws std::invalid_argument that names the keyword and its place in the schema where upstream's converter would
// drop a constraint (it reads a part of the keywords, and patterns of some kinds), or follow a reference for ever.
// Annotations pass, "format" is one of them but for dates, times and UUIDs, and oneOf is taken as anyOf.
void check_schema(const common_json & schema);

// A request's schema of the answer, which may be null, and the parameters of its tools that are "strict".
void check_schemas(const common_json & answer, const common_json & tools);

// What a request of another API than chat completions asks of the answer's form, which upstream does not read there: as
// `response_format` and `grammar` of the chat completion that it is converted to, or as the `json_schema` of a
// completion. Throws std::invalid_argument for forms that there are not.
void carry_format(const common_json & from, common_json & chat);
common_json with_schema(common_json completion);

} // namespace superllama
