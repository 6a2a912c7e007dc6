#include "weights/experts/pool.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "weights/experts/guess.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace superllama {

static const int n_fill = 4; // experts that are read at once without anybody asking

expert_pool::expert_pool(weight_store & store, block_loader & loader, dense_stream & dense, int n_expert_used,
                         experts_on_device on_device) :
    store(store),
    loader(loader),
    dense(dense),
    n_expert_used(n_expert_used),
    on_device(std::move(on_device)),
    used(loader.size()),
    heats(loader.size()) {
    for (uint32_t id = 0; id < loader.size(); ++id) {
        n_bytes += loader.is_expert(id) ? loader.bytes_of(id) : 0;
    }
}

// ------------------------------------------------------------------------------------------------- budget

pool_budget expert_pool::plan(int n_ubatch) const {
    pool_budget b;
    std::map<int32_t, size_t> expert_max, n_experts; // by layer
    for (uint32_t id = 0; id < loader.size(); ++id) {
        if (loader.is_expert(id) && !loader[id].elsewhere) {
            const int32_t layer = store.blocks()[id].layer;
            b.bytes += loader.bytes_of(id);
            n_experts[layer]++;
            expert_max[layer] = std::max(expert_max[layer], loader.bytes_of(id));
        }
    }
    for (const auto & entry : expert_max) {
        const size_t n_asked =
            std::min(n_experts[entry.first], (size_t) n_ubatch * (size_t) std::max(1, n_expert_used));
        b.least = std::max(b.least, n_asked * entry.second);
    }
    return b;
}

void expert_pool::limit(size_t bytes, size_t all) {
    bytes_max = bytes;
    n_here = all;
    next_fill = 0;
}

// ------------------------------------------------------------------------------------------------- memory

void expert_pool::take_memory(uint32_t id) {
    store.place(id, false);
    all_there = false;
    n_used += loader.bytes_of(id);
    trim(bytes_max);
}

void expert_pool::give_memory_back(uint32_t id) {
    all_there = false;
    n_used -= loader.bytes_of(id);
    used.remove(id);
    store.drop(id);
    trim(bytes_max);
}

bool expert_pool::may_stay(uint32_t) const {
    return n_used <= bytes_max; // also what another budget has no room for any more goes
}

bool expert_pool::is_passing(uint32_t id) const {
    return loader[id].state == block_state::reading && !loader[id].in_use;
}

int64_t expert_pool::find_victim() const {
    for (uint32_t id : used.oldest_first()) {
        if (idle(id)) {
            return id;
        }
    }
    return -1;
}

bool expert_pool::make_room(block_loader::guard & lock) {
    while (n_used > bytes_max) {
        const int64_t victim = find_victim();
        if (victim >= 0) {
            loader.drop((uint32_t) victim);
        } else if (!wait_for_idle(lock)) {
            return false;
        }
    }
    trim(bytes_max);
    return true;
}

void expert_pool::make_room_now() {
    for (int64_t victim = 0; victim >= 0 && n_used > bytes_max;) {
        victim = find_victim();
        if (victim >= 0) {
            loader.drop((uint32_t) victim);
        }
    }
    trim(bytes_max);
}

// Everything unused is still on its way in, or to a device: waits for one, it can go then. False: there is none.
bool expert_pool::wait_for_idle(block_loader::guard & lock) {
    for (uint32_t id = 0; id < loader.size(); ++id) {
        if (loader.is_expert(id) && (is_passing(id) || (loader[id].sending && !loader[id].in_use))) {
            loader.wait(lock);
            return true;
        }
    }
    return false;
}

// Where a smaller budget came while experts were in use, those that this graph wants may lie behind free frames of
// another size: they move together, once they are there. No kernel reads experts now. False: there is no room even so.
bool expert_pool::close_gaps(uint32_t id, block_loader::guard & lock) {
    for (uint32_t other : in_use) {
        loader.wait_for(other, lock);
    }
    loader.wait_for_sending(lock);
    store.trim_experts(bytes_max - std::min(bytes_max, loader.bytes_of(id)),
                       [this](uint32_t other) { return loader[other].state == block_state::ready; });
    return store.has_frame(id, bytes_max);
}

// Frees a frame for an expert, at the cost of others that no node uses now. False: all are in use, or on their way.
// Memory is what counts: frames of another size go back to the system from their end, which one that is being read
// holds up.
bool expert_pool::make_frame(uint32_t id) {
    while (!store.has_frame(id, bytes_max)) {
        trim(bytes_max - std::min(bytes_max, loader.bytes_of(id)));
        if (store.has_frame(id, bytes_max)) {
            break;
        }
        const int64_t victim = find_victim_for(id);
        if (victim < 0) {
            return false;
        }
        loader.drop((uint32_t) victim);
    }
    return true;
}

