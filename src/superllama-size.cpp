#include "superllama-size.h"

#include <cctype>
#include <cstdlib>

static const struct {
    const char * name;
    double bytes;
} units[] = {
    { "", 1 },
    { "b", 1 },
    { "kib", 1024.0 },
    { "mib", 1024.0 * 1024 },
    { "gib", 1024.0 * 1024 * 1024 },
    { "tib", 1024.0 * 1024 * 1024 * 1024 },
    { "kb", 1e3 },
    { "mb", 1e6 },
    { "gb", 1e9 },
    { "tb", 1e12 },
};

bool superllama_parse_size(const char * text, uint64_t of, uint64_t * bytes, std::string * error) {
    const auto fail = [&](const std::string & what) {
        *error = "\"" + std::string(text) + "\" " + what + "; give bytes, a size like 512MiB or 8GiB, or a share like 60%";
        return false;
    };
    char * end = nullptr;
    // strtod() also reads signs, blanks, hexadecimal numbers, "inf" and "nan"
    for (const char * c = text; *c != '\0' && !isalpha((unsigned char) *c) && *c != '%'; ++c) {
        if (!isdigit((unsigned char) *c) && *c != '.' && *c != ' ') {
            return fail("is not a size");
        }
    }
    if (!isdigit((unsigned char) text[0]) || (text[0] == '0' && tolower((unsigned char) text[1]) == 'x')) {
        return fail("is not a size");
    }
    const double number = strtod(text, &end);
    std::string unit;
    for (; *end != '\0'; ++end) {
        if (*end != ' ') {
            unit += (char) tolower((unsigned char) *end);
        }
    }
    double value = -1;
    if (unit == "%") {
        if (number > 100) {
            return fail("is more than 100%");
        }
        if (of == 0) {
            return fail("cannot be used: the memory of this system is not known");
        }
        value = (double) of * number / 100;
    }
    for (const auto & u : units) {
        value = unit == u.name ? number * u.bytes : value;
    }
    if (value < 0) {
        return fail("has an unknown unit");
    }
    if (!(value < 1.8e19)) {
        return fail("is too large");
    }
    *bytes = (uint64_t) value;
    return true;
}
