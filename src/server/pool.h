// Memory that the servers of one router share: who has how much of it, in a file that all of them write. Nobody is in
// charge: each computes the same shares from the same table, gives back what is too much, and takes what is free.
#pragma once

#include "io/file.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace superllama {

struct pool_member {
    int64_t pid;
    int64_t started;       // of that process, by the system's clock: numbers are used again
    uint64_t lease;        // bytes that it may use now
    uint64_t least;        // the smallest budget that works
    uint64_t full;         // the smallest one that holds everything
    uint64_t given;        // its --mem-budget, 0 = automatic
    uint64_t weight;       // of its share among those that are active
    int64_t active_ms;     // when a request ran or waited last; of the machine
    int64_t waiting_ms;    // since when one waits for memory; 0 = none
    int64_t is_busy;       // a request runs
    int64_t is_active;     // one runs or waits, or did a moment ago
    int64_t is_first_pass; // over its weights, since it was not active
    char name[128];        // of its model
};

// What each may have: the sum is at most `total`. One that is busy keeps at least what it needs; those that are active
// share the rest by weight; the others keep what they have as far as it goes, the ones used last first; 0: it has to
// give back all of it, or to wait.
//
// A pass reads what is missing once, whether it may stay or not. So what one takes from another is of use to it from
// its second pass on, and is read again when the other one is asked: as long as all that are active are in their first
// pass, the others keep their part by weight.
std::vector<uint64_t> pool_shares(const std::vector<pool_member> & members, uint64_t total);

struct pool_table {
    uint64_t asked = 0;     // the total: the budget of the router, or of a request to it
    uint64_t automatic = 0; // what the machine had to give when the first one came
    std::vector<pool_member> members;

    uint64_t total() const; // as asked for, else the largest budget that one was given, else automatic
    uint64_t leased() const;
    pool_member * find(int64_t pid);
};

class memory_pool {
  public:
    // Of the router with this process and port. Throws std::runtime_error where there can be no such file.
    memory_pool(int64_t router_pid, int router_port);

    // One look at the table, or change of it, at a time, of threads and of processes; members whose process has ended
    // are gone. What `change` leaves is written. Throws std::runtime_error.
    void with(const std::function<void(pool_table &)> & change);

    // Wakes all that wait, in every process; with() does so where it wrote. Any thread.
    void wake();
    // How often somebody was woken: read before a look, it tells afterwards whether anything has changed since.
    uint32_t wakes() const;
    // Until it is another number than `seen`, or the time is over. False: it is not. Where the file cannot be mapped
    // this sleeps, and not for long: nobody wakes it.
    bool wait(uint32_t seen, int timeout_ms) const;

    void remove(); // the file; those that have it open go on with it

    static pool_member of_this_process();
    static bool is_supported();

  private:
    bool changes(const std::function<void(pool_table &)> & change);

    struct unmap {
        void operator()(std::atomic<uint32_t> * at) const;
    };

    std::string path;
    descriptor file;
    std::unique_ptr<std::atomic<uint32_t>, unmap> n_wakes; // at the file's beginning; null: it cannot be mapped
    std::mutex of_threads;                                 // which have one lock of the file together
};

} // namespace superllama
