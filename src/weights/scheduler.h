// Where each block of weights is, and what moves: pins, the streaming ring, the pool of experts, read-ahead.
//
// One scheduler per model. Contexts take turns: begin_graph() .. end_graph() belong to one of them at a time.
#pragma once

#include "weights/graph.h"
#include "io/readers.h"
#include "weights/store.h"
#include "superllama-params.h"

#include <atomic>
#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace superllama {

// What a budget means for a set of blocks; the same arithmetic decides at load, while running and in a plan.
struct weights_budget {
    size_t dense_bytes;     // all blocks that are not experts
    size_t expert_bytes;    // all experts
    size_t ring_bytes;      // streamed blocks in use and on their way; 0 where everything fits
    size_t expert_pool_min; // experts of one layer that one ubatch can ask for
    size_t min_bytes;       // the least that works
    size_t pinned_bytes;    // of dense blocks
    size_t pool_bytes;      // left for experts
    size_t streamed_bytes;  // of dense blocks, read for every pass over the weights
};

class layer_sched {
  public:
    struct config {
        superllama_layer_policy policy;
        int n_threads;     // 0: no read-ahead, loads happen where they are needed
        size_t part_bytes; // of one read
        int n_expert_used;
    };

    layer_sched(weight_store & store, const config & cfg);
    ~layer_sched();

    // Memory for blocks. Less takes effect at once, but for what the graph that runs is using; more at the next
    // begin_graph(). n_ubatch bounds the experts in use at once. Any thread may call.
    weights_budget plan(size_t bytes, int n_ubatch) const;
    void set_budget(size_t bytes, int n_ubatch);
    size_t block_bytes() const { return n_block_bytes; } // of all blocks

    // How blocks are used by a graph that will run, before the first one runs: several at once need room in the ring.
    void expect(const std::vector<block_use> & uses);

    // The way of a ubatch. False means that a block could not be read; `error` says why.
    bool begin_graph(ggml_cgraph * gf, uint64_t graph_id, std::string * error);
    bool stops_after(const ggml_tensor * node); // asked for every node, in order, before it is computed
    bool after_node(const ggml_tensor * node, std::string * error);
    void end_graph();

    // No graph runs meanwhile, and the next one is looked at anew.
    void between_graphs(const std::function<void()> & change);

    // Tensors of a layer point to a device now, or no longer do: which blocks are needed in host memory. Not between
    // begin_graph() and end_graph().
    void layer_moved(int32_t layer);
    // Where a tensor's blocks are in memory, if all of them are; then they stay until layer_moved() for their layer.
    std::vector<const uint8_t *> keep(const ggml_tensor * t);

    struct counters {
        int64_t blocks_loaded;
        int64_t blocks_evicted;
        int64_t bytes_read;
        int64_t bytes_resident; // of all weights
        int64_t bytes_pinned;   // of blocks
        int64_t bytes_ring;
        int64_t bytes_experts;
        int64_t expert_hits;
        int64_t expert_misses;
        int64_t expert_guesses;      // read before the router had chosen
        int64_t expert_guesses_used; // and it chose them
        double stall_ms;
        readers::counters prefetch;
    };
    counters count() const;

    // per layer: bytes in memory, bytes in all
    struct layer {
        int32_t index;
        size_t bytes;
        size_t bytes_resident;
        bool streamed;    // some of it is read again for every pass
        int64_t last_use; // ubatch number
        int64_t n_loads;
        int64_t n_evictions;
    };
    std::vector<layer> layers() const;

  private:
    // the error of a block that is to be read again if it is asked for
    static constexpr const char * called_off = "called off";

    enum block_state : uint8_t { ABSENT, LOADING, RESIDENT };

