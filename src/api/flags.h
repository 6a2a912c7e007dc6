// Our command-line flags and environment variables, for common/arg.cpp and for programs with a parser of their own.
#pragma once

#include "superllama.h"

#include <cstdint>
#include <string>

struct common_arg;
struct common_params_context;
struct llama_context_params;
struct llama_model_params;

namespace superllama {

superllama_model_params flags_model_defaults();

// The values, as a member of common_params.
struct flags {
    bool metrics = false;
    bool metrics_pretty = false;
    int32_t metrics_interval_ms = 1000;
    std::string metrics_file;

    bool paged_kv = false;
    int32_t kv_page_size = 256;
    uint64_t kv_budget_bytes = 0;
    std::string spill_dir;

    superllama_adapt_threads adapt_threads = SUPERLLAMA_ADAPT_THREADS_EXACT;

    int32_t idle_release_s = -1;  // of a server; below 0: never
    int32_t mem_share = 1;        // of a router's server: its weight among those that are active
    uint64_t mem_least_bytes = 0; // and what it keeps while it is loaded

    superllama_model_params model = flags_model_defaults();

    // A flag that only something else enforces switches that on: budgets of weights the dynamic layers, one of KV the
    // pages, reading ahead the dynamic layers where there are no pages to read.
    bool pages() const;
    const char * implies_layers() const; // the flag that does; null: none

    // The parameters point into this object. The first returns whether layers are dynamic, and placement ours.
    bool apply(llama_model_params & params) const;
    void apply(llama_context_params & params) const;
};

void add_flags(common_params_context & ctx);
bool is_our_flag(const common_arg & arg);

// Removes our flags from argv and returns the new argc. Prints a message and exits where a value is wrong.
int take_flags(int argc, char ** argv, flags & args);
void print_flags();

} // namespace superllama
