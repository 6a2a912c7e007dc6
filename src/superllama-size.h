// Sizes as people write them: "8GiB", "512MiB", "1.5G", "60%", "1048576".
#pragma once

#include <cstdint>
#include <string>

// `of` is what a percentage refers to. On failure *error says what is allowed, and *bytes is untouched.
bool superllama_parse_size(const char * text, uint64_t of, uint64_t * bytes, std::string * error);