    struct block {
        block_state state = ABSENT;
        bool pinned = false;
        bool in_use = false; // by the graph that runs
        int32_t n_parts = 0; // still to be read
        int64_t last_use = 0;
        int64_t n_loads = 0;
        int64_t n_evictions = 0;
        bool listed = false;    // in lru
        bool elsewhere = false; // on a device, all of it
        std::string error;
        std::vector<int32_t> n_slice_parts; // of an expert, by slice
        std::vector<readers::job_id> jobs;
        std::list<uint32_t>::iterator lru;
    };

    bool acquire(uint32_t id, std::unique_lock<std::mutex> & lock, std::string * error);
    bool acquire_experts(const layer_stop & s, std::unique_lock<std::mutex> & lock, std::string * error);
    void guess_experts(const layer_stop & s);
    void guess_layer(const layer_stop & s, const layer_stop & before, int64_t priority);
    void settle_guess(const std::set<uint32_t> & wanted, std::unique_lock<std::mutex> & lock);
    bool release_experts(std::string * error);
    void release(uint32_t id);
    bool run_stop(const layer_stop & s, std::string * error);
    void pump();
    void submit(uint32_t id, int64_t priority);
    void submit_parts(uint32_t id, const std::vector<weight_part> & parts, int64_t priority, size_t * n);
    bool read_part(const weight_part & part, std::string * error);
    bool read(uint32_t id, const std::vector<weight_part> & parts, bool run);
    void read_here(uint32_t id, std::unique_lock<std::mutex> & lock);
    std::string read_all(uint32_t id, std::unique_lock<std::mutex> & lock);
    void finish_load(uint32_t id, std::unique_lock<std::mutex> & lock);
    void evict(uint32_t id);
    bool make_room(size_t bytes, bool experts, std::unique_lock<std::mutex> & lock);
    bool wait_for_idle(bool experts, std::unique_lock<std::mutex> & lock);
    bool make_expert_room(uint32_t id);
    int64_t find_victim_for(uint32_t expert) const;
    void trim_experts(size_t bytes);
    void shrink(std::unique_lock<std::mutex> & lock);
    void apply_budget(std::unique_lock<std::mutex> & lock);
    void apply_budget_if_idle();
    void choose_pins();
    void touch(uint32_t id);
    void point(uint32_t id);
    bool settled(uint32_t id) const;
    bool misplaced(uint32_t id) const;
    int64_t find_victim(bool experts) const;
    bool fits(size_t bytes, bool experts) const;
    bool idle(uint32_t id) const { return blocks[id].state == RESIDENT && !blocks[id].in_use; }
    bool is_expert(uint32_t id) const { return store.blocks()[id].expert >= 0; }
    size_t bytes_of(uint32_t id) const { return store.blocks()[id].bytes; }

    weight_store & store;
    const config cfg;

    mutable std::mutex mutex;
    std::condition_variable changed;
    std::mutex turn; // held from begin_graph() to end_graph()

    std::vector<block> blocks;
    std::vector<uint32_t> pin_order; // dense blocks, the largest first, those of a size spread evenly over the layers
    std::list<uint32_t> lru;         // experts, and dense blocks under the lru policy; oldest first

    std::vector<size_t> in_use_max; // bytes in use at once where pin_order is streamed from here on; as far as is known
    weights_budget budget = {};
    size_t bytes_max = 0; // as set
    int n_ubatch = 512;
    std::atomic<bool> budget_new{ false };

    layer_graph current;
    size_t head = 0;              // position in current.order of the block that was acquired last
    std::vector<uint32_t> passed; // resident blocks that were used last where the graph did not stop
    std::vector<uint32_t> experts_in_use;
    std::vector<uint32_t> guessed; // experts of later layers that are read ahead
    int64_t n_graphs = 0;

    // bytes of blocks that are resident or loading, those in the ring left out
    size_t pinned_used = 0;
    size_t expert_used = 0;
    size_t n_block_bytes = 0;
    counters totals = {};

    std::unique_ptr<readers> pool; // last: its jobs refer to all above
};

} // namespace superllama
