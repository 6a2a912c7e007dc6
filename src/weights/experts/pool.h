// Experts: which ones are in memory, in one pool over all layers, least recently used first to leave; those that the
// router has just chosen are read all at once, and those of the next layer are guessed.
#pragma once

#include "weights/block_loader.h"
#include "weights/dense_stream.h"
#include "weights/experts/request.h"
#include "weights/graph.h"
#include "weights/recency.h"
#include "weights/sent_ahead.h"

#include <map>
#include <set>
#include <string>
#include <vector>

namespace superllama {

// What a number of bytes means for experts.
struct pool_budget {
    size_t bytes = 0; // of all of them
    size_t least = 0; // experts of one layer that one ubatch can ask for
};

class expert_pool : public block_owner {
  public:
    expert_pool(weight_store & store, block_loader & loader, dense_stream & dense, int n_expert_used,
                experts_on_device on_device);

    // All with the loader's lock held.
    pool_budget plan(int n_ubatch) const;
    void limit(size_t bytes, size_t all);       // of `all` that are on the host
    bool make_room(block_loader::guard & lock); // until the limit holds, at the cost of experts that no node uses
    void make_room_now();                       // of what is idle, without waiting
    bool is_passing(uint32_t id) const;         // on its way, and wanted by nobody

    void begin(int64_t graph_number) { n_graphs = graph_number; }
    // Nothing has to be waited for: all experts are there, and stay so until end(). Then the graph need not stop for
    // them, which costs small ones more than their computation; which ones it used is seen at its end.
    bool hold_all(const layer_graph & graph);
    bool acquire(const layer_stop & s, block_loader::guard & lock, std::string * error);
    bool send(const expert_request & r, block_loader::guard & lock, std::string * error);
    void send_guessed(const guessed_experts & g, block_loader::guard & lock); // what is in memory
    // Those that were sent before are at `ahead`; null: none.
    bool copy(ggml_backend_t backend, const ggml_tensor * weights, ggml_tensor * to, const sent_ahead::arrived * ahead,
              block_loader::guard & lock, std::string * error);
    // Blocks of those that a large batch will probably choose and a device does not hold: what the last one chose, all
    // before there was any.
    std::vector<uint32_t> expected(const ggml_tensor * weights) const;
    void guess(const layer_stop & s);  // what comes next, while this layer computes; or all, where all have room
    bool release(std::string * error); // false: one could not be read, and what was computed is not to be used
    void end();

    struct counters {
        int64_t hits;
        int64_t misses;
        int64_t guesses;      // read before the router had chosen
        int64_t guesses_used; // and it chose them
        double stall_ms;
        int64_t ahead_bytes; // of large batches, sent to a device before it was their turn
    };
    counters count() const { return totals; }

    // Of one expert, since the load. Those of a warm-up, which computes with all of them, are left out.
    struct heat {
        int64_t uses = 0;   // tokens that a router sent to it
        int64_t misses = 0; // ubatches that wanted it while it was not in memory
    };
    const heat & heat_of(uint32_t id) const { return heats[id]; }
    size_t blocks_bytes() const { return n_bytes; }
    bool is_within_limit() const { return n_used <= bytes_max; }

  private:
    void take_memory(uint32_t id) override;
    void give_memory_back(uint32_t id) override;
    bool may_stay(uint32_t id) const override;

    bool want(const std::set<uint32_t> & wanted, bool routed, block_loader::guard & lock, std::string * error);
    void keep_leaving(const expert_request & r, block_loader::guard & lock);
    bool choices(const layer_stop & s, std::map<uint32_t, int64_t> * n_chosen, std::string * error);
    bool is_routing(int64_t n_chosen) const { return n_expert_used <= 0 || n_chosen <= n_expert_used; }
    void guess_layer(const layer_stop & s, const layer_stop & before, int64_t priority);
    void guess_on_device(const expert_request & r, block_loader::guard & lock);
    void read_guessed(const ggml_tensor * weights, const std::vector<int32_t> & experts, int64_t priority);
    void fill();
    void settle_guess(int32_t layer, const std::set<uint32_t> & wanted, block_loader::guard & lock);
    bool make_frame(uint32_t id);
    bool close_gaps(uint32_t id, block_loader::guard & lock);
    int64_t find_victim() const;
    int64_t find_victim_for(uint32_t id) const;
    bool wait_for_idle(block_loader::guard & lock);
    bool idle(uint32_t id) const { return held == nullptr && loader[id].idle(); }
    void count_held();
    void trim(size_t bytes);

    weight_store & store;
    block_loader & loader;
    dense_stream & dense; // routers are among its blocks
    const int n_expert_used;
    const experts_on_device on_device;

    size_t bytes_max = 0;
    size_t n_here = 0; // bytes of all experts that are on the host
    size_t n_bytes = 0;
    size_t n_used = 0; // bytes in memory or on their way
    recency used;
    bool asked_known = false;           // nothing was asked for that is not counted
    bool all_there = false;             // every expert that is on the host; known since nothing came or went
    uint32_t next_fill = 0;             // where all have room, those before it were read, or tried
    const layer_graph * held = nullptr; // the graph that runs without a stop
    std::vector<uint32_t> in_use;
    std::set<uint32_t> from_device;                   // those that the same layer of a large batch has from there
    std::vector<int32_t> most_chosen;                 // of that layer, what the batch chose
    std::map<int32_t, std::set<uint32_t>> last_batch; // what it chose, of each layer
    std::vector<uint32_t> guessed;                    // of later layers
    int64_t n_graphs = 0;
    counters totals = {};
    std::vector<heat> heats; // by block
};

} // namespace superllama
