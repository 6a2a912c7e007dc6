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

    bool paged_kv;       // KV cache in pages: memory on use, spilled to disk over the budget
    bool async_prefetch; // restore KV pages in worker threads, ahead of their use

    int32_t kv_page_size;     // cells per KV page, 16-8192
    int32_t prefetch_threads; // read workers, 0 = default

    uint64_t kv_budget_bytes; // memory that KV pages may hold, 0 = half of what this process may still use
    const char * spill_dir;   // where KV pages spill, NULL = the system's temporary folder; copied
};

#ifdef __cplusplus
}
#endif
