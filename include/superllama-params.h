// Parameters that superllama adds to llama_model_params and llama_context_params.
// llama.h includes this file; the functions are in superllama.h.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum superllama_layer_policy {
    SUPERLLAMA_LAYER_POLICY_PIN = 0, // keep a fixed set, spread over the layers; stream the rest
    SUPERLLAMA_LAYER_POLICY_LRU = 1, // evict what was used longest ago
};

// Of a layer whose experts are only in part on a device, those that a ubatch chooses and the device lacks.
enum superllama_expert_misses {
    SUPERLLAMA_EXPERT_MISSES_SEND = 0,  // all are sent there: results do not depend on what it holds
    SUPERLLAMA_EXPERT_MISSES_SHARE = 1, // the host computes some while others are sent: that changes last digits
};

// Whether fewer threads compute while other processes keep cores busy.
enum superllama_adapt_threads {
    SUPERLLAMA_ADAPT_THREADS_EXACT =
        0,                           // with dynamic layers or paged KV, and only where no bit of a result depends on it
    SUPERLLAMA_ADAPT_THREADS_ON = 1, // always
    SUPERLLAMA_ADAPT_THREADS_OFF = 2, // never
};

#define SUPERLLAMA_MAX_DEVICES 16

// Last member of llama_model_params. Zero means stock llama.cpp.
struct superllama_model_params {
    bool dynamic_layers; // place layers on device, host or disk and move them with memory pressure
    bool async_prefetch; // read ahead in worker threads; without it every load waits where it is needed

    int32_t prefetch_threads; // read workers, 0 = default

    enum superllama_layer_policy layer_policy;
    enum superllama_expert_misses expert_misses;

    uint64_t mem_budget_bytes; // hard cap on host memory for weights, KV and compute buffers, 0 = automatic
    float mem_pressure;        // high mark of memory in use, 0..1
    float mem_pressure_low;    // low mark of the hysteresis, below the high mark

    // hard cap per device, in the order of the model's devices, on weights, KV and compute buffers; 0 = automatic
    uint64_t vram_budget_bytes[SUPERLLAMA_MAX_DEVICES];

    uint64_t
        projector_bytes; // on the host, of a projector of images and sounds that lies in the budget beside the model

    bool plan_only; // lay the weights out in address space and read nothing; superllama_plan() sets it
};

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

    enum superllama_adapt_threads adapt_threads;
};

#ifdef __cplusplus
}
#endif
