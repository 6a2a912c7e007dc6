#include "api/string_pattern.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <utility>
#include <vector>

namespace superllama {

namespace {

using range = std::pair<uint32_t, uint32_t>; // both ends are in it
using char_set = std::vector<range>;         // in order, none touches the next

const uint32_t last_char = 0x10FFFF;
const int deepest = 64;         // of groups within each other; the parser recurses with them
const size_t longest = 1 << 16; // of a pattern that is written
const char * const hex = "0123456789abcdef";

struct unheld : std::runtime_error {
    using std::runtime_error::runtime_error;
};

char_set ordered(char_set set) {
    std::sort(set.begin(), set.end());
    char_set merged;
    for (const range & r : set) {
        if (!merged.empty() && r.first <= merged.back().second + 1) {
            merged.back().second = std::max(merged.back().second, r.second);
        } else {
            merged.push_back(r);
        }
    }
    return merged;
}

char_set without(const char_set & set, const char_set & gone) {
    char_set left;
    for (range r : ordered(set)) {
        for (const range & g : ordered(gone)) {
            if (g.second < r.first || g.first > r.second) {
                continue;
            }
            if (g.first > r.first) {
                left.push_back({ r.first, g.first - 1 });
            }
            if (g.second >= r.second) {
                r = { 1, 0 };
                break;
            }
            r.first = g.second + 1;
        }
        if (r.first <= r.second) {
            left.push_back(r);
        }
    }
    return left;
}

bool has(const char_set & set, uint32_t c) {
    return std::any_of(set.begin(), set.end(), [&](const range & r) { return r.first <= c && c <= r.second; });
}

const char_set all = { { 0, 0xD7FF }, { 0xE000, last_char } };
const char_set digits = { { '0', '9' } };
const char_set word = { { '0', '9' }, { 'A', 'Z' }, { '_', '_' }, { 'a', 'z' } };
// what ECMAScript, Python and Rust agree on, which check an answer afterwards; and what one of them counts as well
const char_set space = { { 0x09, 0x0D },     { 0x20, 0x20 },     { 0xA0, 0xA0 },
                         { 0x1680, 0x1680 }, { 0x2000, 0x200A }, { 0x2028, 0x2029 },
                         { 0x202F, 0x202F }, { 0x205F, 0x205F }, { 0x3000, 0x3000 } };
const char_set other_space = { { 0x1C, 0x1F }, { 0x85, 0x85 }, { 0xFEFF, 0xFEFF } };
const char_set other_word = { { 0x80, last_char } };
const char_set line_ends = { { '\n', '\n' }, { '\r', '\r' }, { 0x2028, 0x2029 } };
const char_set escaped_in_json = { { 0, 0x1F }, { '"', '"' }, { '\\', '\\' } };

// ------------------------------------------------------------------------------------------------ writing

std::string code(uint32_t c) {
    char text[16];
    snprintf(text, sizeof(text), c < 0x100 ? "\\x%02X" : c < 0x10000 ? "\\u%04X" : "\\U%08X", c);
    return text;
}

std::string plain(const char_set & set) {
    std::string text = "[";
    for (const range & r : set) {
        text += code(r.first);
        if (r.second > r.first) {
            text += "-" + code(r.second);
        }
    }
    return text + "]";
}

// One character of a set, as it stands in JSON.
std::string one_of(const char_set & set) {
    std::vector<std::string> ways;
    const char_set as_they_are = without(set, escaped_in_json);
    if (!as_they_are.empty()) {
        ways.push_back(plain(as_they_are));
    }
    char_set letters;
    for (const auto & [c, letter] : { range{ '"', '"' },
                                      { '\\', '\\' },
                                      { '\b', 'b' },
                                      { '\f', 'f' },
                                      { '\n', 'n' },
                                      { '\r', 'r' },
                                      { '\t', 't' } }) {
        if (has(set, c)) {
            letters.push_back({ letter, letter });
        }
    }
    if (!letters.empty()) {
        ways.push_back(code('\\').insert(0, "[") + "]" + plain(ordered(letters)));
    }
    for (uint32_t high = 0; high < 2; high++) {
        char_set low;
        for (uint32_t i = 0; i < 16; i++) {
            if (has(set, 16 * high + i)) {
                low.push_back({ (uint32_t) hex[i], (uint32_t) hex[i] });
            }
        }
        if (!low.empty()) {
            ways.push_back("[" + code('\\') + "]u00" + std::to_string(high) + plain(ordered(low)));
        }
    }
    if (ways.empty()) {
        throw unheld("a set that nothing is in");
    }
    std::string text = ways[0];
    for (size_t i = 1; i < ways.size(); i++) {
        text += "|" + ways[i];
    }
    return ways.size() == 1 && !as_they_are.empty() ? text : "(" + text + ")";
}

// ------------------------------------------------------------------------------------------------ reading

class parser {
  public:
    explicit parser(const std::string & pattern) : p_(pattern) {}

