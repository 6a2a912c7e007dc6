// Where the experts of one tensor are: what its data is instead of their matrices. Kernels ask for the address of one,
// and wait where it is still being read.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>

namespace superllama {

// Threads that wait for experts of any tensor of a model.
struct expert_waiters {
    std::mutex mutex;
    std::condition_variable changed;
    int n_waiting = 0;
    int64_t waited_us = 0; // with at least one thread waiting
    int64_t t_begin_us = 0;
};

class expert_table {
  public:
    static size_t bytes(size_t n_experts);
    static expert_table * create(void * at, size_t n_experts, expert_waiters & waiters);

    void set(int32_t expert, const uint8_t * matrix); // its bytes are there; null: no longer. Any thread

    // Those that kernels asked for since the last call. No kernel runs.
    void take_asked(const std::function<void(int32_t expert)> & visit);

  private:
    const char * (*matrix_at)(void * table, int64_t expert); // first: where the patched kernels look for it
    expert_waiters * waiters;
    size_t n_experts;

    std::atomic<const uint8_t *> * matrices() { return (std::atomic<const uint8_t *> *) (this + 1); }
    std::atomic<bool> * asked() { return (std::atomic<bool> *) (matrices() + n_experts); }
    static const char * wait_for(void * table, int64_t expert);
};

} // namespace superllama
