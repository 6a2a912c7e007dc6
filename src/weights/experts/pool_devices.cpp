// What the pool has to do with devices: experts that go there, in a bank or for one large batch.

#include "weights/experts/pool.h"

#include "weights/experts/view.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>

namespace superllama {

// What a device has is the first to leave the host, so that both together hold as many as they can.
bool expert_pool::send(const expert_request & r, block_loader::guard & lock, std::string * error) {
    std::set<uint32_t> all, wanted, sent;
    for (int32_t e : r.chosen) {
        const auto id = (uint32_t) store.block_of(r.weights, e);
        heats[id].uses++;
        loader[id].last_use = n_graphs;
        all.insert(id);
    }
    for (int32_t e : r.missing) {
        sent.insert((uint32_t) store.block_of(r.weights, e));
    }
    wanted = sent;
    for (int32_t e : r.staying) {
        wanted.insert((uint32_t) store.block_of(r.weights, e));
    }
    totals.hits += (int64_t) (all.size() - wanted.size());
    std::set<uint32_t> not_there = wanted; // a moment ago
    for (int32_t e : r.guessed) {
        not_there.insert((uint32_t) store.block_of(r.weights, e));
    }
    settle_guess(store.blocks()[(uint32_t) store.block_of(r.weights, 0)].layer, not_there, lock);
    bool ok = want(wanted, true, lock, error);
    if (ok) {
        keep_leaving(r, lock);
    }
    const int64_t t_begin = ggml_time_us();
    for (uint32_t id : sent) {
        if (ok) {
            loader.wait_for(id, lock);
        }
        if (!ok || loader[id].state != block_state::ready) {
            ok = false;
            break; // release() says why
        }
        lock.unlock(); // it is in use: it stays
        r.send(store.blocks()[id].expert,
               [&](const ggml_tensor * weights) { return store.data(id, store.slice_of(id, weights)); });
        lock.lock();
    }
    totals.stall_ms += (double) (ggml_time_us() - t_begin) / 1000.0;
    lock.unlock();
    if (ok && !r.staying.empty()) {
        ok = r.compute(error);
    }
    r.finish();
    lock.lock();
    asked_known = asked_known && r.staying.empty(); // kernels asked for these, and they are counted here
    for (int32_t e : r.guessed) {
        const auto id = (uint32_t) store.block_of(r.weights, e);
        if (loader[id].state == block_state::ready) {
            sent.insert(id);
        }
    }
    for (uint32_t id : sent) {
        if (ok && bytes_max < n_here) {
            used.add_cold(id);
        }
    }
    ok = release(error) && ok;
    if (ok && r.guess != nullptr && loader.reads_ahead() && n_used < n_here) {
        guess_on_device(r, lock);
    }
    return ok;
}

namespace {

struct waiting { // whatever happens meanwhile
    const guessed_experts & g;
    ~waiting() { g.finish(); }
};

} // namespace

// A guess that comes from memory which a device reads badly would take the host's time.
void expert_pool::send_guessed(const guessed_experts & g, block_loader::guard & lock) {
    const auto on_host = [&](int32_t e) {
        return loader[(uint32_t) store.block_of(g.weights, e)].state == block_state::ready;
    };
    std::vector<uint32_t> ids;
    for (int32_t e : g.experts) {
        if (store.is_locked(g.weights) && on_host(e) && g.find_slot(e, on_host)) {
            ids.push_back((uint32_t) store.block_of(g.weights, e));
        }
    }
    {
        const block_loader::sending stay(loader, ids, lock);
        const waiting until_there{ g };
        for (uint32_t id : ids) {
            g.send(store.blocks()[id].expert,
                   [&](const ggml_tensor * weights) { return store.data(id, store.slice_of(id, weights)); });
        }
    }
    loader.drop_unwanted(ids);
}

// They are read while the device computes this layer.
void expert_pool::guess_on_device(const expert_request & r, block_loader::guard & lock) {
    lock.unlock();
    const std::vector<int32_t> experts = r.guess();
    lock.lock();
    if (!experts.empty()) {
        read_guessed(r.next_weights, experts, 0);
    }
}

// They are read from the device sooner than from the disk.
void expert_pool::keep_leaving(const expert_request & r, block_loader::guard & lock) {
    for (int32_t e : r.leaving) {
        const auto id = (uint32_t) store.block_of(r.weights, e);
        if (loader[id].state != block_state::absent || !make_frame(id)) {
            continue;
        }
        loader.fill(id, lock, [&] {
            for (const weight_slice & s : store.blocks()[id].slices) {
                r.fetch(e, s.tensor, store.place_of(id, s));
            }
        });
        if (loader[id].state == block_state::ready) { // else a smaller budget came meanwhile
            used.touch(id);
        }
    }
}

std::vector<uint32_t> expert_pool::expected(const ggml_tensor * weights) const {
    std::vector<uint32_t> ids;
    const int32_t layer = store.blocks()[(size_t) store.block_of(weights, 0)].layer;
    const auto last = last_batch.find(layer);
    for (int32_t e = 0; e < store.n_experts(weights); ++e) {
        const auto id = (uint32_t) store.block_of(weights, e);
        if ((last == last_batch.end() || last->second.count(id) > 0) && !on_device.has(weights, e)) {
            ids.push_back(id);
        }
    }
    return ids;
}

static void copy_experts(ggml_backend_t backend, const ggml_tensor & from, ggml_tensor * to, int32_t first,
                         int32_t last) {
    const ggml_tensor src = experts_in(from, first, last - first);
    ggml_tensor dst = experts_in(*to, first, last - first);
    ggml_backend_tensor_copy_async(backend, backend, &src, &dst);
}

// For a device that computes a large batch with them. Experts that nobody chose are not read there, but a kernel may
// read a little past the end of one: no number that it finds there may be none.
bool expert_pool::copy(ggml_backend_t backend, const ggml_tensor * weights, ggml_tensor * to,
                       const sent_ahead::arrived * ahead, block_loader::guard & lock, std::string * error) {
    const size_t bytes = weights->nb[2];
    const std::vector<uint8_t> zeros(std::min<size_t>(bytes, 512));
    const int32_t n = store.n_experts(weights);
    int32_t first = -1; // of neighbours that were sent ahead: they are copied together
    const auto copy_neighbours = [&](int32_t end) {
        if (first >= 0) {
            copy_experts(backend, ahead->at, to, first, end);
            totals.ahead_bytes += (int64_t) ((size_t) (end - first) * bytes);
        }
        first = -1;
    };
    bool follows = false; // the expert before was copied
    for (int32_t e = 0; e < n; ++e) {
        const auto id = (uint32_t) store.block_of(weights, e);
        const bool is_there = from_device.count(id) > 0;
        const bool is_wanted = is_there || loader[id].in_use;
        if (is_wanted && !is_there && ahead != nullptr && ahead->experts[(size_t) e]) {
            first = first < 0 ? e : first;
            follows = true;
            continue;
        }
        copy_neighbours(e);
        if (is_there) {
            on_device.copy(backend, weights, e, to);
        } else if (is_wanted) {
            loader.wait_for(id, lock);
            if (loader[id].state != block_state::ready) {
                *error = loader[id].error;
                ggml_backend_synchronize(backend);
                return false;
            }
            const uint8_t * data = store.data(id, store.slice_of(id, weights));
            lock.unlock(); // it is in use: it stays
            ggml_backend_tensor_set_async(backend, to, data, (size_t) e * bytes, bytes);
            lock.lock();
        } else if (follows) {
            ggml_backend_tensor_set_async(backend, to, zeros.data(), (size_t) e * bytes, zeros.size());
        }
        follows = is_wanted;
    }
    copy_neighbours(n);
    lock.unlock();
    ggml_backend_synchronize(backend);
    lock.lock();
    on_device.keep(weights, to, most_chosen, bytes_max >= n_here);
    return true;
}

} // namespace superllama
