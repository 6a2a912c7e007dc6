// What each sequence of a context has computed and holds: written by the context's thread, read by any, without a lock.
#pragma once

#include "superllama.h"

#include <atomic>
#include <cstdint>
#include <vector>

struct llama_memory_i;
struct llama_ubatch;

namespace superllama {

class kv_pager;

class sequence_counts {
  public:
    explicit sequence_counts(uint32_t n_seq_max) : counts(n_seq_max) {}

    // A ubatch was computed; returns how many of its tokens were generated.
    int64_t add(const llama_ubatch & ubatch);

    // What the sequences hold now; `memory` and `pager` may be null. `paged`: the user asked for pages.
    void look(const llama_memory_i * memory, const kv_pager * pager, bool paged);
    // The same after a ubatch: how long its sequences are, and the rest as often as takes a thousandth of the time.
    void look_after(const llama_ubatch & ubatch, const llama_memory_i * memory, const kv_pager * pager, bool paged);

    std::vector<struct superllama_seq_stats> all() const; // by number

  private:
    struct counters {
        std::atomic<int64_t> prompt_tokens{ 0 };
        std::atomic<int64_t> generated_tokens{ 0 };
        std::atomic<int64_t> kv_tokens{ 0 };
        std::atomic<int64_t> kv_pages_cpu{ 0 };
        std::atomic<int64_t> kv_pages_disk{ 0 };
        std::atomic<int64_t> kv_bytes{ 0 };
    };
    std::vector<counters> counts; // by number
    int64_t t_next_us = 0;
};

} // namespace superllama
