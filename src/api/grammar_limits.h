// How deep a grammar may be: upstream follows parentheses and references by recursion, and ends with its stack.
#pragma once

#include <string>

struct llama_grammar_parser;

namespace superllama {

// Parentheses within each other. Throws std::runtime_error with the depth; the text need not be a grammar otherwise.
void check_grammar_text(const std::string & grammar);

// Rules that begin with each other, and with themselves. Throws std::runtime_error that names one.
void check_grammar_rules(const llama_grammar_parser & parser);

} // namespace superllama
