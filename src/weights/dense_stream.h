// Blocks that every pass over the weights needs: a fixed set is pinned, the rest streams through a ring in the order of
// the graph, round its end into the next one.
#pragma once

#include "superllama-params.h"
#include "weights/block_loader.h"
#include "weights/graph.h"
#include "weights/recency.h"

#include <string>
#include <vector>

namespace superllama {

// What a number of bytes means for dense blocks.
struct dense_budget {
    size_t bytes = 0;    // of all of them
    size_t least = 0;    // that works
    size_t pinned = 0;   // at most
    size_t ring = 0;     // streamed blocks in use and on their way; 0 where everything fits
    size_t streamed = 0; // read for every pass over the weights
    bool works = false;
};

class dense_stream : public block_owner {
  public:
    dense_stream(weight_store & store, block_loader & loader, superllama_layer_policy policy);

    // All with the loader's lock held.
    dense_budget plan(size_t bytes) const;
    void expect(const std::vector<block_use> & uses); // of a graph that will run: several at once need room in the ring

    // Between two graphs, or while one runs: pins the longest prefix of pin_order that fits; what is not where it
    // belongs now goes at once.
    void apply(const dense_budget & budget);
    // While a graph runs, so much more is pinned of what is not there yet; the rest waits for apply(). Returns what is
    // not used of it; all, where more is in memory than the last budget had room for.
    size_t pin_more(size_t bytes);
    bool make_room(size_t bytes, block_loader::guard & lock); // at the cost of blocks that no node uses now
    void make_room_now();                                     // of what is idle, without waiting
    bool is_passing(uint32_t id) const;                       // on its way, wanted by nobody and not pinned

    void begin(const layer_graph & graph, int64_t number);
    bool acquire(uint32_t id, block_loader::guard & lock, std::string * error);
    bool fetch(uint32_t id, block_loader::guard & lock, std::string * error); // out of order
    bool acquire_if_there(const std::vector<uint32_t> & ids); // and it stays; false: the graph has to stop for them
    bool settled(uint32_t id) const;                          // it is in memory and stays there
    void release(uint32_t id);
    void end(); // the first block comes next
    void forget();
    void point(uint32_t id); // for kernels: its tensors, and views of them in the graph that runs

    bool is_pinned(uint32_t id) const { return pinned[id]; }
    size_t pinned_bytes() const { return pinned_used; } // in memory, or on their way
    size_t pinned_limit() const { return pinned_max; }  // as applied last
    size_t blocks_bytes() const { return n_bytes; }
    double stall_ms() const { return waited_ms; }

  private:
    void take_memory(uint32_t id) override;
    void give_memory_back(uint32_t id) override;
    bool may_stay(uint32_t id) const override;

    void pump();
    bool misplaced(uint32_t id) const;
    bool fits(size_t bytes) const { return store.has_ring_room(bytes); }
    int64_t find_victim() const;
    bool wait_for_idle(block_loader::guard & lock);

    weight_store & store;
    block_loader & loader;
    const superllama_layer_policy policy;

    std::vector<uint32_t> pin_order; // the largest first, those of a size spread evenly over the layers
    std::vector<bool> pinned;
    std::vector<size_t> in_use_max; // bytes in use at once where pin_order is streamed from here on; as far as is known
    recency used;                   // under the lru policy
    size_t n_bytes = 0;
    size_t pinned_used = 0; // in memory or on their way, those in the ring left out
    size_t pinned_max = 0;  // of those that are pinned, whether they are there yet or not
    double waited_ms = 0;

    const layer_graph * graph = nullptr;
    int64_t n_graphs = 0;
    size_t head = 0; // position in the graph's order of the block that was acquired last
};

} // namespace superllama
