#include "weights/scheduler.h"

#include "ggml.h"
#include "llama-impl.h"

#include <algorithm>
#include <functional>
#include <map>

namespace superllama {

// In the order of bit-reversed positions: whatever prefix is pinned, it and the rest are spread evenly over the layers,
// so that reading and computing overlap all the way.
static std::vector<uint32_t> spread(const std::vector<uint32_t> & ids) {
    size_t n_bits = 0;
    while (((size_t) 1 << n_bits) < ids.size()) {
        n_bits++;
    }
    std::vector<uint32_t> order;
    for (size_t i = 0; i < (size_t) 1 << n_bits; ++i) {
        size_t reversed = 0;
        for (size_t bit = 0; bit < n_bits; ++bit) {
            reversed |= (i >> bit & 1) << (n_bits - 1 - bit);
        }
        if (reversed < ids.size()) {
            order.push_back(ids[reversed]);
        }
    }
    return order;
}

layer_sched::layer_sched(weight_store & store, const config & cfg) :
    store(store),
    cfg(cfg),
    blocks(store.blocks().size()) {
    // The largest first: the smaller the blocks that are streamed, the smaller the ring that holds some of them.
    std::map<size_t, std::vector<uint32_t>, std::greater<size_t>> by_size;
    for (uint32_t id = 0; id < blocks.size(); ++id) {
        n_block_bytes += bytes_of(id);
        if (!is_expert(id)) {
            by_size[bytes_of(id) >> 20].push_back(id); // the same matrix of another layer may lie on a page more
        }
    }
    for (const auto & entry : by_size) {
        const std::vector<uint32_t> order = spread(entry.second);
        pin_order.insert(pin_order.end(), order.begin(), order.end());
    }
    if (cfg.n_threads > 0) {
        std::string why;
        pool = readers::create(cfg.n_threads, &why);
        if (pool == nullptr) {
            LLAMA_LOG_WARN("superllama: weights are not read ahead: %s\n", why.c_str());
        }
    }
}

layer_sched::~layer_sched() {
    pool.reset();
}

// ------------------------------------------------------------------------------------------------- moving

void layer_sched::between_graphs(const std::function<void()> & change) {
    const std::lock_guard<std::mutex> no_graph(turn);
    const std::lock_guard<std::mutex> lock(mutex);
    current = layer_graph();
    change();
}

void layer_sched::layer_moved(int32_t layer) {
    const std::lock_guard<std::mutex> no_graph(turn);
    std::unique_lock<std::mutex> lock(mutex);
    for (uint32_t id = 0; id < blocks.size(); ++id) {
        block & b = blocks[id];
        if (store.blocks()[id].layer != layer) {
            continue;
        }
        const auto & slices = store.blocks()[id].slices;
        b.elsewhere = std::none_of(slices.begin(), slices.end(),
                                   [this](const weight_slice & s) { return store.is_here(s.tensor); });
        changed.wait(lock, [&] { return b.state != LOADING; });
        b.in_use = false;
        if (b.elsewhere && b.state == RESIDENT) {
            evict(id);
        }
    }
    current = layer_graph(); // no read-ahead for what is gone
    budget_new = true;
    apply_budget(lock);
}

std::vector<const uint8_t *> layer_sched::keep(const ggml_tensor * t) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<uint32_t> ids;
    std::vector<const uint8_t *> shares;
    for (int32_t e = 0; e < std::max(1, store.n_experts(t)); ++e) {
        const int32_t id = store.block_of(t, e);
        if (id < 0 || blocks[(size_t) id].state != RESIDENT || store.in_ring((uint32_t) id)) {
            return {};
        }
        const auto & slices = store.blocks()[(size_t) id].slices;
        const auto mine =
            std::find_if(slices.begin(), slices.end(), [t](const weight_slice & s) { return s.tensor == t; });
        shares.push_back(store.data((uint32_t) id, (size_t) (mine - slices.begin())));
        ids.push_back((uint32_t) id);
    }
    for (uint32_t id : ids) {
        blocks[id].in_use = true;
    }
    return shares;
}