    std::string whole() {
        std::string text;
        do {
            const std::string anything = one_of(all) + "*";
            const bool from_begin = take('^');
            std::string part = sequence(0);
            const bool to_end = take('$');
            text += text.empty() ? "" : "|";
            text += (from_begin ? "" : anything) + part + (to_end ? "" : anything);
        } while (take('|'));
        if (i_ < p_.size()) {
            throw unheld("an anchor inside, or a parenthesis too many");
        }
        return "^(" + text + ")$";
    }

  private:
    bool more() const { return i_ < p_.size(); }
    bool take(char c) {
        if (more() && p_[i_] == c) {
            i_++;
            return true;
        }
        return false;
    }

    std::string alternatives(int depth) {
        std::string text = sequence(depth);
        while (take('|')) {
            text += "|" + sequence(depth);
        }
        return text;
    }

    std::string sequence(int depth) {
        std::string text;
        while (more() && p_[i_] != '|' && p_[i_] != ')' && p_[i_] != '$') {
            const std::string one = atom(depth);
            text += one + times();
            if (text.size() > longest) {
                throw unheld("it is too long");
            }
        }
        return text;
    }

    std::string atom(int depth) {
        if (take('(')) {
            if (take('?') && !take(':')) {
                throw unheld("a group that looks around or has a name");
            }
            if (depth == deepest) {
                throw unheld("groups that are too deep");
            }
            const std::string inner = alternatives(depth + 1);
            if (!take(')')) {
                throw unheld("a group without an end, or an anchor inside");
            }
            return "(" + inner + ")";
        }
        if (take('[')) {
            return one_of(set());
        }
        if (take('.')) {
            return one_of(without(all, line_ends));
        }
        if (take('\\')) {
            return one_of(escape(false).sure);
        }
        const uint32_t c = character();
        if (c < 0x80 && std::string("^*+?{}]").find((char) c) != std::string::npos) {
            throw unheld("a character that has to be escaped");
        }
        return one_of({ { c, c } });
    }

    std::string times() {
        std::string text;
        if (more() && std::string("*+?").find(p_[i_]) != std::string::npos) {
            text = p_[i_++];
        } else if (take('{')) {
            text = "{" + number();
            if (take(',')) {
                text += ",";
                if (more() && p_[i_] != '}') {
                    text += number();
                }
            }
            if (!take('}')) {
                throw unheld("braces that are no count");
            }
            text += "}";
        }
        if (!text.empty()) {
            take('?'); // which texts fit does not depend on greed
            if (more() && std::string("*+{").find(p_[i_]) != std::string::npos) {
                throw unheld("a repetition of a repetition");
            }
        }
        return text;
    }

    std::string number() {
        std::string text;
        while (more() && p_[i_] >= '0' && p_[i_] <= '9' && text.size() < 7) {
            text += p_[i_++];
        }
        if (text.empty()) {
            throw unheld("braces that are no count");
        }
        return text;
    }

    // Characters that are in it for every dialect, and for some.
    struct members {
        char_set sure, possible;
        members(char_set set) : sure(set), possible(std::move(set)) {}
        members(char_set sure, const char_set & others) : sure(sure), possible(std::move(sure)) {
            possible.insert(possible.end(), others.begin(), others.end());
        }
        members inverted() const {
            members all_others(without(all, possible));
            all_others.possible = without(all, sure);
            return all_others;
        }
        bool is_one() const { return sure.size() == 1 && sure[0].first == sure[0].second; }
    };

