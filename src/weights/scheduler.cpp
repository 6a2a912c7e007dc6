#include "weights/scheduler.h"

#include "ggml-backend.h"

#include <algorithm>
#include <map>

namespace superllama {

layer_sched::layer_sched(weight_store & store, const config & cfg) :
    store(store),
    send(cfg.send),
    loader(store, cfg.n_threads, cfg.part_bytes),
    dense(store, loader, cfg.policy),
    experts(store, loader, dense, cfg.n_expert_used, cfg.on_device),
    ahead(store, loader,
          { cfg.ahead, cfg.send, [this](const ggml_tensor * weights) { return experts.expected(weights); } }) {
    loader.set_owners(dense, experts);
}

layer_sched::~layer_sched() {
    ahead.stop();
    loader.stop();
}

// ------------------------------------------------------------------------------------------------- budget

weights_budget layer_sched::plan(size_t bytes, int n_ubatch) const {
    const auto lock = loader.lock();
    return plan_locked(bytes, n_ubatch);
}

// Experts of one ubatch have to be there together; dense blocks get what that leaves, and experts what those leave.
weights_budget layer_sched::plan_locked(size_t bytes, int n_ubatch) const {
    const pool_budget e = experts.plan(n_ubatch);
    const dense_budget d = dense.plan(bytes - std::min(bytes, e.least));
    weights_budget b = {};
    b.dense_bytes = d.bytes;
    b.expert_bytes = e.bytes;
    b.expert_pool_min = e.least;
    b.min_bytes = d.least + e.least;
    b.pinned_bytes = d.pinned;
    b.ring_bytes = d.ring;
    b.streamed_bytes = d.streamed;
    if (d.works && bytes >= e.least) {
        b.pool_bytes = std::min(e.bytes, bytes - d.pinned - d.ring);
    }
    return b;
}

void layer_sched::expect(const std::vector<block_use> & uses) {
    const auto lock = loader.lock();
    dense.expect(uses);
}

void layer_sched::set_budget(size_t bytes, int n_ubatch_new, bool keeps_rows_new) {
    bool less = false;
    {
        auto lock = loader.lock();
        less = bytes < bytes_planned; // else what a larger one that came meanwhile promised was never there
        bytes_max = bytes;
        n_ubatch = n_ubatch_new;
        keeps_rows = keeps_rows_new;
        budget_new = true;
        if (less) {
            shrink(lock);
        }
    }
    apply_budget_if_idle();
    if (!less) {
        grow();
    }
}

// What of a larger budget a graph that runs cannot use waits for its end.
void layer_sched::apply_budget_if_idle() {
    while (budget_new && turn.try_lock()) {
        const std::lock_guard<std::mutex> ends(turn, std::adopt_lock);
        auto lock = loader.lock();
        apply_budget(lock);
    }
}

void layer_sched::apply_plan() {
    bytes_planned = bytes_max;
    const pool_budget e = experts.plan(n_ubatch);
    size_t rest = bytes_max - std::min(bytes_max, e.least);
    dense_budget d = dense.plan(rest);
    if (const size_t rows = store.row_bytes_more()) {
        // those that are to go do so after the graph that runs, which has to go on meanwhile
        rest = std::max(rest - std::min(rest, rows), std::min(rest, d.least));
        d = dense.plan(rest);
    }
    const bool works = d.works && bytes_max >= e.least;
    experts.limit(works ? std::min(e.bytes, e.least + rest - d.pinned - d.ring) : 0, e.bytes);
    dense.apply(d);
}

// Only between graphs: nothing is in use.
void layer_sched::apply_budget(block_loader::guard & lock) {
    if (budget_new) {
        budget_new = false;
        store.keep_rows(keeps_rows);
        apply_plan();
        dense.make_room(0, lock);
        experts.make_room(lock);
    }
}

// At any time, without waiting: reads that nobody waits for are called off, and what is not in use goes.
void layer_sched::shrink(block_loader::guard & lock) {
    apply_plan();
    std::vector<uint32_t> passing;
    for (uint32_t id = 0; id < loader.size(); ++id) {
        if (loader.is_expert(id) ? experts.is_passing(id) : dense.is_passing(id)) {
            passing.push_back(id);
        }
    }
    loader.call_off(passing, lock);
    dense.make_room_now();
    experts.make_room_now();
}

// While a graph runs. Experts and the ring keep what they have, so that all of it stays under the new budget.
void layer_sched::grow() {
    const auto lock = loader.lock();
    if (!budget_new || bytes_max <= bytes_planned || !experts.is_within_limit()) {
        return; // the graph has ended, or has to give back still
    }
    const size_t planned = plan_locked(bytes_max, n_ubatch).pinned_bytes;
    const size_t more = std::min(bytes_max - bytes_planned, planned - std::min(planned, dense.pinned_limit()));
    bytes_planned += more - dense.pin_more(more);
}

// ------------------------------------------------------------------------------------------------- moving

// Whether this block's bytes are no longer needed in a place of its own on the host. No graph runs.
void layer_sched::set_elsewhere(uint32_t id, bool elsewhere, block_loader::guard & lock) {
    loader[id].elsewhere = elsewhere;
    loader.wait_for(id, lock);
    loader[id].in_use = false;
    if (elsewhere && loader[id].state == block_state::ready) {
        loader.drop(id);
    }
}

bool layer_sched::none_here(uint32_t id) const {
    const auto & slices = store.blocks()[id].slices;
    return std::none_of(slices.begin(), slices.end(),
                        [this](const weight_slice & s) { return store.is_here(s.tensor); });
}

void layer_sched::layer_on_paper(int32_t layer) {
    const auto lock = loader.lock();
    for (uint32_t id = 0; id < loader.size(); ++id) {
        if (store.blocks()[id].layer == layer) {
            loader[id].elsewhere = none_here(id);
        }
    }
}

void layer_sched::layer_moved(int32_t layer) {
    const std::lock_guard<std::mutex> no_graph(turn);
    auto lock = loader.lock();
    for (uint32_t id = 0; id < loader.size(); ++id) {
        if (store.blocks()[id].layer != layer) {
            continue;
        }
        set_elsewhere(id, none_here(id), lock);
    }
    current = layer_graph();
    dense.forget();
    budget_new = true;
    apply_budget(lock);
}

void layer_sched::hold_whole(const ggml_tensor * t) {
    const std::lock_guard<std::mutex> no_graph(turn);
    auto lock = loader.lock();
    current = layer_graph();
    dense.forget();
    for (uint32_t id : store.pieces_of(t)) {
        set_elsewhere(id, true, lock);
    }
    store.hold_whole(t);
}

std::vector<const uint8_t *> layer_sched::keep(const ggml_tensor * t) {
    const auto lock = loader.lock();
    std::vector<uint32_t> ids;
    std::vector<const uint8_t *> shares;
    for (int32_t e = 0; e < std::max(1, store.n_experts(t)); ++e) {
        const int32_t id = store.block_of(t, e);
        if (id < 0 || loader[(uint32_t) id].state != block_state::ready || store.in_ring((uint32_t) id)) {
            return {};
        }
        shares.push_back(store.data((uint32_t) id, store.slice_of((uint32_t) id, t)));
        ids.push_back((uint32_t) id);
    }
    for (uint32_t id : ids) {
        loader[id].in_use = true;
    }
    return shares;
}

// --------------------------------------------------------------------------------------------------- graph

bool layer_sched::begin_graph(ggml_cgraph * gf, uint64_t graph_id, std::string * error) {
    turn.lock();
    if (!store.unchanged(error)) {
        return false;
    }
    {
        auto lock = loader.lock();
        n_graphs++;
        apply_budget(lock);
        if (current.id != graph_id || graph_id == 0) {
            dense.forget();
            current = layer_graph_build(store, gf, graph_id);
        }
        experts.begin(n_graphs);
        runs_through = experts.hold_all(current);
        dense.begin(current, n_graphs);
        for (auto & entry : current.in_pieces) {
            entry.second = dense.acquire_if_there(store.pieces_of(entry.first));
            store.point_to_pieces(entry.first, entry.second);
        }
        stops_nowhere = runs_through && acquire_all();
    }
    if (loader.reads_ahead()) {
        ahead.begin(current);
    }
    for (const ggml_tensor * node : current.rows) {
        const ggml_tensor * ids = node->src[1];
        const auto in_pieces = current.in_pieces.find(node->src[0]);
        if (in_pieces != current.in_pieces.end() && in_pieces->second) {
            continue; // all are there
        }
        if (!store.read_rows(node->src[0], (const int32_t *) ids->data, (size_t) ggml_nelements(ids), error)) {
            return false;
        }
    }
    const auto first = current.stops.find(nullptr);
    return stops_nowhere || first == current.stops.end() || run_stop(first->second, error);
}

// False: something has to be waited for, or to be given back.
bool layer_sched::acquire_if_there(const layer_stop & s) {
    return std::all_of(s.release.begin(), s.release.end(), [this](uint32_t id) { return dense.settled(id); }) &&
           dense.acquire_if_there(s.acquire);
}

bool layer_sched::acquire_all() {
    return std::all_of(current.stops.begin(), current.stops.end(), [this](const auto & entry) {
        return pieces_of(entry.second) == nullptr && acquire_if_there(entry.second);
    });
}

bool layer_sched::stops_after(const ggml_tensor * node) {
    const auto found = current.stops.find(node);
    if (found == current.stops.end()) {
        return false;
    }
    const layer_stop & s = found->second;
    if (pieces_of(s) != nullptr) {
        return true;
    }
    const auto lock = loader.lock();
    const bool stops = s.always || s.experts != nullptr || s.experts_done != nullptr;
    if ((stops && !runs_through) || !acquire_if_there(s)) {
        return true;
    }
    // the graph runs on: what it uses must stay until the next stop tells that it got past
    passed.insert(passed.end(), s.release.begin(), s.release.end());
    return false;
}

bool layer_sched::after_node(const ggml_tensor * node, std::string * error) {
    const auto found = current.stops.find(node);
    return found == current.stops.end() || run_stop(found->second, error);
}

bool layer_sched::run_stop(const layer_stop & s, std::string * error) {
    auto lock = loader.lock();
    for (uint32_t id : passed) {
        dense.release(id);
    }
    passed.clear();
    for (uint32_t id : s.release) {
        dense.release(id);
    }
    if (s.experts_done != nullptr && !runs_through && !experts.release(error)) {
        return false;
    }
    for (uint32_t id : s.acquire) {
        if (!dense.acquire(id, lock, error)) {
            return false;
        }
    }
    if (s.experts != nullptr && !runs_through) {
        if (!experts.acquire(s, lock, error)) {
            return false;
        }
        experts.guess(s);
    }
    return true;
}

// Null where all of them are there, and stay.
const std::vector<uint32_t> * layer_sched::pieces_of(const layer_stop & s) const {
    return s.in_pieces != nullptr && !current.in_pieces.at(s.in_pieces) ? &store.pieces_of(s.in_pieces) : nullptr;
}

const std::vector<uint32_t> * layer_sched::pieces_of(const ggml_tensor * node) const {
    const auto found = current.stops.find(node);
    return found != current.stops.end() ? pieces_of(found->second) : nullptr;
}

bool layer_sched::acquire_piece(uint32_t id, weight_piece * piece, std::string * error) {
    auto lock = loader.lock();
    if (!dense.acquire(id, lock, error)) {
        return false;
    }
    const weight_block & b = store.blocks()[id];
    const ggml_tensor * t = b.slices.front().tensor;
    const size_t row = ggml_row_size(t->type, t->ne[0]);
    *piece = { b.first_row, (int64_t) (b.slices.front().bytes / row), store.data(id, 0),
               store.memory_of_first(t, row * (size_t) group_rows) };
    return true;
}

void layer_sched::release_piece(uint32_t id) {
    const auto lock = loader.lock();
    dense.release(id);
}

bool layer_sched::before_copy(ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * to, bool * copied,
                              std::string * error) {
    const ggml_tensor * t = src->view_src != nullptr ? src->view_src : src;
    *copied = false;
    if (!store.is_here(t)) {
        return true;
    }
    if (store.n_experts(t) == 0 && store.block_of(t) < 0) {
        return true; // as usual
    }
    auto lock = loader.lock();
    const std::optional<sent_ahead::arrived> there = ahead.take(to, lock);
    const sent_ahead::arrived * at = there ? &*there : nullptr;
    *copied = store.n_experts(t) > 0 ? experts.copy(backend, t, to, at, lock, error)
                                     : copy_dense((uint32_t) store.block_of(t), src, to, at, lock, error);
    if (there) {
        ahead.go_on();
    }
    return *copied;
}

bool layer_sched::copy_dense(uint32_t id, const ggml_tensor * src, ggml_tensor * to, const sent_ahead::arrived * there,
                             block_loader::guard & lock, std::string * error) {
    if (there != nullptr) {
        lock.unlock();
        ggml_backend_tensor_copy(&there->at, to);
        lock.lock();
        dense_ahead += (int64_t) ggml_nbytes(to);
        return true;
    }
    const bool acquired = loader[id].in_use; // by a stop
    if (!acquired && !dense.fetch(id, lock, error)) {
        return false;
    }
    const ggml_tensor * t = src->view_src != nullptr ? src->view_src : src;
    const uint8_t * data = store.data(id, store.slice_of(id, t)) + src->view_offs;
    lock.unlock();
    send(to, data, ggml_nbytes(to));
    lock.lock();
    if (!acquired) {
        dense.release(id);
    }
    return true;
}

bool layer_sched::send_experts(const expert_request & r, std::string * error) {
    auto lock = loader.lock();
    return experts.send(r, lock, error);
}

void layer_sched::send_guessed(const guessed_experts & g) {
    auto lock = loader.lock();
    experts.send_guessed(g, lock);
}

void layer_sched::end_graph() {
    {
        const std::lock_guard<std::mutex> ends(turn, std::adopt_lock); // whatever happens
        ahead.end();
        auto lock = loader.lock();
        for (uint32_t id : current.order) { // after an error, or past the last stop
            dense.release(id);
        }
        for (auto & entry : current.in_pieces) {
            for (uint32_t id : store.pieces_of(entry.first)) {
                dense.release(id);
            }
            entry.second = false;
        }
        passed.clear();
        experts.end();
        apply_budget(lock);
        dense.end();
    }
    apply_budget_if_idle();
}

// ------------------------------------------------------------------------------------------------- reports

layer_sched::counters layer_sched::count() const {
    const auto lock = loader.lock();
    const block_loader::counters blocks = loader.count();
    const expert_pool::counters e = experts.count();
    counters c = {};
    c.blocks_loaded = blocks.loaded;
    c.blocks_evicted = blocks.evicted;
    c.bytes_read = (int64_t) store.bytes_read();
    c.bytes_pinned = (int64_t) dense.pinned_bytes();
    c.bytes_ring = (int64_t) store.ring_memory();
    c.bytes_experts = (int64_t) store.expert_memory();
    c.bytes_resident = c.bytes_pinned + c.bytes_ring + c.bytes_experts + (int64_t) store.resident_bytes();
    c.expert_hits = e.hits;
    c.expert_misses = e.misses;
    c.expert_guesses = e.guesses;
    c.expert_guesses_used = e.guesses_used;
    c.stall_ms = dense.stall_ms() + e.stall_ms + (double) store.waited_us() / 1000.0;
    c.bytes_ahead = dense_ahead + e.ahead_bytes;
    c.prefetch = loader.count_jobs();
    return c;
}

std::vector<layer_sched::layer> layer_sched::layers() const {
    const auto lock = loader.lock();
    std::map<int32_t, layer> found;
    for (uint32_t id = 0; id < loader.size(); ++id) {
        const block_status & b = loader[id];
        layer & l = found[store.blocks()[id].layer];
        l.index = store.blocks()[id].layer;
        l.bytes += loader.bytes_of(id);
        l.bytes_resident += b.state == block_state::ready ? loader.bytes_of(id) : 0;
        l.streamed = l.streamed || !(loader.is_expert(id) || dense.is_pinned(id));
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

std::vector<layer_sched::expert> layer_sched::experts_by_layer() const {
    std::vector<expert> found;
    const auto lock = loader.lock();
    for (uint32_t id = 0; id < loader.size(); ++id) {
        if (loader.is_expert(id)) {
            const weight_block & b = store.blocks()[id];
            found.push_back({ b.slices.front().tensor, b.layer, b.expert, loader.bytes_of(id),
                              loader[id].state == block_state::ready, loader[id].elsewhere, experts.heat_of(id),
                              loader[id].n_loads });
        }
    }
    std::sort(found.begin(), found.end(), [](const expert & a, const expert & b) {
        return std::make_pair(a.layer, a.index) < std::make_pair(b.layer, b.index);
    });
    return found;
}

} // namespace superllama
