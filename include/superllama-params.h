// Parameters that superllama adds to llama_model_params and llama_context_params.
// llama.h includes this file; the functions are in superllama.h.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Last member of llama_context_params. Zero means stock llama.cpp.
struct superllama_context_params {
    const char * metrics_file; // JSON lines to this path, NULL = none; copied by llama_init_from_model

    int32_t metrics_interval_ms; // at most one periodic line per this many milliseconds

    bool metrics;        // JSON lines to stderr, each prefixed "[METRICS] "
    bool metrics_pretty; // indented JSON instead of one line
};

#ifdef __cplusplus
}
#endif
