// The state of context_hooks, which three files share: the way of a ubatch, devices, reports.
#pragma once

#include "context/hooks.h"

#include "context/compute_buffers.h"
#include "context/graph_run.h"
#include "llama-context.h"
#include "devices/layer_kv.h"
#include "kv/pager.h"
#include "telemetry/memory.h"
#include "telemetry/metrics.h"
#include "llama-model.h"
#include "kv/recurrent_guard.h"
#include "model/dynamic_model.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace superllama {

struct context_hooks::impl {
    llama_context & ctx;
    superllama_context_params params;

    memory_telemetry telemetry;
    std::vector<ggml_backend_dev_t> devices; // those that hold layers or KV, the CPU left out

    metrics_rates rates;
    std::vector<std::shared_ptr<metrics_sink>> sinks;
    int64_t t_line_us = 0;

    int64_t mem_peak_bytes = 0;

    dynamic_model * weights = nullptr;   // null: stock loading, nothing moves
    device_tier * tier = nullptr;        // null: layers do not go to devices
    std::unique_ptr<layer_kv> device_kv; // with a tier
    bool lost = false;                   // a device that it computed on is gone
    int64_t placement = -1;              // generation that the scheduler's buffers are reserved for
    int64_t n_device_moves[2] = {};      // loads, evictions: as of the last event line
    uint64_t graph_seen = 0;             // what it reads of the weights is served
    std::unique_ptr<graph_run> run;      // null: between two graphs
    bool ready = false;                  // the context is complete
    bool has_buffers = true;             // the weights made room for the compute buffers of the graph that comes

    kv_paging paging;
    int64_t n_kv_evicted = 0; // as of the last event line
    int64_t n_kv_restored = 0;

    // Host memory that this context may take; what it does not use is lent to weights.
    struct loan {
        uint64_t bytes_max = 0;
        uint64_t granted = 0; // to this context: what the weights know of
    };
    uint64_t other_bytes = 0;      // used at any time
    uint64_t output_bytes_min = 0; // of the buffer of logits as it is made, a row for each sequence: not counted
    uint64_t output_bytes = 0;     // what it has grown by
    loan kv;                       // pages
    loan compute;                  // buffers
    compute_buffers buffers;
    int n_small_graphs = 0;

    std::unique_ptr<recurrent_guard> recurrent; // where reads can fail in the middle of a graph

    impl(llama_context & ctx, const superllama_context_params & params);
    ~impl();

    // For what can fail while a ubatch runs. An exception may not pass upstream's C API: it becomes the decode's error.
    bool say(const std::string & error); // false, so that it can be returned
    bool guarded(const std::function<bool()> & body);

    void offer_paging();
    void offer_lending();
    void close_paging(); // the caches exist: who took the offer, and why not
    kv_pager * asked_pager() const { return params.paged_kv ? paging.pager : nullptr; } // by the user

    // before memory is taken, and after it was given back: the weights have the rest
    void grant(loan & l, uint64_t bytes);
    void grant_compute(const ggml_cgraph * gf);
    void add_to_weights(uint64_t new_output_bytes); // throws where there is no memory for it

    void collect(struct superllama_stats & s);
    void collect_weights(struct superllama_stats & s);
    void collect_kv(struct superllama_stats & s) const;
    void write_line(metrics_event event);
    void write_kv_events();
    void write_layer_events();
};

} // namespace superllama
