// The scheduler's part for mixture of experts: one pool with LRU over all layers, and the next layer's experts guessed.

#include "weights/experts/guess.h"
#include "weights/scheduler.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>

namespace superllama {

static const int64_t guess_tokens_max = 4; // more of them want most experts anyway

// The router has chosen: what is missing is read, all at once. The kernels wait for each where they need it.
bool layer_sched::acquire_experts(const layer_stop & s, std::unique_lock<std::mutex> & lock, std::string * error) {
    const ggml_tensor * ids = s.expert_ids;
    const ggml_tensor * weights = s.experts->src[0];
    std::vector<char> data(ggml_nbytes(ids));
    ggml_backend_tensor_get(ids, data.data(), 0, data.size());
    std::set<uint32_t> wanted;
    for (int64_t i1 = 0; i1 < ids->ne[1]; ++i1) {
        for (int64_t i0 = 0; i0 < ids->ne[0]; ++i0) {
            int32_t e = 0;
            memcpy(&e, &data[(size_t) (i1 * (int64_t) ids->nb[1] + i0 * (int64_t) ids->nb[0])], sizeof(e));
            if (e < 0 || e >= store.n_experts(weights)) { // of a device that is gone, say
                *error = "the router asks for expert " + std::to_string(e) + " of " + weights->name + ", which has " +
                         std::to_string(store.n_experts(weights));
                return false;
            }
            wanted.insert((uint32_t) store.block_of(weights, e));
        }
    }
    settle_guess(wanted, lock);
    for (uint32_t id : wanted) {
        block & b = blocks[id];
        b.in_use = true;
        if (b.state == LOADING && !b.error.empty()) {
            b.error = called_off; // a guess has begun to read it, and failed
        }
        touch(id);
        (b.state == ABSENT ? totals.expert_misses : totals.expert_hits)++;
    }
    experts_in_use.assign(wanted.begin(), wanted.end());

    const int64_t t_begin = ggml_time_us();
    for (uint32_t id : wanted) {
        if (blocks[id].state != ABSENT) {
            continue;
        }
        while (!make_expert_room(id)) {
            if (!wait_for_idle(true, lock)) {
                *error = "no memory left for the " + std::to_string(wanted.size()) + " experts of " +
                         std::to_string(bytes_of(id)) +
                         " bytes that one ubatch asks for; raise --mem-budget, or lower --ubatch-size";
                return false;
            }
        }
        submit(id, -1);
        touch(id);
        if (pool == nullptr) {
            read_here(id, lock);
        }
    }
    totals.stall_ms += (double) (ggml_time_us() - t_begin) / 1000.0;
    return true;
}

// Reads ahead what the next layer will probably ask for; and the one after it, where the disk would be idle.
void layer_sched::guess_experts(const layer_stop & s) {
    if (pool == nullptr || s.experts->src[2]->ne[1] > guess_tokens_max || s.expert_ids != s.experts->src[2] ||
        expert_used >= budget.expert_bytes) {
        return; // also where this layer's input is on its way from a device, or where all experts are there
    }
    guess_layer(s, s, 0);
    const auto loading = [this](uint32_t id) { return blocks[id].state == LOADING; };
    if (s.next_moe != nullptr && std::none_of(guessed.begin(), guessed.end(), loading) &&
        std::none_of(experts_in_use.begin(), experts_in_use.end(), loading)) {
        guess_layer(s, *s.next_moe, 1);
    }
}

// From the input of the layer at `s`, for the layer that follows the one at `before`. What is read goes to the cold end
// of the pool: if nobody asks for it, it is the first to leave.
void layer_sched::guess_layer(const layer_stop & s, const layer_stop & before, int64_t priority) {
    const ggml_tensor * router = before.next_router;
    if (router == nullptr) {
        return;
    }
    const ggml_tensor * weights = before.next_moe->experts->src[0];
    const int32_t block_of_router = store.block_of(router);
    if (block_of_router < 0 ? !store.is_resident(router) : blocks[(size_t) block_of_router].state != RESIDENT) {
        return;
    }
    if (block_of_router >= 0) {
        point((uint32_t) block_of_router);
    }
    const auto experts = expert_guess(router, s.experts->src[1], s.experts->src[2]->ne[0]);
    for (int32_t e : experts) {
        const auto id = (uint32_t) store.block_of(weights, e);
        if (blocks[id].state == RESIDENT) {
            touch(id);
        }
    }
    for (int32_t e : experts) {
        const auto id = (uint32_t) store.block_of(weights, e);
        if (blocks[id].state != ABSENT) {
            continue;
        }
        if (!make_expert_room(id)) {
            return;
        }
        submit(id, priority);
        blocks[id].lru = lru.insert(lru.begin(), id);
        blocks[id].listed = true;
        guessed.push_back(id);
        totals.expert_guesses++;
    }
}

// The router has chosen: what was guessed right is urgent now, what was guessed wrong is not read any more.
void layer_sched::settle_guess(const std::set<uint32_t> & wanted, std::unique_lock<std::mutex> & lock) {
    std::vector<readers::job_id> wrong;
    std::vector<uint32_t> later; // of another layer
    const int32_t layer = store.blocks()[*wanted.begin()].layer;
    for (uint32_t id : guessed) {
        if (store.blocks()[id].layer != layer) {
            later.push_back(id);
            continue;
        }
        const block & b = blocks[id];
        const bool right = wanted.count(id) > 0;
        totals.expert_guesses_used += right ? 1 : 0;
        if (b.state == LOADING) {
            for (readers::job_id job : b.jobs) {
                if (right) {
                    pool->promote(job, -1);
                } else {
                    wrong.push_back(job);
                }
            }
        }
    }
    guessed = later;
    lock.unlock();
    for (readers::job_id job : wrong) {
        pool->cancel(job);
    }
    lock.lock();
}

// False: one of them could not be read, and what was computed is not to be used.
bool layer_sched::release_experts(std::string * error) {
    for (uint32_t id : experts_in_use) {
        block & b = blocks[id];
        b.in_use = false;
        if (b.state == RESIDENT && !b.error.empty()) {
            *error = b.error;
            b.error.clear();
            evict(id);
        }
    }
    experts_in_use.clear();
    trim_experts(budget.pool_bytes);
    return error->empty();
}

// Frees a frame for an expert, at the cost of others that no node uses now. False: all are in use, or on their way.
// Memory is what counts: frames of another size go back to the system from their end, which one that is being read
// holds up.
bool layer_sched::make_expert_room(uint32_t id) {
    while (!store.has_frame(id, budget.pool_bytes)) {
        trim_experts(budget.pool_bytes - std::min(budget.pool_bytes, bytes_of(id)));
        if (store.has_frame(id, budget.pool_bytes)) {
            break;
        }
        const int64_t victim = find_victim_for(id);
        if (victim < 0) {
            return false;
        }
        evict((uint32_t) victim);
    }
    return true;
}

// The one that was used least recently; but one of the same size is better, where it is not much younger.
int64_t layer_sched::find_victim_for(uint32_t expert) const {
    int64_t oldest = -1;
    for (uint32_t id : lru) {
        if (!is_expert(id) || !idle(id)) {
            continue;
        }
        oldest = oldest < 0 ? (int64_t) id : oldest;
        if (bytes_of(id) == bytes_of(expert)) {
            const int64_t age = n_graphs - blocks[id].last_use;
            return age * 2 >= n_graphs - blocks[(size_t) oldest].last_use ? (int64_t) id : oldest;
        }
    }
    return oldest;
}

// Gives the memory of frames back where there is more than this.
void layer_sched::trim_experts(size_t bytes) {
    store.trim_experts(bytes, [this](uint32_t id) { return idle(id); });
}

} // namespace superllama
