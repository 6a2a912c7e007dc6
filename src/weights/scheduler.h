// The weights of a model while graphs run: what a budget gives to dense blocks and to experts, and the stops of a
// graph, at which blocks are waited for and given back.
//
// One scheduler per model. Contexts take turns: begin_graph() .. end_graph() belong to one of them at a time.
#pragma once

#include "superllama-params.h"
#include "weights/block_loader.h"
#include "weights/dense_stream.h"
#include "weights/experts/pool.h"
#include "weights/graph.h"
#include "weights/sent_ahead.h"
#include "weights/store.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
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

    size_t full_bytes() const { return dense_bytes + std::max(expert_bytes, expert_pool_min); } // everything in memory
};

// Rows of a matrix, in memory as its kernels want them.
struct weight_piece {
    int64_t first_row;
    int64_t n_rows;
    const uint8_t * data;
    size_t group_bytes; // of 32 rows, the least that can be multiplied with
};

class layer_sched {
  public:
    struct config {
        superllama_layer_policy policy;
        int n_threads;     // 0: no read-ahead, loads happen where they are needed
        size_t part_bytes; // of one read
        int n_expert_used;
        // Weights to where a device computes a large batch with them, from any thread; and what is there for those that
        // are sent ahead.
        std::function<void(ggml_tensor * to, const uint8_t * data, size_t bytes)> send;
        std::function<sent_ahead::device(const ggml_tensor * to)> ahead;
        experts_on_device on_device;
    };

    layer_sched(weight_store & store, const config & cfg);
    ~layer_sched();

    // Memory for blocks. Less takes effect at once, but for what the graph that runs is using. More does so for dense
    // blocks that this graph has not come to yet; all of it between two graphs. n_ubatch bounds the experts in use at
    // once. Any thread may call.
    weights_budget plan(size_t bytes, int n_ubatch) const;
    void set_budget(size_t bytes, int n_ubatch, bool keeps_rows); // and rows have what they keep of it
    size_t block_bytes() const { return dense.blocks_bytes() + experts.blocks_bytes(); }

    // How blocks are used by a graph that will run, before the first one runs: several at once need room in the ring.
    void expect(const std::vector<block_use> & uses);

    // The way of a ubatch. False means that a block could not be read; `error` says why.
    bool begin_graph(ggml_cgraph * gf, uint64_t graph_id, std::string * error);
    bool has_stops() const { return !stops_nowhere && !current.stops.empty(); } // the graph that runs
    bool stops_after(const ggml_tensor * node); // asked for every node, in order, before it is computed
    bool after_node(const ggml_tensor * node, std::string * error);
    // Weights that go to a device, which computes a large batch with them: `copied` says that they are there. Between
    // the stops.
    bool before_copy(ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * to, bool * copied,
                     std::string * error);
    // In the middle of a graph, for a device that holds some experts: those that it wants are read where they have to
    // be, and sent. One that leaves it stays in host memory, if it has room there.
    bool send_experts(const expert_request & r, std::string * error);
    void send_guessed(const guessed_experts & g); // the same before they are chosen, of those in memory
    void end_graph();

    // A node that is not to be computed as it stands, but after the graph stopped there, with every piece of its matrix
    // in this order. Null: it is as others.
    const std::vector<uint32_t> * pieces_of(const ggml_tensor * node) const;
    bool acquire_piece(uint32_t id, weight_piece * piece, std::string * error);
    void release_piece(uint32_t id);

    // Tensors of a layer point to a device now, or no longer do: which blocks are needed in host memory. Not between
    // begin_graph() and end_graph().
    void layer_moved(int32_t layer);
    void layer_on_paper(int32_t layer);     // the same for plan(), where nothing is in memory
    void hold_whole(const ggml_tensor * t); // one of which only rows or pieces are there, from the next graph on
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
        int64_t bytes_ahead; // of weights for large batches, sent to a device before it was their turn
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

    struct expert {
        const ggml_tensor * weights; // one of the tensors that it has a matrix in
        int32_t layer;
        int32_t index; // in its layer
        size_t bytes;
        bool resident;
        bool elsewhere; // on a device
        expert_pool::heat heat;
        int64_t n_loads;
    };
    std::vector<expert> experts_by_layer() const;

  private:
    const std::vector<uint32_t> * pieces_of(const layer_stop & s) const;
    bool acquire_if_there(const layer_stop & s);
    bool acquire_all();
    bool run_stop(const layer_stop & s, std::string * error);
    bool none_here(uint32_t id) const; // of a block's tensors
    void set_elsewhere(uint32_t id, bool elsewhere, block_loader::guard & lock);
    weights_budget plan_locked(size_t bytes, int n_ubatch) const;
    void apply_plan();
    void shrink(block_loader::guard & lock);
    void grow();
    void apply_budget(block_loader::guard & lock);
    void apply_budget_if_idle();
    bool copy_dense(uint32_t id, const ggml_tensor * src, ggml_tensor * to, const sent_ahead::arrived * there,
                    block_loader::guard & lock, std::string * error);

    weight_store & store;
    const std::function<void(ggml_tensor * to, const uint8_t * data, size_t bytes)> send;
    std::mutex turn; // held from begin_graph() to end_graph()

    size_t bytes_max = 0;     // as set
    size_t bytes_planned = 0; // of it, those that blocks have their limits by
    int n_ubatch = 512;
    bool keeps_rows = false; // from the next apply_budget() on
    std::atomic<bool> budget_new{ false };

    layer_graph current;
    bool runs_through = false;    // it has no stop for experts
    bool stops_nowhere = false;   // all that it uses is there, and stays
    std::vector<uint32_t> passed; // resident blocks that were used last where the graph did not stop
    int64_t n_graphs = 0;

    block_loader loader;
    dense_stream dense;
    expert_pool experts;
    sent_ahead ahead;
    int64_t dense_ahead = 0; // bytes
};

} // namespace superllama