void layer_sched::touch(uint32_t id) {
    block & b = blocks[id];
    b.last_use = n_graphs;
    if (b.listed) {
        lru.splice(lru.end(), lru, b.lru);
    } else {
        b.lru = lru.insert(lru.end(), id);
        b.listed = true;
    }
}

// For kernels: its tensors, and views of them in the graph that runs.
void layer_sched::point(uint32_t id) {
    store.point(id);
    const auto views = current.views.find(id);
    if (views != current.views.end()) {
        for (ggml_tensor * view : views->second) {
            view->data = (char *) view->view_src->data + view->view_offs;
        }
    }
}

// It is in memory and stays there.
bool layer_sched::settled(uint32_t id) const {
    return blocks[id].pinned && blocks[id].state == RESIDENT && !misplaced(id);
}

// In the ring though it is pinned now, or at home though it is no more.
bool layer_sched::misplaced(uint32_t id) const {
    return !is_expert(id) && blocks[id].pinned == store.in_ring(id);
}

void layer_sched::evict(uint32_t id) {
    block & b = blocks[id];
    b.state = ABSENT;
    b.n_evictions++;
    totals.blocks_evicted++;
    if (!store.in_ring(id)) {
        (is_expert(id) ? expert_used : pinned_used) -= bytes_of(id);
    }
    if (b.listed) {
        lru.erase(b.lru);
        b.listed = false;
    }
    store.drop(id);
    if (is_expert(id)) {
        trim_experts(budget.pool_bytes);
    }
}

// Charges the block and starts to read it; with a pool in its threads, else read_here() does the work.
void layer_sched::submit(uint32_t id, int64_t priority) {
    block & b = blocks[id];
    b.state = LOADING;
    b.error.clear();
    b.jobs.clear();
    store.place(id, !b.pinned);
    if (!store.in_ring(id)) {
        (is_expert(id) ? expert_used : pinned_used) += bytes_of(id);
    }
    if (is_expert(id)) {
        trim_experts(budget.pool_bytes);
    }
    const std::vector<weight_part> parts = store.parts(id, cfg.part_bytes);
    b.n_parts = (int32_t) parts.size();
    b.n_slice_parts.assign(store.blocks()[id].slices.size(), 0);
    for (const weight_part & part : parts) {
        b.n_slice_parts[part.index]++;
    }
    if (pool == nullptr) {
        return;
    }
    size_t n_submitted = 0;
    try {
        submit_parts(id, parts, priority, &n_submitted);
    } catch (const std::exception & e) { // no memory for the jobs: what has none counts as read, and failed
        b.error = e.what();
        b.n_parts -= (int32_t) (parts.size() - n_submitted);
        if (b.n_parts == 0) {
            evict(id);
            changed.notify_all();
        }
    }
}

// Small parts together: waking a thread for each would cost more than they gain by being read at once.
void layer_sched::submit_parts(uint32_t id, const std::vector<weight_part> & parts, int64_t priority, size_t * n) {
    std::vector<weight_part> group;
    size_t bytes = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
        group.push_back(parts[i]);
        bytes += parts[i].bytes;
        if (i + 1 == parts.size() || bytes + parts[i + 1].bytes > cfg.part_bytes) {
            blocks[id].jobs.reserve(blocks[id].jobs.size() + 1);
            blocks[id].jobs.push_back(
                pool->submit(priority, [this, id, group](bool run) { return read(id, group, run); }));
            *n = i + 1;
            group.clear();
            bytes = 0;
        }
    }
}

// In a thread of the pool. False: not all was read.
bool layer_sched::read(uint32_t id, const std::vector<weight_part> & parts, bool run) {
    bool all = true;
    for (const weight_part & part : parts) {
        std::string error = called_off;
        const bool ok = run && read_part(part, &error);
        all = all && ok;

        std::unique_lock<std::mutex> lock(mutex);
        block & b = blocks[id];
        if (!ok && b.error.empty()) {
            b.error = error;
        }
        if (--b.n_slice_parts[part.index] == 0 && is_expert(id) && b.error.empty() && store.verified(id)) {
            store.publish(id, part.index); // kernels go on with it while others are read
        }
        if (--b.n_parts == 0) {
            finish_load(id, lock);
        }
    }
    return all;
}

