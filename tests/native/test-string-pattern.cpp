// Patterns of strings as a grammar of JSON sees them.

#include "api/string_pattern.h"
#include "check.h"

using superllama::pattern_in_json;

static bool held(const std::string & pattern) {
    return pattern_in_json(pattern)[0] == '^';
}

int main() {
    CHECK(pattern_in_json("^ab$") == "^([\\x61][\\x62])$");
    CHECK(pattern_in_json("^a{2,}|[b-d]?$").find("[\\x61]{2,}") != std::string::npos); // the end of the first is open
    CHECK(pattern_in_json("^\"$") == "^(([\\x5C][\\x22]))$");
    CHECK(pattern_in_json("^\\n$") == "^(([\\x5C][\\x6E]|[\\x5C]u000[\\x61]))$");
    CHECK(pattern_in_json("^\xC3\xA9\xF0\x9F\xA6\x99$") == "^([\\xE9][\\U0001F999])$");
    CHECK(pattern_in_json("^$") == "^()$");
    for (const char * pattern :
         { "hello", "^a", "a$", "a|^b", "^(a|b|)*?$", "^[^\"\\\\]{1,5}$", "^\\d+\\.\\d{2}$", "^[\\w.+-]+@[\\w-]+$",
           "^(?:a(?:b(c)))$", "^\\u00e9\\x41\\u{1F999}$", "^[a-]$", "^\\/\\-\\$$", "^.\\S\\D\\W$" }) {
        CHECK(held(pattern));
    }
    for (const char * pattern : { "^(?=a)b$",
                                  "^(?<n>a)$",
                                  "^(a)\\1$",
                                  "^\\ba$",
                                  "^a(^b)$",
                                  "^(a$)$",
                                  "^a)$",
                                  "^(a$",
                                  "^[a$",
                                  "^[b-a]$",
                                  "^a{2a}$",
                                  "^[]a]$",
                                  "^a{,3}$",
                                  "^a**$",
                                  "^*$",
                                  "^\\p{L}$",
                                  "^a\\",
                                  "^\\xZ1$",
                                  "^[^\\u0000-\\u{10FFFF}]$",
                                  "^\\uD800$",
                                  "^{$" }) {
        CHECK(!held(pattern));
    }
    std::string deep, wide = "^";
    for (int i = 0; i < 100000; i++) {
        deep += '(';
        wide += '.';
    }
    CHECK(!held("^" + deep) && !held(wide + "$"));
    printf("ok\n");
    return 0;
}
