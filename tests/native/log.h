// What llama.cpp says goes to stderr from this level on; stdout is for results.
#pragma once

#include "llama.h"

#include <cstdio>

inline void log_from(ggml_log_level least) {
    static ggml_log_level from;
    from = least;
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level >= from && level != GGML_LOG_LEVEL_CONT) {
                fputs(text, stderr);
            }
        },
        nullptr);
}
