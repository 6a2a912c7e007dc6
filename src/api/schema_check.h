// JSON schemas for constrained answers: what the grammar made of one cannot hold is refused, not dropped.
#pragma once

#include "api/string_pattern.h" // for upstream's converter, which sees this header

class common_json;

namespace superllama {

// Throws std::invalid_argument that names the keyword and its place in the schema where upstream's converter would
// drop a constraint (it reads a part of the keywords, and patterns of some kinds), or follow a reference for ever.
// Annotations pass, "format" is one of them but for dates, times and UUIDs, and oneOf is taken as anyOf.
void check_schema(const common_json & schema);

// A request's schema of the answer, which may be null, and the parameters of its tools that are "strict".
void check_schemas(const common_json & answer, const common_json & tools);

} // namespace superllama
