#include "api/grammar_limits.h"

#include "base/quoted.h"
#include "llama-grammar.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace superllama {

[[noreturn]] static void refuse(const std::string & what) {
    throw std::runtime_error(what);
}

// ---------------------------------------------------------------------------------------------------- text

// "{m,n}", and how many operators that repeat follow one another: each multiplies the ways to read a text.
class repetitions {
  public:
    void see(const std::string & text, size_t i) {
        const char c = text[i];
        if (strchr("*+?{", c) != nullptr) {
            n++;
        } else if (c == '}' || isspace((unsigned char) c) || (inside && (isdigit((unsigned char) c) || c == ','))) {
        } else {
            n = 0;
        }
        inside = c == '{' || (inside && c != '}');
        if (c == '{') {
            check_range(text, i);
        }
        if (n > most) {
            refuse("the grammar repeats what is repeated more than " + std::to_string(most) +
                   " times in a row; one operator says the same");
        }
    }

  private:
    static void check_range(const std::string & text, size_t i) {
        const size_t end = std::min(text.find('}', i), text.size());
        const size_t comma = text.find(',', i);
        if (comma >= end || text.find_first_of("0123456789", comma) >= end) {
            return; // "{m}", or "{m,}"
        }
        const auto number = [&](size_t at) { return strtoull(text.c_str() + at + 1, nullptr, 10); };
        if (number(i) > number(comma)) {
            refuse("the grammar repeats something " + text.substr(i, end - i) + "}: the least is more than the most");
        }
    }

    static const int most = 3;
    int n = 0;
    bool inside = false; // of braces
};

void check_grammar_text(const std::string & text) {
    const size_t most = 500;
    size_t depth = 0;
    repetitions repeated;
    for (size_t i = 0; i < text.size(); ++i) {
        repeated.see(text, i);
        switch (text[i]) {
            case '"':
                i = skip_to(text, i, '"');
                break;
            case '[':
                i = skip_to(text, i, ']');
                break;
            case '#':
                i = std::min(text.size(), text.find_first_of("\r\n", i));
                break;
            case '(':
                if (++depth > most) {
                    refuse("the grammar has more than " + std::to_string(most) +
                           " parentheses within each other; give inner parts names of their own");
                }
                break;
            case ')':
                depth -= depth > 0 ? 1 : 0;
                break;
            default:
                break;
        }
    }
}

// --------------------------------------------------------------------------------------------------- rules

