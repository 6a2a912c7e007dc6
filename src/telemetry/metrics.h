// The metrics line: counters of one context, its rates, the JSON text.
#pragma once

#include "telemetry/metrics_sink.h"
#include "superllama.h"

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace superllama {

enum metrics_event {
    METRICS_PERIODIC,
    METRICS_LAYER_EVICTED,
    METRICS_LAYER_LOADED,
    METRICS_KV_PAGE_EVICTED,
    METRICS_KV_PAGE_RESTORED,
    METRICS_FINAL,
};

// What has numbers of its own for each sequence, device or expert.
struct metrics_parts {
    std::vector<struct superllama_seq_stats> sequences; // by number; those that have done nothing are not told of
    std::vector<struct superllama_device> devices;
    std::string experts = "null"; // what experts_json() gave, where the line tells of them
};

// One JSON object, without a newline at its end.
std::string metrics_json(const struct superllama_stats & stats, const metrics_parts & parts, metrics_event event,
                         bool pretty);

// Numbers by layer and expert, of what superllama_experts() lists: {"layers":[..],"uses":[[..],..],..}; "null": none.
std::string experts_json(const std::vector<struct superllama_expert> & experts);

// Tokens and rates, written by the context's thread and read by any. `now_us` is any steady clock.
class metrics_rates {
  public:
    static const int64_t idle_us = 1000000; // a longer gap between two ubatches is a pause, not work

    void begin(int64_t now_us);
    void end(int64_t now_us, int64_t n_prompt, int64_t n_generated);

    // generated tokens per second since the last call of mark(), and over all generation
    double since_mark() const;
    double average() const;
    void mark();

    std::atomic<int64_t> n_prompt{ 0 };
    std::atomic<int64_t> n_generated{ 0 };

  private:
    int64_t t_begin_us = 0;
    int64_t t_end_us = 0;
    std::atomic<int64_t> busy_us{ 0 }; // spent generating, the sampling between two tokens included
    std::atomic<int64_t> mark_busy_us{ 0 };
    std::atomic<int64_t> mark_n_generated{ 0 };
    bool last_was_generated = false;
};

} // namespace superllama
