// The one parser of sizes in flags: "8GiB", "512MiB", "60%", plain bytes.
#pragma once

#include <cstdint>
#include <string>

// `of` is what a percentage refers to. On failure the error says what was wrong and what is allowed.
bool superllama_parse_size(const char * text, uint64_t of, uint64_t * bytes, std::string * error);
