#include "weights/experts/table.h"

#include "ggml.h"

#include <new>

namespace superllama {

size_t expert_table::bytes(size_t n_experts) {
    return sizeof(expert_table) + n_experts * (sizeof(std::atomic<const uint8_t *>) + sizeof(std::atomic<bool>));
}

expert_table * expert_table::create(void * at, size_t n_experts, expert_waiters & waiters) {
    auto * table = new (at) expert_table;
    table->matrix_at = wait_for;
    table->waiters = &waiters;
    table->n_experts = n_experts;
    for (size_t e = 0; e < n_experts; ++e) {
        new (table->matrices() + e) std::atomic<const uint8_t *>(nullptr);
        new (table->asked() + e) std::atomic<bool>(false);
    }
    return table;
}

void expert_table::set(int32_t expert, const uint8_t * matrix) {
    matrices()[expert].store(matrix, std::memory_order_release);
    if (matrix != nullptr) {
        const std::lock_guard<std::mutex> lock(waiters->mutex);
        if (waiters->n_waiting > 0) {
            waiters->changed.notify_all();
        }
    }
}

void expert_table::take_asked(const std::function<void(int32_t expert)> & visit) {
    for (size_t e = 0; e < n_experts; ++e) {
        if (asked()[e].load(std::memory_order_relaxed)) {
            asked()[e].store(false, std::memory_order_relaxed);
            visit((int32_t) e);
        }
    }
}

const char * expert_table::wait_for(void * at, int64_t expert) {
    auto * table = (expert_table *) at;
    const auto & matrix = table->matrices()[expert];
    auto & asked = table->asked()[expert];
    if (!asked.load(std::memory_order_relaxed)) { // threads write into one cache line once, not for every matrix
        asked.store(true, std::memory_order_relaxed);
    }
    if (const uint8_t * there = matrix.load(std::memory_order_acquire)) {
        return (const char *) there;
    }
    expert_waiters & w = *table->waiters;
    std::unique_lock<std::mutex> lock(w.mutex);
    if (w.n_waiting++ == 0) {
        w.t_begin_us = ggml_time_us();
    }
    w.changed.wait(lock, [&] { return matrix.load(std::memory_order_acquire) != nullptr; });
    if (--w.n_waiting == 0) {
        w.waited_us += ggml_time_us() - w.t_begin_us;
    }
    return (const char *) matrix.load(std::memory_order_acquire);
}

} // namespace superllama
