// Blocks of weights on their way into memory and out of it. Which ones, and what has to go for them, their owners
// decide: dense_stream and expert_pool.
//
//     absent   begin()        reading   memory is taken, jobs are queued
//     reading  the last part  ready     all of it is there, and is what was written
//                             failed    a part could not be read, or was called off; only an expert that kernels use
//                                       stays so, until the graph is told
//     ready    drop()         absent
//     failed   drop()         absent    the error stays until somebody hears it
//
// One lock for all of it, and for the owners: with_lock functions need it held. No exception leaves a reader thread.
#pragma once

#include "io/readers.h"
#include "weights/store.h"

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace superllama {

enum class block_state : uint8_t { absent, reading, ready, failed };

struct block_status {
    block_state state = block_state::absent;
    bool in_use = false;    // by the graph that runs
    bool elsewhere = false; // on a device, all of it
    bool joined = false;    // the graph that uses it did not begin to read it
    bool sending = false;   // to a device, by another thread than the graph's
    int32_t n_parts = 0;    // still to be read
    int64_t last_use = 0;   // number of the graph
    int64_t n_loads = 0;
    int64_t n_evictions = 0;
    std::string error;
    std::vector<int32_t> n_slice_parts; // of an expert, by slice
    std::vector<readers::job_id> jobs;

    bool idle() const { return state == block_state::ready && !in_use && !sending; }
};

// Whose blocks they are. Called with the lock held.
class block_owner {
  public:
    virtual void take_memory(uint32_t id) = 0;
    virtual void give_memory_back(uint32_t id) = 0;
    virtual bool may_stay(uint32_t id) const = 0; // one that came and that nobody uses

  protected:
    ~block_owner() = default;
};

class block_loader {
  public:
    using guard = std::unique_lock<std::mutex>;

    block_loader(weight_store & store, int n_threads, size_t part_bytes); // 0 threads: blocks are read where needed
    void set_owners(block_owner & of_dense, block_owner & of_experts);
    void stop(); // joins the readers, who call the owners

    guard lock() const { return guard(mutex); }
    bool reads_ahead() const { return pool != nullptr; }

    // With the lock held, as all that follow.
    block_status & operator[](uint32_t id) { return blocks[id]; }
    const block_status & operator[](uint32_t id) const { return blocks[id]; }
    size_t size() const { return blocks.size(); }
    bool is_expert(uint32_t id) const { return store.blocks()[id].expert >= 0; }
    size_t bytes_of(uint32_t id) const { return store.blocks()[id].bytes; }

    // Its memory is taken, and readers have their jobs; without readers the block is read before this returns.
    void begin(uint32_t id, int64_t priority, guard & lock);
    // The same, but `write` puts there what was read before and is in other memory still. It throws nothing.
    void fill(uint32_t id, guard & lock, const std::function<void()> & write);
    void drop(uint32_t id);
    void wait(guard & lock) { changed.wait(lock); }        // until the state of some block has changed
    void wait_for(uint32_t id, guard & lock);              // until it is not on its way
    void tell() { changed.notify_all(); }                  // those that wait, of something else
    void drop_unwanted(const std::vector<uint32_t> & ids); // that could not go while they were sent
    void wait_for_sending(guard & lock);                   // until no block is read by who sends it to a device

    // While it lives the lock is given back, and these blocks stay where they are.
    class sending {
      public:
        sending(block_loader & loader, const std::vector<uint32_t> & ids, guard & lock);
        ~sending();
        sending(const sending &) = delete;
        sending & operator=(const sending &) = delete;

      private:
        block_loader & loader;
        const std::vector<uint32_t> ids;
        guard & lock;
    };
    void promote(uint32_t id, int64_t priority);
    void call_off(const std::vector<uint32_t> & ids, guard & lock); // where they wait still; others are read

    // A graph wants an expert that may be on its way already, for a guess or for a graph before it: whatever fails of
    // that read, now or later, is tried again, as for a dense block.
    void join(uint32_t id);

    struct counters {
        int64_t loaded;
        int64_t evicted;
    };
    counters count() const { return totals; }
    readers::counters count_jobs() const { return pool != nullptr ? pool->count() : readers::counters{}; }

  private:
    block_status & take(uint32_t id);
    block_owner & owner_of(uint32_t id) { return is_expert(id) ? *experts : *dense; }
    void submit(uint32_t id, const std::vector<weight_part> & parts, int64_t priority, size_t * n_submitted);
    bool read(uint32_t id, const std::vector<weight_part> & parts, bool run);
    bool read_part(const weight_part & part, std::string * error);
    std::string read_all(uint32_t id, guard & lock);
    void finish(uint32_t id, guard & lock);

    weight_store & store;
    const size_t part_bytes;
    block_owner * dense = nullptr;
    block_owner * experts = nullptr;

    mutable std::mutex mutex;
    std::condition_variable changed;
    std::vector<block_status> blocks;
    size_t n_sending = 0; // of them
    int n_waiting = 0;    // for these to have been sent
    counters totals = {};

    std::unique_ptr<readers> pool;
};

} // namespace superllama
