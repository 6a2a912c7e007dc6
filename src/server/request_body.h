// Bodies of requests before upstream reads them: what it would cut or drop without a word.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace superllama {

// Whether `path` is that of a route, behind whatever prefix the server has.
bool is_path(const std::string & path, const char * route);

// Whether a body may have this key, of small letters and "_": before it is worth to parse it.
bool may_have(const std::string & body, const char * key);

// The body as upstream is to see it, where that is another one; `n_vocab` are the tokens that there are. Throws
// std::invalid_argument for integers that upstream's numbers cannot hold, tokens that there are not, forms of answers
// that there are not. What is no JSON is left to upstream.
std::optional<std::string> checked_body(const std::string & path, const std::string & body, int32_t n_vocab);

} // namespace superllama
