// The scheduler's part for budgets: what one means, which blocks it pins, and what goes when it shrinks.

#include "io/address_space.h"
#include "weights/scheduler.h"

#include <algorithm>
#include <map>

namespace superllama {

static const size_t queue_bytes = 16u << 20; // of reads that keep a drive busy

weights_budget layer_sched::plan(size_t bytes, int n_ubatch) const {
    weights_budget b = {};
    std::map<int32_t, size_t> expert_max, n_experts;
    for (uint32_t id = 0; id < blocks.size(); ++id) {
        const weight_block & block = store.blocks()[id];
        if (blocks[id].elsewhere) {
            continue;
        }
        if (block.expert < 0) {
            b.dense_bytes += block.bytes;
        } else {
            b.expert_bytes += block.bytes;
            n_experts[block.layer]++;
            expert_max[block.layer] = std::max(expert_max[block.layer], block.bytes);
        }
    }
    for (const auto & entry : expert_max) {
        const size_t n_asked =
            std::min(n_experts[entry.first], (size_t) n_ubatch * (size_t) std::max(1, cfg.n_expert_used));
        b.expert_pool_min = std::max(b.expert_pool_min, n_asked * entry.second);
    }

    // The ring: one block in use, one on its way, and a queue of reads. The longest prefix of pin_order is pinned that
    // leaves this much for the rest.
    const size_t left = bytes - std::min(bytes, b.expert_pool_min);
    const size_t queue = std::min(queue_bytes, left / 16);
    const bool pins = cfg.policy == SUPERLLAMA_LAYER_POLICY_PIN;
    bool fits = left >= b.dense_bytes && (pins || b.dense_bytes == 0);
    b.pinned_bytes = fits ? b.dense_bytes : 0;
    size_t least = b.dense_bytes;
    size_t rest = 0;
    size_t largest = 0;
    for (size_t k = pin_order.size(); k-- > 0;) {
        if (blocks[pin_order[k]].elsewhere) {
            continue;
        }
        rest += bytes_of(pin_order[k]);
        largest = std::max(largest, bytes_of(pin_order[k]));
        if (!pins && rest < b.dense_bytes) {
            continue; // this policy pins nothing
        }
        const size_t at_once = std::max(2 * largest, in_use_max.empty() ? 0 : in_use_max[k]);
        const size_t ring = round_up(std::min(rest, at_once), store.ring_page());
        const size_t need = b.dense_bytes - rest + ring;
        least = std::min(least, need + std::min(queue_bytes, need / 15 + 1)); // where `queue` fits besides
        if (!fits && need + queue <= left) {
            fits = true;
            b.ring_bytes = pins ? ring + queue : left;
            b.pinned_bytes = left - b.ring_bytes;
        }
    }
    b.streamed_bytes = b.dense_bytes - std::min(b.dense_bytes, b.pinned_bytes);
    b.min_bytes = least + b.expert_pool_min;
    if (!fits || bytes < b.expert_pool_min) {
        return b;
    }
    b.pool_bytes = std::min(b.expert_bytes, bytes - b.pinned_bytes - b.ring_bytes);
    return b;
}

// The most that is in use at any node, of these blocks alone. Events in order: a block that ends at a node is in use
// while one begins there.
static size_t most_at_once(const std::vector<block_use> & uses, const std::vector<bool> & streamed,
                           const std::vector<weight_block> & blocks) {
    std::map<int, std::pair<size_t, size_t>> events; // bytes that begin and that end
    for (const block_use & u : uses) {
        if (streamed[u.block]) {
            events[u.first].first += blocks[u.block].bytes;
            events[u.last].second += blocks[u.block].bytes;
        }
    }
    size_t now = 0, most = 0;
    for (const auto & e : events) {
        now += e.second.first;
        most = std::max(most, now);
        now -= e.second.second;
    }
    return most;
}

void layer_sched::expect(const std::vector<block_use> & uses) {
    const std::lock_guard<std::mutex> lock(mutex);
    in_use_max.resize(pin_order.size());
    std::vector<bool> streamed(blocks.size());
    for (size_t k = pin_order.size(); k-- > 0;) {
        streamed[pin_order[k]] = true;
        in_use_max[k] = std::max(in_use_max[k], most_at_once(uses, streamed, store.blocks()));
    }
}

void layer_sched::set_budget(size_t bytes, int n_ubatch_new) {
    {
        std::unique_lock<std::mutex> lock(mutex);
        const bool less = bytes < bytes_max;
        bytes_max = bytes;
        n_ubatch = n_ubatch_new;
        budget_new = true;
        if (less) {
            shrink(lock);
        }
    }
    apply_budget_if_idle();
}

// A larger budget that comes while a graph runs waits for its end.
void layer_sched::apply_budget_if_idle() {
    while (budget_new && turn.try_lock()) {
        {
            std::unique_lock<std::mutex> lock(mutex);
            apply_budget(lock);
        }
        turn.unlock();
    }
}

// Only between graphs: nothing is in use.
void layer_sched::apply_budget(std::unique_lock<std::mutex> & lock) {
    if (budget_new) {
        budget_new = false;
        choose_pins();
        for (bool experts : { false, true }) {
            make_room(0, experts, lock);
        }
        trim_experts(budget.pool_bytes);
    }
}

// At any time, without waiting: reads that nobody waits for are called off, and what is not in use goes.
void layer_sched::shrink(std::unique_lock<std::mutex> & lock) {
    choose_pins();
    std::vector<readers::job_id> jobs;
    for (uint32_t id = 0; id < blocks.size(); ++id) {
        const block & b = blocks[id];
        if (b.state == LOADING && !b.in_use && !b.pinned) {
            jobs.insert(jobs.end(), b.jobs.begin(), b.jobs.end());
        }
    }
    lock.unlock();
    for (readers::job_id job : jobs) {
        pool->cancel(job);
    }
    lock.lock();
    for (bool experts : { false, true }) {
        for (int64_t victim = 0; victim >= 0 && !fits(0, experts);) {
            victim = find_victim(experts);
            if (victim >= 0) {
                evict((uint32_t) victim);
            }
        }
    }
    trim_experts(budget.pool_bytes);
}

// Pins the longest prefix of pin_order that fits; what is not where it belongs now goes at once.
void layer_sched::choose_pins() {
    budget = plan(bytes_max, n_ubatch);
    size_t left = budget.pinned_bytes;
    budget.pinned_bytes = 0;
    for (uint32_t id : pin_order) {
        block & b = blocks[id];
        const bool pin = !b.elsewhere && bytes_of(id) <= left;
        if (pin) {
            left -= bytes_of(id);
            budget.pinned_bytes += bytes_of(id);
        }
        b.pinned = pin;
        if (idle(id) && misplaced(id)) {
            evict(id);
        }
    }
    budget.streamed_bytes = budget.dense_bytes - budget.pinned_bytes;
    if (budget.streamed_bytes > 0) {
        budget.ring_bytes += left; // what was too small for another block
    }
    store.limit_ring(budget.ring_bytes);
}

} // namespace superllama