static bool ends(const llama_grammar_element & element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

static bool may_be_empty(const llama_grammar_rule & rule) {
    bool at_start = true;
    for (const llama_grammar_element & element : rule) {
        if (ends(element) && at_start) {
            return true;
        }
        at_start = ends(element);
    }
    return false;
}

// The rules that a rule can begin with, as upstream's search for left recursion sees it.
static std::vector<uint32_t> first_rules(const llama_grammar_rule & rule, const std::vector<bool> & empty) {
    std::vector<uint32_t> first;
    bool at_start = true;
    for (const llama_grammar_element & element : rule) {
        if (element.type == LLAMA_GRETYPE_RULE_REF && at_start) {
            first.push_back(element.value);
            at_start = empty[element.value];
        } else {
            at_start = ends(element);
        }
    }
    return first;
}

static std::string name_of(const llama_grammar_parser & parser, uint32_t rule) {
    for (const auto & symbol : parser.symbol_ids) {
        if (symbol.second == rule) {
            return symbol.first;
        }
    }
    return std::to_string(rule);
}

// What upstream's search for left recursion, and then every step of sampling, would do: how deep, and how often.
class rule_walk {
  public:
    rule_walk(const llama_grammar_parser & parser, const std::vector<bool> & empty) :
        parser(parser),
        rules(parser.rules.size()) {
        for (size_t i = 0; i < rules.size(); ++i) {
            rules[i].first = first_rules(parser.rules[i], empty);
        }
    }

    void follow(uint32_t start) {
        enter(start);
        while (!path.empty()) {
            rule & at = rules[path.back()];
            if (at.next == at.first.size()) {
                leave();
            } else {
                enter(at.first[at.next++]);
            }
        }
    }

  private:
    static const uint32_t most_depth = 4096;
    static constexpr double most_calls = 1e7;

    enum rule_state { UNSEEN, OPEN, DONE };

    struct rule {
        std::vector<uint32_t> first;
        size_t next = 0;
        rule_state state = UNSEEN;
        uint32_t depth = 0; // of the rules below
        double calls = 1;
    };

    void enter(uint32_t id) {
        rule & it = rules[id];
        if (it.state == OPEN) {
            refuse("the grammar's rule \"" + name_of(parser, id) + "\" can begin with itself (left recursion)");
        }
        if (it.state == DONE) {
            add_to_parent(it);
            return;
        }
        it.state = OPEN;
        path.push_back(id);
    }

    void leave() {
        rule & it = rules[path.back()];
        if (it.depth > most_depth || it.calls > most_calls) {
            refuse("the grammar's rule \"" + name_of(parser, path.back()) + "\" begins with too many rules within " +
                   "each other: more than " + std::to_string(most_depth) + " deep, or in too many ways");
        }
        it.state = DONE;
        path.pop_back();
        add_to_parent(it);
    }

    void add_to_parent(const rule & child) {
        if (!path.empty()) {
            rule & parent = rules[path.back()];
            parent.depth = std::max(parent.depth, child.depth + 1);
            parent.calls += child.calls;
        }
    }

    const llama_grammar_parser & parser;
    std::vector<rule> rules;
    std::vector<uint32_t> path;
};

// Each of so many parts in a row that may be empty is one more way to go on after every character.
static void check_empty_parts(const llama_grammar_parser & parser, const std::vector<bool> & empty) {
    const size_t most = 100;
    for (uint32_t i = 0; i < parser.rules.size(); ++i) {
        size_t n = 0;
        for (const llama_grammar_element & element : parser.rules[i]) {
            n = element.type == LLAMA_GRETYPE_RULE_REF && empty[element.value] ? n + 1 : 0;
            if (n > most) {
                refuse("the grammar's rule \"" + name_of(parser, i) + "\" has more than " + std::to_string(most) +
                       " parts in a row that may be empty; x{0,N} says x?{N} in one part");
            }
        }
    }
}

void check_grammar_rules(const llama_grammar_parser & parser) {
    std::vector<bool> empty;
    for (const llama_grammar_rule & rule : parser.rules) {
        empty.push_back(may_be_empty(rule));
    }
    check_empty_parts(parser, empty);
    rule_walk walk(parser, empty);
    for (uint32_t i = 0; i < parser.rules.size(); ++i) {
        walk.follow(i);
    }
}

// ---------------------------------------------------------------------------------------------------- reasons

// Upstream's parser says "expecting ... at" and quotes all that follows: where that begins, for people.
static std::string with_place(const std::string & text, const std::string & what) {
    const std::string at = " at ";
    for (size_t i = what.find(at); i != std::string::npos; i = what.find(at, i + 1)) {
        const std::string rest = what.substr(i + at.size());
        if (rest.size() > text.size() || text.compare(text.size() - rest.size(), rest.size(), rest) != 0) {
            continue;
        }
        const std::string before = text.substr(0, text.size() - rest.size());
        const auto line = std::count(before.begin(), before.end(), '\n') + 1;
        const auto is_first_byte = [](char c) { return ((unsigned char) c & 0xC0) != 0x80; }; // of a character
        const size_t begin = before.rfind('\n') + 1;                                          // npos + 1 is 0
        const auto column = std::count_if(before.begin() + (ptrdiff_t) begin, before.end(), is_first_byte) + 1;
        std::string here = rest.substr(0, std::min(rest.find('\n'), size_t(60)));
        while (here.size() < rest.size() && !is_first_byte(rest[here.size()]) && !here.empty()) {
            here.pop_back(); // not the half of a character
        }
        return "line " + std::to_string(line) + ", column " + std::to_string(column) + ": " + what.substr(0, i) +
               (rest.empty()   ? ", and the grammar ends"
                : here.empty() ? " before the line's end"
                               : " at '" + here + "'");
    }
    return what;
}

void check_grammar(const llama_vocab * vocab, const std::string & text, const std::string & root) {
    std::string why;
    try {
        llama_grammar_parser parser(vocab);
        check_grammar_text(text);
        const char * at = text.c_str();
        while (*at == '#' || (*at != '\0' && strchr(" \t\r\n", *at) != nullptr)) {
            at += *at == '#' ? strcspn(at, "\r\n") : 1;
        }
        while (*at != '\0') {
            at = parser.parse_rule(at);
        }
        for (const auto & symbol : parser.symbol_ids) {
            if (symbol.second >= parser.rules.size() || parser.rules[symbol.second].empty()) {
                throw std::runtime_error("it refers to a rule '" + symbol.first + "', which it does not have");
            }
        }
        check_grammar_rules(parser);
        if (parser.symbol_ids.count(root) == 0) {
            throw std::runtime_error("it has no rule '" + root + "', which is the whole text");
        }
        return;
    } catch (const std::exception & e) {
        why = with_place(text, e.what());
    }
    throw std::invalid_argument("the grammar cannot be used: " + why + "; see llama.cpp's grammars/README.md for GBNF");
}

// ------------------------------------------------------------------------------------------------------ steps

static thread_local size_t n_steps = 0; // ten million take a second, about

void begin_grammar_token() {
    n_steps = 0;
}

void count_grammar_step(size_t n_ways) {
    const size_t most = 20000000;
    n_steps += 10 + n_ways / 50; // a way is a copy of its own, which is compared with the others
    if (n_steps > most) {
        n_steps = 0;
        refuse("the grammar can go on in too many ways at once, and one token would take seconds; say what is repeated "
               "with one repetition, and put common beginnings together");
    }
}

} // namespace superllama