// What is thrown, because there is no memory to read into, is an error of the read.
bool layer_sched::read_part(const weight_part & part, std::string * error) {
    try {
        return store.read_part(part, error);
    } catch (const std::exception & e) {
        *error = e.what();
        return false;
    }
}

void layer_sched::read_here(uint32_t id, std::unique_lock<std::mutex> & lock) {
    blocks[id].error = read_all(id, lock);
    blocks[id].n_parts = 0;
    finish_load(id, lock);
}

// In this thread. The error, if any.
std::string layer_sched::read_all(uint32_t id, std::unique_lock<std::mutex> & lock) {
    std::string error;
    lock.unlock();
    for (const weight_part & part : store.parts(id, cfg.part_bytes)) {
        if (!read_part(part, &error)) {
            break;
        }
    }
    lock.lock();
    return error;
}

// All parts were read, or the block has its error.
void layer_sched::finish_load(uint32_t id, std::unique_lock<std::mutex> & lock) {
    block & b = blocks[id];
    if (is_expert(id) && b.in_use && b.error == called_off) {
        b.error = read_all(id, lock); // the router has chosen it in the meantime
    }
    if (b.error.empty()) {
        std::string error;
        lock.unlock();
        store.verify(id, &error);
        lock.lock();
        b.error = error;
    }
    b.state = RESIDENT;
    b.n_loads++;
    totals.blocks_loaded++;
    if (is_expert(id)) { // if it failed, kernels that wait for it go on with what is there, and the graph fails then
        for (size_t i = 0; i < store.blocks()[id].slices.size(); ++i) {
            store.publish(id, i);
        }
    }
    if ((!b.error.empty() && !(is_expert(id) && b.in_use)) ||
        (idle(id) && (misplaced(id) || (!b.pinned && !fits(0, is_expert(id)))))) {
        evict(id); // also what another budget has no room for any more
    }
    changed.notify_all();
}

// Pinned blocks have their memory reserved, whether they are there yet or not.
bool layer_sched::fits(size_t bytes, bool experts) const {
    return experts ? expert_used + bytes <= budget.pool_bytes : store.has_ring_room(bytes);
}

// The idle block that is missed least; -1: all are in use, on their way, or pinned.
int64_t layer_sched::find_victim(bool experts) const {
    if (experts || cfg.policy == SUPERLLAMA_LAYER_POLICY_LRU) {
        for (uint32_t id : lru) {
            if (is_expert(id) == experts && idle(id)) {
                return id;
            }
        }
        return -1;
    }
    // the streamed block that is needed last
    for (size_t k = current.order.size(); k-- > 0;) {
        const uint32_t id = current.order[(head + 1 + k) % current.order.size()];
        if (!blocks[id].pinned && idle(id)) {
            return id;
        }
    }
    for (uint32_t id : pin_order) { // of no graph yet, or of another one
        if (!blocks[id].pinned && idle(id)) {
            return id;
        }
    }
    return -1;
}

// Frees memory until `bytes` more fit, at the cost of blocks that no node uses now. Where they fit, but not in one
// piece, those in use move together.
bool layer_sched::make_room(size_t bytes, bool experts, std::unique_lock<std::mutex> & lock) {
    while (!fits(bytes, experts)) {
        const int64_t victim = find_victim(experts);
        if (victim >= 0) {
            evict((uint32_t) victim);
        } else if (!wait_for_idle(experts, lock)) {
            if (bytes > 0) { // for a block of the ring: experts make room in make_expert_room()
                store.compact_ring([this](uint32_t id) { point(id); });
            }
            return fits(bytes, experts);
        }
    }
    return true;
}