    char_set set() {
        const bool negated = take('^');
        char_set sure, possible;
        while (!take(']')) {
            members first = member();
            if (more() && p_[i_] == '-' && i_ + 1 < p_.size() && p_[i_ + 1] != ']') {
                i_++;
                const members last = member();
                if (!first.is_one() || !last.is_one() || last.sure[0].first < first.sure[0].first) {
                    throw unheld("a range that is none");
                }
                first = members({ { first.sure[0].first, last.sure[0].first } });
            }
            sure.insert(sure.end(), first.sure.begin(), first.sure.end());
            possible.insert(possible.end(), first.possible.begin(), first.possible.end());
        }
        return negated ? without(all, possible) : without(sure, { { 0xD800, 0xDFFF } });
    }

    members member() {
        if (!more()) {
            throw unheld("a set without an end");
        }
        if (take('\\')) {
            return escape(true);
        }
        const uint32_t c = character();
        return members({ { c, c } });
    }

    members escape(bool in_set) {
        if (!more()) {
            throw unheld("a backslash at the end");
        }
        const char c = p_[i_++];
        switch (c) {
            case 'd':
                return digits;
            case 'D':
                return members(digits).inverted();
            case 'w':
                return members(word, other_word);
            case 'W':
                return members(word, other_word).inverted();
            case 's':
                return members(space, other_space);
            case 'S':
                return members(space, other_space).inverted();
            case 't':
                return one('\t');
            case 'n':
                return one('\n');
            case 'r':
                return one('\r');
            case 'f':
                return one('\f');
            case 'v':
                return one('\v');
            case '0':
                return one(0);
            case 'x':
                return one(hex_number(2));
            case 'u':
                if (take('{')) {
                    const uint32_t found = hex_number(0);
                    if (!take('}')) {
                        throw unheld("a code without an end");
                    }
                    return one(found);
                }
                return one(hex_number(4));
            default:
                break;
        }
        if (in_set && c == 'b') {
            return one('\b');
        }
        const bool letter = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        if (letter || (unsigned char) c >= 0x80) {
            throw unheld("an escape that is no character");
        }
        return one((uint32_t) c);
    }

    static char_set one(uint32_t c) {
        if (c > last_char || (c >= 0xD800 && c <= 0xDFFF)) {
            throw unheld("a code that is no character");
        }
        return { { c, c } };
    }

    uint32_t hex_number(size_t n_digits) {
        uint32_t value = 0;
        size_t n = 0;
        for (; more() && (n_digits == 0 ? n < 6 : n < n_digits); n++, i_++) {
            const char c = p_[i_];
            const char lower = c >= 'A' && c <= 'F' ? (char) (c - 'A' + 'a') : c;
            const size_t digit = std::string(hex).find(lower);
            if (digit == std::string::npos) {
                break;
            }
            value = 16 * value + (uint32_t) digit;
        }
        if (n == 0 || (n_digits > 0 && n < n_digits)) {
            throw unheld("a code without digits");
        }
        return value;
    }

    // UTF-8, as JSON's parser has checked it
    uint32_t character() {
        const auto byte = [&](size_t k) { return i_ + k < p_.size() ? (unsigned char) p_[i_ + k] : 0u; };
        const uint32_t first = byte(0);
        const size_t n = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
        uint32_t c = n == 1 ? first : first & (0x7Fu >> n);
        for (size_t k = 1; k < n; k++) {
            c = (c << 6) | (byte(k) & 0x3Fu);
        }
        i_ += n;
        return one(c)[0].first;
    }

    const std::string & p_;
    size_t i_ = 0;
};

} // namespace

std::string pattern_in_json(const std::string & pattern) {
    try {
        return parser(pattern).whole();
    } catch (const unheld & e) {
        return std::string(e.what()) + " in " + pattern;
    }
}

} // namespace superllama
