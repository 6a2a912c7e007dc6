#include "weights/block_loader.h"

#include "llama-impl.h"

namespace superllama {

block_loader::block_loader(weight_store & store, int n_threads, size_t part_bytes) :
    store(store),
    part_bytes(part_bytes),
    blocks(store.blocks().size()) {
    if (n_threads > 0) {
        std::string why;
        pool = readers::create(n_threads, &why);
        if (pool == nullptr) {
            LLAMA_LOG_WARN("superllama: weights are not read ahead: %s\n", why.c_str());
        }
    }
}

void block_loader::set_owners(block_owner & of_dense, block_owner & of_experts) {
    dense = &of_dense;
    experts = &of_experts;
}

void block_loader::stop() {
    pool.reset();
}

// ---------------------------------------------------------------------------------------------- on the way in

// It has its memory, and nothing is there yet.
block_status & block_loader::take(uint32_t id) {
    block_status & b = blocks[id];
    b.state = block_state::reading;
    b.joined = false;
    b.error.clear();
    b.jobs.clear();
    owner_of(id).take_memory(id);
    return b;
}

void block_loader::begin(uint32_t id, int64_t priority, guard & lock) {
    block_status & b = take(id);
    const std::vector<weight_part> parts = store.parts(id, part_bytes);
    b.n_parts = (int32_t) parts.size();
    b.n_slice_parts.assign(store.blocks()[id].slices.size(), 0);
    for (const weight_part & part : parts) {
        b.n_slice_parts[part.index]++;
    }
    if (pool == nullptr) {
        b.error = read_all(id, lock);
        b.n_parts = 0;
        finish(id, lock);
        return;
    }
    size_t n_submitted = 0;
    try {
        submit(id, parts, priority, &n_submitted);
    } catch (const std::exception & e) { // no memory for the jobs: what has none counts as read, and failed
        b.error = e.what();
        b.n_parts -= (int32_t) (parts.size() - n_submitted);
        if (b.n_parts == 0) {
            finish(id, lock);
        }
    }
}

void block_loader::fill(uint32_t id, guard & lock, const std::function<void()> & write) {
    take(id);
    lock.unlock();
    write();
    lock.lock();
    finish(id, lock);
}

// Small parts together: waking a thread for each would cost more than they gain by being read at once.
void block_loader::submit(uint32_t id, const std::vector<weight_part> & parts, int64_t priority, size_t * n_submitted) {
    std::vector<readers::job_id> & jobs = blocks[id].jobs;
    std::vector<weight_part> group;
    size_t bytes = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
        group.push_back(parts[i]);
        bytes += parts[i].bytes;
        if (i + 1 == parts.size() || bytes + parts[i + 1].bytes > part_bytes) {
            jobs.reserve(jobs.size() + 1);
            jobs.push_back(pool->submit(priority, [this, id, group](bool run) { return read(id, group, run); }));
            *n_submitted = i + 1;
            group.clear();
            bytes = 0;
        }
    }
}

// In a thread of the pool. False: not all was read.
bool block_loader::read(uint32_t id, const std::vector<weight_part> & parts, bool run) {
    bool all = true;
    for (const weight_part & part : parts) {
        std::string error = "called off";
        const bool ok = run && read_part(part, &error);
        all = all && ok;

        guard lock(mutex);
        block_status & b = blocks[id];
        if (!ok && b.error.empty()) {
            b.error = error;
        }
        if (--b.n_slice_parts[part.index] == 0 && is_expert(id) && b.error.empty() && store.verified(id)) {
            store.publish(id, part.index); // kernels go on with it while others are read
        }
        if (--b.n_parts == 0) {
            finish(id, lock);
        }
    }
    return all;
}

// What is thrown, because there is no memory to read into, is an error of the read.
bool block_loader::read_part(const weight_part & part, std::string * error) {
    try {
        return store.read_part(part, error);
    } catch (const std::exception & e) {
        *error = e.what();
        return false;
    }
}

// In this thread. The error, if any.
std::string block_loader::read_all(uint32_t id, guard & lock) {
    std::string error;
    lock.unlock();
    for (const weight_part & part : store.parts(id, part_bytes)) {
        if (!read_part(part, &error)) {
            break;
        }
    }
    lock.lock();
    return error;
}

// All parts were read, or the block has its error.
void block_loader::finish(uint32_t id, guard & lock) {
    block_status & b = blocks[id];
    if (is_expert(id) && b.in_use && b.joined && !b.error.empty()) {
        b.error = read_all(id, lock);
    }
    if (b.error.empty()) {
        std::string error;
        lock.unlock();
        store.verify(id, &error);
        lock.lock();
        b.error = error;
    }
    b.state = b.error.empty() ? block_state::ready : block_state::failed;
    b.n_loads++;
    totals.loaded++;
    if (is_expert(id)) { // if it failed, kernels that wait for it go on with what is there, and the graph fails then
        for (size_t i = 0; i < store.blocks()[id].slices.size(); ++i) {
            store.publish(id, i);
        }
    }
    const bool kernels_use_it = is_expert(id) && b.in_use;
    if (b.state == block_state::failed ? !kernels_use_it : !b.in_use && !owner_of(id).may_stay(id)) {
        drop(id);
    }
    changed.notify_all();
}

void block_loader::join(uint32_t id) {
    blocks[id].joined = blocks[id].state == block_state::reading;
}

// --------------------------------------------------------------------------------------------- on the way out

void block_loader::drop(uint32_t id) {
    block_status & b = blocks[id];
    b.state = block_state::absent;
    b.n_evictions++;
    totals.evicted++;
    owner_of(id).give_memory_back(id);
}

void block_loader::wait_for(uint32_t id, guard & lock) {
    changed.wait(lock, [&] { return blocks[id].state != block_state::reading; });
}

// Who sends lets the next one wait meanwhile.
void block_loader::wait_for_sending(guard & lock) {
    n_waiting++;
    changed.wait(lock, [&] { return n_sending == 0; });
    n_waiting--;
    tell();
}

block_loader::sending::sending(block_loader & loader, const std::vector<uint32_t> & blocks, guard & lock) :
    loader(loader),
    ids(blocks),
    lock(lock) {
    for (uint32_t id : ids) {
        loader[id].sending = true;
    }
    loader.n_sending += ids.size();
    lock.unlock();
}

block_loader::sending::~sending() {
    lock.lock();
    for (uint32_t id : ids) {
        loader[id].sending = false;
    }
    loader.n_sending -= ids.size();
    loader.tell();
    loader.changed.wait(lock, [this] { return loader.n_waiting == 0; });
}

void block_loader::drop_unwanted(const std::vector<uint32_t> & ids) {
    for (uint32_t id : ids) {
        if (blocks[id].idle() && !owner_of(id).may_stay(id)) {
            drop(id);
        }
    }
}

void block_loader::promote(uint32_t id, int64_t priority) {
    if (blocks[id].state != block_state::reading) {
        return; // most that a graph wants are there, and their jobs are long done
    }
    for (readers::job_id job : blocks[id].jobs) {
        pool->promote(job, priority);
    }
}

void block_loader::call_off(const std::vector<uint32_t> & ids, guard & lock) {
    std::vector<readers::job_id> jobs;
    for (uint32_t id : ids) {
        if (blocks[id].state == block_state::reading) {
            jobs.insert(jobs.end(), blocks[id].jobs.begin(), blocks[id].jobs.end());
        }
    }
    lock.unlock(); // a cancelled job finishes its block in this thread
    for (readers::job_id job : jobs) {
        pool->cancel(job);
    }
    lock.lock();
}

} // namespace superllama