// The one that was used least recently; but one of the same size is better, where it is not much younger.
int64_t expert_pool::find_victim_for(uint32_t expert) const {
    int64_t oldest = -1;
    for (uint32_t id : used.oldest_first()) {
        if (!idle(id)) {
            continue;
        }
        oldest = oldest < 0 ? (int64_t) id : oldest;
        if (loader.bytes_of(id) == loader.bytes_of(expert)) {
            const int64_t age = n_graphs - loader[id].last_use;
            return age * 2 >= n_graphs - loader[(uint32_t) oldest].last_use ? (int64_t) id : oldest;
        }
    }
    return oldest;
}

// Gives the memory of frames back where there is more than this.
void expert_pool::trim(size_t bytes) {
    store.trim_experts(bytes, [this](uint32_t id) { return idle(id); });
}

// --------------------------------------------------------------------------------------- the way of a graph

// What the router has chosen, of all tokens of the ubatch.
bool expert_pool::choices(const layer_stop & s, std::map<uint32_t, int64_t> * n_chosen, std::string * error) {
    const ggml_tensor * ids = s.expert_ids;
    const ggml_tensor * weights = s.expert_weights;
    const int64_t n_use = is_routing(ids->ne[0]) ? 1 : 0;
    std::vector<char> data(ggml_nbytes(ids));
    ggml_backend_tensor_get(ids, data.data(), 0, data.size());
    for (int64_t i1 = 0; i1 < ids->ne[1]; ++i1) {
        for (int64_t i0 = 0; i0 < ids->ne[0]; ++i0) {
            int32_t e = 0;
            memcpy(&e, &data[(size_t) (i1 * (int64_t) ids->nb[1] + i0 * (int64_t) ids->nb[0])], sizeof(e));
            if (e < 0 || e >= store.n_experts(weights)) { // of a device that is gone, say
                *error = "the router asks for expert " + std::to_string(e) + " of " + weights->name + ", which has " +
                         std::to_string(store.n_experts(weights));
                return false;
            }
            const auto id = (uint32_t) store.block_of(weights, e);
            (*n_chosen)[id]++;
            heats[id].uses += n_use;
        }
    }
    return true;
}

// One token only: what several use is told by where they were sent, and their graph takes longer than its stops.
bool expert_pool::hold_all(const layer_graph & graph) {
    if (graph.expert_tokens != 1 || n_used < n_here) {
        return false;
    }
    for (uint32_t id = 0; !all_there && id < loader.size(); ++id) {
        if (loader.is_expert(id) && !loader[id].elsewhere && loader[id].state != block_state::ready) {
            return false;
        }
    }
    all_there = true;
    if (!asked_known) {
        for (const layer_experts & e : graph.experts) {
            store.take_asked(e.weights, [](int32_t) {});
        }
    }
    held = &graph;
    return true;
}

void expert_pool::count_held() {
    for (const layer_experts & e : held->experts) {
        store.take_asked(e.weights, [&](int32_t expert) {
            const uint32_t id = e.blocks[(size_t) expert];
            loader[id].last_use = n_graphs;
            used.touch(id);
            totals.hits++;
            heats[id].uses += is_routing(e.n_chosen) ? 1 : 0;
        });
    }
    asked_known = true;
    held = nullptr;
}

// What is missing is read, all at once. The kernels wait for each where they need it.
bool expert_pool::acquire(const layer_stop & s, block_loader::guard & lock, std::string * error) {
    std::map<uint32_t, int64_t> n_chosen;
    if (!choices(s, &n_chosen, error)) {
        return false;
    }
    std::set<uint32_t> wanted;
    for (const auto & entry : n_chosen) {
        wanted.insert(entry.first);
    }
    settle_guess(store.blocks()[*wanted.begin()].layer, wanted, lock);
    const bool is_sent = s.experts->src[0] != s.expert_weights; // a copy is multiplied with, on a device
    most_chosen.clear();
    if (is_sent) {
        std::vector<uint32_t> ids(wanted.begin(), wanted.end());
        std::stable_sort(ids.begin(), ids.end(), [&](uint32_t a, uint32_t b) { return n_chosen[a] > n_chosen[b]; });
        for (uint32_t id : ids) {
            most_chosen.push_back(store.blocks()[id].expert);
        }
        last_batch[store.blocks()[*wanted.begin()].layer] = wanted;
    }
    for (auto it = wanted.begin(); is_sent && it != wanted.end();) {
        const bool is_there = on_device.has(s.expert_weights, store.blocks()[*it].expert);
        totals.hits += is_there ? 1 : 0;
        it = is_there ? (from_device.insert(*it), wanted.erase(it)) : std::next(it);
    }
    asked_known = false; // the kernels will ask, and what they ask for is counted here
    return want(wanted, is_routing(s.expert_ids->ne[0]), lock, error);
}

