// Chat templates come with a model's file, from anywhere: what upstream's code would parse, run or free by recursion
// until the process ends is refused.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

namespace superllama {

// How deep the parts of a template lie within each other. Throws std::invalid_argument.
class template_shape {
  public:
    void open_tag(bool is_statement); // {{ or {%
    void close_tag();
    void open_bracket();
    void close_bracket();
    void add_word(const std::string & word);
    void add_operator();
    void add_equals();
    void add_number(const std::string & digits);

  private:
    void open_block();
    void close_block();

    int n_brackets = 0;
    int n_operators = 0; // of this tag
    int n_blocks = 0;    // that are open, and conditions that follow another one's
    bool is_first = false;
    bool may_set_block = false;  // {% set %}, so far without a value
    std::vector<int> conditions; // for each block: how many of n_blocks it is
};

// What upstream's lexer made of a template, if it is not too deep.
template <class Lexed>
const Lexed & checked_template(const Lexed & lexed) {
    template_shape shape;
    for (const auto & token : lexed.tokens) {
        using kind = std::decay_t<decltype(token)>;
        switch (token.t) {
            case kind::open_statement:
            case kind::open_expression:
                shape.open_tag(token.t == kind::open_statement);
                break;
            case kind::close_statement:
            case kind::close_expression:
                shape.close_tag();
                break;
            case kind::open_paren:
            case kind::open_square_bracket:
            case kind::open_curly_bracket:
                shape.open_bracket();
                break;
            case kind::close_paren:
            case kind::close_square_bracket:
            case kind::close_curly_bracket:
                shape.close_bracket();
                break;
            case kind::identifier:
                shape.add_word(token.value);
                break;
            case kind::numeric_literal:
                shape.add_number(token.value);
                break;
            case kind::text:
            case kind::comment:
            case kind::comma:
            case kind::string_literal:
            case kind::eof:
                break;
            case kind::equals:
                shape.add_equals();
                break;
            default:
                shape.add_operator();
        }
    }
    return lexed;
}

// While it lives, a part of a template runs in this thread; they run within each other, macros as deep as they like.
class template_step {
  public:
    template_step(); // throws std::runtime_error where little of the thread's stack is left, or it goes on for ever
    ~template_step();
    template_step(const template_step &) = delete;
    template_step & operator=(const template_step &) = delete;
};

} // namespace superllama
