// The state of context_hooks, which four files share: the way of a ubatch, memory, devices, reports.
#pragma once

#include "context/hooks.h"
#include "context/sequences.h"

#include "base/ledger.h"
#include "context/compute_buffers.h"
#include "context/cpu_work.h"
#include "context/graph_run.h"
#include "context/graph_threads.h"
#include "llama-context.h"
#include "devices/layer_kv.h"
#include "devices/turns.h"
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
    std::shared_ptr<metrics_sink> log_sink;  // null: no lines there
    std::shared_ptr<metrics_sink> file_sink; // the same
    int64_t t_experts_us = 0;                // of the line that told of each expert
    sequence_counts sequences;
    int64_t t_line_us = 0;

    int64_t mem_peak_bytes = 0;

    dynamic_model * weights = nullptr;        // null: stock loading, nothing moves
    device_tier * tier = nullptr;             // null: layers do not go to devices
    std::unique_ptr<backend_turns> turns;     // with a tier. It outlives device_kv, by which others wait for graphs
    std::unique_ptr<layer_kv> device_kv;      // with a tier
    bool offload_asked = false;               // large batches are computed there with weights of the host
    std::vector<size_t> need_without_offload; // of compute buffers, per device
    bool stopped = false;                     // the graph that ran last, by the user's abort callback
    bool lost = false;                        // a device that it computed on is gone
    int64_t placement = -1;                   // generation that the scheduler's buffers are reserved for
    int64_t n_device_moves[2] = {};           // loads, evictions: as of the last event line
    uint64_t graph_seen = 0;                  // what it reads of the weights is served
    std::unique_ptr<graph_run> run;           // null: between two graphs
    graph_threads threads;
    bool batched = false;       // the ubatch has more than one token
    bool ready = false;         // the context is complete
    bool asserts_threw = false; // before the graph that runs
    bool has_buffers = true;    // the weights made room for the compute buffers of the graph that comes

    kv_paging paging;
    int64_t n_kv_evicted = 0; // as of the last event line
    int64_t n_kv_restored = 0;

    // What this context has of the model's budget. What KV pages and compute buffers do not use is lent to weights.
    struct account {
        explicit account(ledger & of) :
            kv_pages(of, memory_tag::kv),
            kv(of, memory_tag::kv),
            compute(of, memory_tag::compute),
            cpu_work(of, memory_tag::cpu_work),
            outputs(of, memory_tag::outputs),
            adapters(of, memory_tag::adapters),
            prompt_cache(of, memory_tag::prompt_cache) {}

        charge kv_pages;
        charge kv; // that is in no pages, recurrent states
        charge compute;
        charge cpu_work;
        charge outputs;
        charge adapters; // control vectors; a LoRA belongs to the model
        charge prompt_cache;
    };
    std::unique_ptr<account> memory; // null: the model has no budget
    compute_buffers buffers;
    int n_small_graphs = 0;

    std::unique_ptr<recurrent_guard> recurrent; // where reads can fail in the middle of a graph

    impl(llama_context & ctx, const superllama_context_params & params);
    ~impl();

    // For what can fail while a ubatch runs. An exception may not pass upstream's C API: it becomes the decode's error.
    bool say(const std::string & error); // false, so that it can be returned
    bool guarded(const std::function<bool()> & body);

    void finish_graphs(); // waits for what devices compute for this context

    // Of a cache in pages, that its layers' parts follow the layers.
    static std::unique_ptr<layer_kv::cache> paged_layers(const kv_paging & paging);

    void resize_kv();

    void offer_paging();
    void offer_lending();
    void close_paging(); // the caches exist: who took the offer, and why not
    kv_pager * asked_pager() const { return params.paged_kv ? paging.pager : nullptr; } // by the user

    // Before memory is taken, and after it was given back: the weights have the rest. They throw where there is none.
    void open_account();
    void grant(charge & of, uint64_t bytes);
    void grant_compute(const ggml_cgraph * gf);
    void charge_buffers(const ggml_cgraph * gf); // which may have grown since
    void charge_cpu_work(const ggml_cgraph * gf);
    void charge_control_vectors();

    void collect(struct superllama_stats & s);
    metrics_parts collect_parts() const;
    void collect_weights(struct superllama_stats & s);
    void collect_kv(struct superllama_stats & s) const;
    bool writes_lines() const { return log_sink != nullptr || file_sink != nullptr; }
    void write_line(metrics_event event);
    std::string experts_if_due(metrics_event event);
    void write_kv_events();
    void write_layer_events();
};

} // namespace superllama