// They are in use from now on, and on their way where they have to be.
bool expert_pool::want(const std::set<uint32_t> & wanted, bool routed, block_loader::guard & lock,
                       std::string * error) {
    for (uint32_t id : wanted) {
        loader[id].in_use = true;
        loader[id].last_use = n_graphs;
        loader.join(id);
        loader.promote(id, -1);
        used.touch(id);
        const bool is_miss = loader[id].state == block_state::absent;
        (is_miss ? totals.misses : totals.hits)++;
        heats[id].misses += is_miss && routed ? 1 : 0;
    }
    in_use.assign(wanted.begin(), wanted.end());

    const int64_t t_begin = ggml_time_us();
    for (uint32_t id : wanted) {
        if (loader[id].state != block_state::absent) {
            continue;
        }
        while (!make_frame(id)) {
            if (!wait_for_idle(lock) && !close_gaps(id, lock)) {
                *error = "no memory left for the " + std::to_string(wanted.size()) + " experts of " +
                         std::to_string(loader.bytes_of(id)) +
                         " bytes that one ubatch asks for; raise --mem-budget, or lower --ubatch-size";
                return false;
            }
        }
        loader.begin(id, -1, lock);
        used.touch(id);
    }
    totals.stall_ms += (double) (ggml_time_us() - t_begin) / 1000.0;
    return true;
}

// The next layer's, and those of the one after it where the disk would be idle.
void expert_pool::guess(const layer_stop & s) {
    if (!loader.reads_ahead() || s.experts->src[2]->ne[1] > guess_tokens_max || s.expert_ids != s.experts->src[2] ||
        n_used >= n_here) {
        return; // also where this layer's input is on its way from a device, or where all experts are there
    }
    guess_layer(s, s, 0);
    const auto reading = [this](uint32_t id) { return loader[id].state == block_state::reading; };
    if (bytes_max >= n_here && std::none_of(in_use.begin(), in_use.end(), reading)) {
        fill();
        return;
    }
    if (s.next_moe != nullptr && std::none_of(guessed.begin(), guessed.end(), reading) &&
        std::none_of(in_use.begin(), in_use.end(), reading)) {
        guess_layer(s, *s.next_moe, 1);
    }
}

// Where all have room, the next few that are not there: a graph that has nothing to wait for need not stop.
void expert_pool::fill() {
    block_loader::guard none; // with readers, nothing is read in this thread
    for (int n = 0; n < n_fill && next_fill < loader.size(); ++next_fill) {
        if (!loader.is_expert(next_fill) || loader[next_fill].elsewhere ||
            loader[next_fill].state != block_state::absent) {
            continue;
        }
        if (!make_frame(next_fill)) {
            return;
        }
        loader.begin(next_fill, 2, none);
        used.add_cold(next_fill);
        n++;
    }
}

// From the input of the layer at `s`, for the layer that follows the one at `before`. What is read goes to the cold end
// of the pool: if nobody asks for it, it is the first to leave.
void expert_pool::guess_layer(const layer_stop & s, const layer_stop & before, int64_t priority) {
    const ggml_tensor * router = before.next_router;
    if (router == nullptr) {
        return;
    }
    const ggml_tensor * weights = before.next_moe->expert_weights;
    const int32_t block_of_router = store.block_of(router);
    if (block_of_router < 0 ? !store.is_resident(router)
                            : loader[(uint32_t) block_of_router].state != block_state::ready) {
        return;
    }
    if (block_of_router >= 0) {
        dense.point((uint32_t) block_of_router);
    }
    read_guessed(weights, expert_guess(router, s.experts->src[1], s.experts->src[2]->ne[0]), priority);
}

void expert_pool::read_guessed(const ggml_tensor * weights, const std::vector<int32_t> & experts, int64_t priority) {
    for (int32_t e : experts) {
        const auto id = (uint32_t) store.block_of(weights, e);
        if (loader[id].state == block_state::ready) {
            loader[id].last_use = n_graphs;
            used.touch(id);
        }
    }
    block_loader::guard none; // with readers, nothing is read in this thread
    for (int32_t e : experts) {
        const auto id = (uint32_t) store.block_of(weights, e);
        if (loader[id].state != block_state::absent) {
            continue;
        }
        if (!make_frame(id)) {
            return;
        }
        loader.begin(id, priority, none);
        used.add_cold(id);
        guessed.push_back(id);
        totals.guesses++;
    }
}

// The router has chosen: what was guessed right is urgent now, what was guessed wrong is not read any more.
void expert_pool::settle_guess(int32_t layer, const std::set<uint32_t> & wanted, block_loader::guard & lock) {
    std::vector<uint32_t> wrong;
    std::vector<uint32_t> later; // of another layer
    for (uint32_t id : guessed) {
        if (store.blocks()[id].layer != layer) {
            later.push_back(id);
        } else if (wanted.count(id) > 0) {
            totals.guesses_used++;
        } else {
            wrong.push_back(id);
        }
    }
    guessed = later;
    loader.call_off(wrong, lock);
}

bool expert_pool::release(std::string * error) {
    for (uint32_t id : in_use) {
        loader[id].in_use = false;
        if (loader[id].state == block_state::failed) {
            *error = loader[id].error;
            loader[id].error.clear();
            loader.drop(id);
        }
    }
    in_use.clear();
    from_device.clear();
    trim(bytes_max);
    return error->empty();
}

void expert_pool::end() {
    if (held != nullptr) {
        count_held();
    }
    guessed.clear();
    std::string ignored; // the graph has failed already, or has heard it
    release(&ignored);
}

} // namespace superllama
