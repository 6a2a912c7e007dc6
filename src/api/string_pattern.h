// Patterns of JSON strings as a grammar sees them: of the text between the quotes, in which some characters are
// escaped.
#pragma once

#include <string>

namespace superllama {

// The pattern of all texts that stand for strings which `pattern` (a regular expression of ECMAScript) is found in,
// from ^ to $ and in the part of the syntax that upstream's converter reads. A character that JSON escapes is written
// as JSON has it, and \d, \w, \s, sets that are negated and dots are sets. What a grammar cannot hold (looking around,
// references back, anchors inside) comes back as a text that the converter refuses.
std::string pattern_in_json(const std::string & pattern);

} // namespace superllama
