// Why a grammar cannot be used, and how deep it may be: upstream follows parentheses and references by recursion, and
// ends with its stack.
#pragma once

#include <cstddef>
#include <string>

struct llama_grammar_parser;
struct llama_vocab;

namespace superllama {

// Parentheses within each other. Throws std::runtime_error with the depth; the text need not be a grammar otherwise.
void check_grammar_text(const std::string & grammar);

// Rules that begin with each other, and with themselves. Throws std::runtime_error that names one.
void check_grammar_rules(const llama_grammar_parser & parser);

// All of it, before upstream's parser sees it, which prints its reasons and tells a caller only that there is one.
// Throws std::invalid_argument with the place and what was expected there. Without a vocabulary, "<token>" is an error.
void check_grammar(const llama_vocab * vocab, const std::string & grammar, const std::string & root);

// What one token costs: a grammar that may go on in many ways has each of them compared with the `n_ways` before it.
// Throws std::runtime_error where that takes seconds.
void begin_grammar_token();
void count_grammar_step(size_t n_ways);

} // namespace superllama