// Everything unused is still on its way in: waits for one, it can go then. False: there is none.
bool layer_sched::wait_for_idle(bool experts, std::unique_lock<std::mutex> & lock) {
    for (uint32_t id = 0; id < blocks.size(); ++id) {
        if (is_expert(id) == experts && blocks[id].state == LOADING && !blocks[id].in_use) {
            changed.wait(lock);
            return true;
        }
    }
    return false;
}

// Reads ahead in graph order, round the end of the graph into the next one.
void layer_sched::pump() {
    if (pool == nullptr) {
        return;
    }
    const size_t n = current.order.size();
    bool full = cfg.policy == SUPERLLAMA_LAYER_POLICY_LRU; // there, what is read ahead would evict what is needed
    size_t ahead = 0;
    for (size_t k = 0; k < n; ++k) {
        const uint32_t id = current.order[(head + 1 + k) % n];
        block & b = blocks[id];
        if (b.state != ABSENT) {
            ahead += b.state == LOADING ? bytes_of(id) : 0;
            continue;
        }
        if (!b.pinned) {
            full = full || !fits(bytes_of(id), false);
            if (full) {
                continue;
            }
        }
        ahead += bytes_of(id);
        if (ahead > ((size_t) 256 << 20)) {
            break; // enough for any disk; the order stays that of need
        }
        submit(id, n_graphs * (int64_t) n + (int64_t) k);
    }
}

// --------------------------------------------------------------------------------------------------- graph

bool layer_sched::begin_graph(ggml_cgraph * gf, uint64_t graph_id, std::string * error) {
    turn.lock();
    if (!store.unchanged(error)) {
        return false;
    }
    {
        std::unique_lock<std::mutex> lock(mutex);
        n_graphs++;
        apply_budget(lock);
        if (current.id != graph_id || graph_id == 0) {
            current = layer_graph_build(store, gf, graph_id);
        }
        head = current.order.size() - 1; // the first block comes next
        pump();
    }
    for (const ggml_tensor * node : current.rows) {
        const ggml_tensor * ids = node->src[1];
        if (!store.read_rows(node->src[0], (const int32_t *) ids->data, (size_t) ggml_nelements(ids), error)) {
            return false;
        }
    }
    const auto first = current.stops.find(nullptr);
    return first == current.stops.end() || run_stop(first->second, error);
}

bool layer_sched::stops_after(const ggml_tensor * node) {
    const auto found = current.stops.find(node);
    if (found == current.stops.end()) {
        return false;
    }
    const layer_stop & s = found->second;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto stays = [this](uint32_t id) { return settled(id); };
    if (s.always || s.experts != nullptr || s.experts_done != nullptr ||
        !std::all_of(s.acquire.begin(), s.acquire.end(), stays) ||
        !std::all_of(s.release.begin(), s.release.end(), stays)) {
        return true;
    }
    // the graph runs on: what it uses must stay until the next stop tells that it got past
    for (uint32_t id : s.acquire) {
        blocks[id].in_use = true;
        blocks[id].last_use = n_graphs;
        point(id);
    }
    passed.insert(passed.end(), s.release.begin(), s.release.end());
    return false;
}

bool layer_sched::after_node(const ggml_tensor * node, std::string * error) {
    const auto found = current.stops.find(node);
    return found == current.stops.end() || run_stop(found->second, error);
}

bool layer_sched::run_stop(const layer_stop & s, std::string * error) {
    std::unique_lock<std::mutex> lock(mutex);
    for (uint32_t id : passed) {
        release(id);
    }
    passed.clear();
    for (uint32_t id : s.release) {
        release(id);
    }
    if (s.experts_done != nullptr && !release_experts(error)) {
        return false;
    }
    for (uint32_t id : s.acquire) {
        if (!acquire(id, lock, error)) {
            return false;
        }
    }
    if (s.experts != nullptr) {
        if (!acquire_experts(s, lock, error)) {
            return false;
        }
        guess_experts(s);
    }
    return true;
}

