// Sizes as people write them: "8GiB", "512MiB", "1.5G", "60%", "1048576".
#pragma once

#include <cstdint>
#include <string>

namespace superllama {

// The number at the beginning of a text: digits, a point, an exponent, whatever the locale. Returns what follows it, or
// null where there is none. No sign, no "inf", no hexadecimal digits.
const char * parse_number(const char * text, double * value);

// `of` is what a percentage refers to. On failure *error says what is allowed, and *bytes is untouched.
bool parse_size(const char * text, uint64_t of, uint64_t * bytes, std::string * error);

// A budget: a size, a percentage of the memory that this process may use, or "auto", which is 0.
// Throws std::invalid_argument with the same text.
uint64_t parse_budget(const char * text);

// A list of sizes or "auto" for up to SUPERLLAMA_MAX_DEVICES devices; the last holds for all that follow. "0" becomes
// 1 byte, in which nothing fits, for 0 is automatic. Throws std::invalid_argument.
void parse_vram_budget(const char * text, uint64_t * bytes);

} // namespace superllama
