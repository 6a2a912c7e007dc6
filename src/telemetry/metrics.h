// The metrics line: counters of one context, its rates, the JSON text, and the way to stderr or a file.
#pragma once

#include "superllama.h"

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace superllama {

enum metrics_event {
    METRICS_PERIODIC,
    METRICS_LAYER_EVICTED,
    METRICS_LAYER_LOADED,
    METRICS_KV_PAGE_EVICTED,
    METRICS_KV_PAGE_RESTORED,
    METRICS_FINAL,
};

// One JSON object, without a newline at its end.
std::string metrics_json(const struct superllama_stats & stats, metrics_event event, bool pretty);

// Where lines go. Writing happens in a thread of its own: a slow disk never slows decoding; beyond
// `max_pending` waiting lines new ones are dropped and counted. Several contexts may share one sink.
class metrics_sink {
  public:
    static const size_t max_pending = 1024;

    // path "" is stderr. Throws std::runtime_error where the file cannot be written.
    static std::shared_ptr<metrics_sink> open(const std::string & path);

    metrics_sink(FILE * file, bool owned, std::string prefix);
    ~metrics_sink(); // writes what waits, then closes

    void push(const std::string & line);
    void flush(); // returns when everything pushed before is written
    int64_t dropped() const;

  private:
    void run();

    FILE * file;
    bool owned;
    std::string prefix;

    mutable std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::string> pending;
    bool writing = false;
    bool stopping = false;
    int64_t n_dropped = 0;
    std::thread thread;
};

// Tokens and rates. `now_us` is any steady clock; the caller is the context's thread.
class metrics_rates {
  public:
    static const int64_t idle_us = 1000000; // a longer gap between two ubatches is a pause, not work

    void begin(int64_t now_us);
    void end(int64_t now_us, int64_t n_prompt, int64_t n_generated);

    // generated tokens per second since the last call of mark(), and over all generation
    double since_mark() const;
    double average() const;
    void mark();

    int64_t n_prompt = 0;
    int64_t n_generated = 0;

  private:
    int64_t t_begin_us = 0;
    int64_t t_end_us = 0;
    int64_t busy_us = 0; // spent generating, the sampling between two tokens included
    int64_t mark_busy_us = 0;
    int64_t mark_n_generated = 0;
    bool last_was_generated = false;
};

} // namespace superllama
