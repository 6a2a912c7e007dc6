// What this server has of the memory that it shares with the other servers of its router.
#pragma once

#include "server/pool.h"

#include <functional>
#include <memory>

struct common_params;

namespace superllama {

class lease {
  public:
    // Null where this server shares memory with nobody: it has no router, or no dynamic layers, or its device's memory
    // is what counts. Throws std::runtime_error.
    static std::unique_ptr<lease> join(const common_params & params);
    ~lease(); // what it had is free

    struct activity {
        bool is_busy;     // a request runs
        bool waits;       // one waits for memory
        int64_t n_graphs; // that have begun since the model was loaded
    };

    // Tells the others, and says what this one should have; see pool_shares().
    uint64_t may_have(const activity & now);

    // More, as far as memory is free; returns what it has now. Less, which has been given back.
    uint64_t raise(uint64_t bytes);
    void lower(uint64_t bytes);
    uint64_t bytes() const { return self.lease; }

    // Before the model is loaded: waits until there is as much as it needs. False: the server ends.
    bool obtain(const std::function<bool()> & should_stop);
    bool is_enough() const { return self.lease >= self.least; }

    // Sleeps until somebody's share may be another one than at `seen`, or the time is over.
    uint32_t seen() const { return pool.wakes(); }
    void wait(uint32_t seen_then, int timeout_ms) const { pool.wait(seen_then, timeout_ms); }
    void wake() { pool.wake(); } // whoever waits, of this server too

    void set_range(uint64_t least, uint64_t full); // as the model knows them once it is loaded

    pool_table table(); // of all, to show

  private:
    lease(const common_params & params, int router_port);

    void publish(pool_table & table) const;

    memory_pool pool;
    pool_member self;
    uint64_t kept;           // --mem-least
    int64_t first_graph = 0; // graphs there were when this server became active
};

} // namespace superllama
