#include "api/template_limits.h"

#include "base/deep_stack.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

namespace superllama {

// Templates in the field have ten of each at most, and some dozen operators. Parsing takes some KiB of stack for each
// level, freeing some bytes for each operator; threads have 512 KiB on some systems.
static const int most_within = 100;
static const int most_operators = 500;

static void check(int n, int most, const char * what) {
    if (n > most) {
        throw std::invalid_argument("the chat template has more than " + std::to_string(most) + " " + what);
    }
}

void template_shape::open_tag(bool is_statement) {
    n_brackets = n_operators = 0;
    is_first = is_statement;
    may_set_block = false;
}

void template_shape::close_tag() {
    if (may_set_block) {
        open_block();
    }
    is_first = may_set_block = false;
}

void template_shape::open_bracket() {
    check(++n_brackets, most_within, "brackets within each other");
    add_operator();
}

void template_shape::close_bracket() {
    n_brackets--;
}

void template_shape::add_operator() {
    check(++n_operators, most_operators, "operators in one tag");
}

void template_shape::add_equals() {
    may_set_block = may_set_block && n_brackets > 0;
}

void template_shape::open_block() {
    n_blocks++;
    conditions.push_back(1);
    check(n_blocks, most_within, "blocks within each other");
}

void template_shape::close_block() {
    if (!conditions.empty()) {
        n_blocks -= conditions.back();
        conditions.pop_back();
    }
}

// The first word of a statement says whether a block begins or ends there.
void template_shape::add_word(const std::string & word) {
    if (!is_first) {
        add_operator(); // not, is, in, if, else: each is a level of its own
        return;
    }
    is_first = false;
    may_set_block = word == "set";
    if (word == "if" || word == "for" || word == "macro" || word == "call" || word == "filter") {
        open_block();
    } else if (word == "endif" || word == "endfor" || word == "endmacro" || word == "endcall" || word == "endfilter" ||
               word == "endset") {
        close_block();
    } else if (word == "elif" && !conditions.empty()) { // it lies within the condition before
        conditions.back()++;
        check(++n_blocks, most_within, "conditions that follow each other");
    }
}

// Of a range, or a text that is repeated: memory that is taken at once.
void template_shape::add_number(const std::string & digits) {
    if (strtod(digits.c_str(), nullptr) > 1e6) {
        throw std::invalid_argument("the chat template has a number over a million, " + digits);
    }
}

static thread_local int n_within = 0;
static thread_local int64_t n_steps = 0;
static thread_local bool was_stopped = false; // the last one in this thread

// Upstream tries a template with dozens of conversations before it is used: one that goes on for ever is stopped sooner
// after the first of them.
static int64_t most_steps() {
    const int64_t most = 1000000; // seconds; a hundred for each of a thousand messages are a tenth
    return was_stopped ? most / 100 : most;
}

template_step::template_step() {
    const size_t needed = 128 * 1024; // for what a step does beside calling others
    if (stack_left() < needed) {
        throw std::runtime_error("the chat template calls itself too deep");
    }
    n_steps = n_within == 0 ? 0 : n_steps + 1;
    if (n_steps > most_steps()) {
        was_stopped = true;
        throw std::runtime_error("the chat template does not come to an end");
    }
    n_within++;
}

template_step::~template_step() {
    n_within--;
    was_stopped = was_stopped && (n_within > 0 || n_steps > most_steps());
}

} // namespace superllama