void layer_sched::release(uint32_t id) {
    block & b = blocks[id];
    if (!b.in_use) {
        return;
    }
    b.in_use = false;
    if (cfg.policy == SUPERLLAMA_LAYER_POLICY_PIN && b.state == RESIDENT && !settled(id)) {
        evict(id);
        pump();
    }
}

bool layer_sched::acquire(uint32_t id, std::unique_lock<std::mutex> & lock, std::string * error) {
    block & b = blocks[id];
    do {
        head = (head + 1) % current.order.size(); // blocks are acquired in this order
    } while (current.order[head] != id);
    b.in_use = true;
    b.last_use = n_graphs;
    if (cfg.policy == SUPERLLAMA_LAYER_POLICY_LRU) {
        touch(id);
    }
    if (b.state == RESIDENT) {
        point(id);
        return true;
    }

    const int64_t t_begin = ggml_time_us();
    // a read ahead that fails, or is called off, is tried again here
    for (int attempt = 0; b.state != RESIDENT && attempt < 3; ++attempt) {
        const bool mine = b.state == ABSENT;
        if (mine) {
            if (!b.pinned && !make_room(bytes_of(id), false, lock)) {
                *error = "no memory left for a block of " + std::to_string(bytes_of(id)) +
                         " bytes of weights; raise --mem-budget";
                return false;
            }
            submit(id, -1);
            if (pool == nullptr) {
                read_here(id, lock);
            }
        }
        changed.wait(lock, [&] { return b.state != LOADING; });
        if (mine && b.state != RESIDENT) {
            break;
        }
    }
    totals.stall_ms += (double) (ggml_time_us() - t_begin) / 1000.0;
    if (b.state != RESIDENT) {
        *error = b.error;
        b.error = "";
        return false;
    }
    point(id);
    pump();
    return true;
}

void layer_sched::end_graph() {
    {
        const std::lock_guard<std::mutex> ends(turn, std::adopt_lock); // whatever happens
        std::unique_lock<std::mutex> lock(mutex);
        // after an error, or past the last stop
        for (uint32_t id : current.order) {
            release(id);
        }
        passed.clear();
        guessed.clear();
        std::string ignored;
        release_experts(&ignored);
        apply_budget(lock);
        head = current.order.size() - 1; // the first block comes next
        pump();
    }
    apply_budget_if_idle();
}

// ------------------------------------------------------------------------------------------------- reports

layer_sched::counters layer_sched::count() const {
    const std::lock_guard<std::mutex> lock(mutex);
    counters c = totals;
    c.stall_ms += (double) store.waited_us() / 1000.0;
    c.bytes_read = (int64_t) store.bytes_read();
    c.bytes_pinned = (int64_t) pinned_used;
    c.bytes_ring = (int64_t) store.ring_memory();
    c.bytes_experts = (int64_t) store.expert_memory();
    c.bytes_resident = c.bytes_pinned + c.bytes_ring + c.bytes_experts + (int64_t) store.resident_bytes();
    if (pool != nullptr) {
        c.prefetch = pool->count();
    }
    return c;
}

std::vector<layer_sched::layer> layer_sched::layers() const {
    const std::lock_guard<std::mutex> lock(mutex);
    std::map<int32_t, layer> found;
    for (uint32_t id = 0; id < blocks.size(); ++id) {
        const block & b = blocks[id];
        layer & l = found[store.blocks()[id].layer];
        l.index = store.blocks()[id].layer;
        l.bytes += bytes_of(id);
        l.bytes_resident += b.state == RESIDENT ? bytes_of(id) : 0;
        l.streamed = l.streamed || !(b.pinned || is_expert(id));
        l.last_use = std::max(l.last_use, b.last_use);
        l.n_loads += b.n_loads;
        l.n_evictions += b.n_evictions;
    }
    std::vector<layer> result;
    for (const auto & entry : found) {
        result.push_back(entry.second);
    }
    return result;
}

} // namespace superllama
