#include "llama-kv-pages.h"

#include "llama-kv-memory.h"
#include "llama-prefetch.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cstring>

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static std::string in_mib(uint64_t bytes) {
    char text[32];
    snprintf(text, sizeof(text), "%.1f MiB", (double) bytes / (1024.0 * 1024.0));
    return text;
}

// Counts the time that the context's thread spends here.
struct stall_timer {
    std::atomic<int64_t> & us;
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();

    explicit stall_timer(std::atomic<int64_t> & us) : us(us) {}
    ~stall_timer() {
        us += std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
    }
};

// What an operation works on stays while it makes room.
struct llama_kv_pages::pin_guard {
    llama_kv_pages & owner;
    const std::vector<page_id> & list;
    std::vector<uint64_t> before;

    pin_guard(llama_kv_pages & owner, const std::vector<page_id> & list) : owner(owner), list(list) {
        for (page_id p : list) {
            before.push_back(owner.pages[p].pinned);
            owner.pin(p);
        }
    }
    ~pin_guard() {
        for (size_t i = 0; i < list.size(); ++i) {
            owner.pages[list[i]].pinned = before[i];
        }
    }
};

// ---------------------------------------------------------------------------------------------- geometry

static const size_t bounce_max = 1024 * 1024;

static size_t slice_bytes(const llama_kv_geometry & g, uint32_t layer) {
    size_t size = 0;
    for (const llama_kv_rows & rows : g.layers[layer]) {
        size += rows.row_bytes * g.page_cells;
    }
    return round_up(size, llama_kv_spill::alignment);
}

size_t llama_kv_pages::record_bytes(const llama_kv_geometry & g) {
    size_t size = 0;
    for (uint32_t il = 0; il < g.layers.size(); ++il) {
        size += slice_bytes(g, il);
    }
    return size;
}

size_t llama_kv_pages::bounce_bytes(const llama_kv_geometry & g) {
    return std::min(bounce_max, record_bytes(g));
}

llama_kv_pages::llama_kv_pages(llama_kv_geometry geometry_, uint64_t budget, std::unique_ptr<llama_kv_spill> spill,
                               llama_prefetcher * pool, inspect_fn inspect) :
    geometry(std::move(geometry_)),
    budget(budget),
    spill(std::move(spill)),
    pool(pool),
    inspect(std::move(inspect)),
    os_page(llama_kv_system_page()),
    n_per_stream((geometry.n_cells + geometry.page_cells - 1) / geometry.page_cells) {
    layer_begin.push_back(0);
    for (uint32_t il = 0; il < n_layers(); ++il) {
        layer_begin.push_back(layer_begin.back() + slice_bytes(geometry, il));
        uint64_t charge = 0;
        for (size_t i = 0; i < geometry.layers[il].size(); ++i) {
            const llama_kv_rows & rows = geometry.layers[il][i];
            const size_t size = rows.row_bytes * geometry.page_cells;
            const bool aligned = size % os_page == 0 && (rows.row_bytes * geometry.n_cells) % os_page == 0;
            charge += aligned ? size : round_up(size, os_page) + os_page;
            by_address.push_back({ rows.base, { il, i } });
        }
        charges.push_back(charge);
        sum_charge += charge;
    }
    std::sort(by_address.begin(), by_address.end());
    pages.resize((size_t) geometry.n_streams * n_per_stream);
    states.resize(pages.size() * n_layers());
}

llama_kv_pages::~llama_kv_pages() {
    std::string error;
    while (!jobs.empty()) {
        finish(jobs.back(), &error);
    }
}

uint64_t llama_kv_pages::layer_charge_max() const {
    return *std::max_element(charges.begin(), charges.end());
}

uint32_t llama_kv_pages::n_cells_of(page_id p) const {
    return std::min(geometry.page_cells, geometry.n_cells - first_cell(p));
}

void llama_kv_pages::span_of(page_id p, uint32_t layer, size_t span, uint8_t ** at, size_t * size) const {
    const llama_kv_rows & rows = geometry.layers[layer][span];
    *at = rows.base + ((size_t) stream_of(p) * geometry.n_cells + first_cell(p)) * rows.row_bytes;
    *size = n_cells_of(p) * rows.row_bytes;
}

// ------------------------------------------------------------------------------------------------ states

void llama_kv_pages::set_flags(page_id id, uint32_t layer, uint8_t value) {
    uint8_t & state = states[(size_t) id * n_layers() + layer];
    page & p = pages[id];
    const bool was_resident = p.n_resident > 0, was_disk = p.n_resident == 0 && p.n_disk > 0;

    const auto count = [&](uint8_t s, int sign) {
        p.n_resident += (s & RESIDENT) ? sign : 0;
        p.n_loading += (s & LOADING) ? sign : 0;
        p.n_disk += (s & SAVED) && !(s & RESIDENT) ? sign : 0;
        resident += (s & RESIDENT) ? (uint64_t) ((int64_t) charges[layer] * sign) : 0;
    };
    count(state, -1);
    count(value, +1);
    state = value;

    counters.pages_cpu += (p.n_resident > 0) - was_resident;
    counters.pages_disk += (p.n_resident == 0 && p.n_disk > 0) - was_disk;
    counters.resident_bytes = (int64_t) resident;
    if ((int64_t) resident > counters.resident_peak_bytes) {
        counters.resident_peak_bytes = (int64_t) resident;
    }
}

// Gives the memory of a slice back. A page of the system that it shares with neighbours goes with the last of them;
// until then the slice's part of it is zero where the slice is empty.
void llama_kv_pages::release(page_id p, uint32_t layer) {
    for (size_t i = 0; i < geometry.layers[layer].size(); ++i) {
        uint8_t * at = nullptr;
        size_t size = 0;
        span_of(p, layer, i, &at, &size);
        uintptr_t begin = (uintptr_t) at, end = begin + size;

        const uintptr_t floor = begin / os_page * os_page;
        const uintptr_t ceil = (end + os_page - 1) / os_page * os_page;
        const auto free_between = [&](page_id q, int step, uintptr_t from, uintptr_t to) {
            for (q += (page_id) step; q < n_pages(); q += (page_id) step) {
                span_of(q, layer, i, &at, &size);
                if ((uintptr_t) at >= to || (uintptr_t) at + size <= from) {
                    return true;
                }
                if (flags(q, layer) & RESIDENT) {
                    return false;
                }
            }
            return true;
        };
        begin = free_between(p, -1, floor, begin) ? floor : floor + os_page;
        end = free_between(p, +1, end, ceil) ? ceil : ceil - os_page;
        if (begin < end) {
            llama_kv_discard((uint8_t *) begin, end - begin);
        } else {
            begin = end = ceil;
        }
        if (flags(p, layer) == 0) {
            span_of(p, layer, i, &at, &size);
            const uintptr_t first = (uintptr_t) at, last = first + size;
            memset(at, 0, first < begin ? std::min(begin, last) - first : 0);
            memset((uint8_t *) end, 0, end < last ? last - end : 0);
        }
    }
}

void llama_kv_pages::free_record(page_id p) {
    if (pages[p].record >= 0) {
        spill->release(pages[p].record);
        pages[p].record = -1;
    }
}

void llama_kv_pages::drop(page_id p) {
    std::string error;
    wait_for(p, &error);
    counters.prefetched_wasted += pages[p].ahead;
    pages[p].ahead = false;
    for (uint32_t il = 0; il < n_layers(); ++il) {
        set_flags(p, il, 0);
    }
    for (uint32_t il = 0; il < n_layers(); ++il) {
        release(p, il);
    }
    free_record(p);
}

void llama_kv_pages::clear() {
    for (page_id p = 0; p < n_pages(); ++p) {
        if (!is_empty(p)) {
            drop(p);
        }
    }
    spill->clear();
}

void llama_kv_pages::scrub(page_id p) {
    for (uint32_t il = 0; il < n_layers(); ++il) {
        if (!(flags(p, il) & RESIDENT)) {
            release(p, il);
        }
    }
}

void llama_kv_pages::for_each_evicted(const std::function<void(uint8_t *, size_t)> & visit) const {
    for (page_id p = 0; p < n_pages(); ++p) {
        for (uint32_t il = 0; il < n_layers(); ++il) {
            for (size_t i = 0; flags(p, il) == SAVED && i < geometry.layers[il].size(); ++i) {
                uint8_t * at = nullptr;
                size_t size = 0;
                span_of(p, il, i, &at, &size);
                visit(at, size);
            }
        }
    }
}

// --------------------------------------------------------------------------------------------- transfers

struct aligned_buffer {
    std::unique_ptr<uint8_t[]> memory;
    uint8_t * data;

    explicit aligned_buffer(size_t size) : memory(new uint8_t[size + llama_kv_spill::alignment]) {
        data = (uint8_t *) round_up((size_t) memory.get(), llama_kv_spill::alignment);
    }
};

// Bytes [begin, end) of a page's record, between memory and a buffer.
void llama_kv_pages::copy_record(page_id p, size_t begin, size_t end, uint8_t * buffer, bool to_memory) const {
    const auto first = std::upper_bound(layer_begin.begin(), layer_begin.end(), begin) - layer_begin.begin() - 1;
    for (uint32_t il = (uint32_t) first; il < n_layers() && layer_begin[il] < end; ++il) {
        size_t offset = layer_begin[il];
        for (size_t i = 0; i < geometry.layers[il].size(); ++i) {
            uint8_t * at = nullptr;
            size_t size = 0;
            span_of(p, il, i, &at, &size);
            const size_t from = std::max(begin, offset), to = std::min(end, offset + size);
            if (from < to && to_memory) {
                memcpy(at + (from - offset), buffer + (from - begin), to - from);
            } else if (from < to) {
                memcpy(buffer + (from - begin), at + (from - offset), to - from);
            }
            offset += size;
        }
    }
}

bool llama_kv_pages::read_slice(const slice & s, std::string * error) const {
    const size_t begin = layer_begin[s.first], end = layer_begin[s.last + 1];
    const size_t chunk = std::min(bounce_max, end - begin);
    const aligned_buffer buffer(chunk);
    for (size_t at = begin; at < end; at += chunk) {
        const size_t size = std::min(chunk, end - at);
        if (!spill->read(s.record, at, buffer.data, size, error)) {
            return false;
        }
        copy_record(s.p, at, at + size, buffer.data, true);
        counters.bytes_read += (int64_t) size;
    }
    return true;
}

bool llama_kv_pages::write_slices(page_id p, uint32_t first, uint32_t last, std::string * error) {
    const size_t begin = layer_begin[first], end = layer_begin[last + 1];
    const size_t chunk = std::min(bounce_max, end - begin);
    const aligned_buffer buffer(chunk);
    memset(buffer.data, 0, chunk); // what lies between slices is written too
    for (size_t at = begin; at < end; at += chunk) {
        const size_t size = std::min(chunk, end - at);
        copy_record(p, at, at + size, buffer.data, false);
        if (!spill->write(pages[p].record, at, buffer.data, size, error)) {
            return false;
        }
        counters.bytes_written += (int64_t) size;
    }
    return true;
}

// Writes what is dirty of the layers [first, last].
bool llama_kv_pages::save(page_id p, uint32_t first, uint32_t last, std::string * error) {
    for (uint32_t il = first; il <= last; ++il) {
        if ((flags(p, il) & (RESIDENT | SAVED)) != RESIDENT) {
            continue;
        }
        uint32_t end = il;
        while (end < last && (flags(p, end + 1) & (RESIDENT | SAVED)) == RESIDENT) {
            end++;
        }
        if (pages[p].record < 0) {
            pages[p].record = spill->acquire();
        }
        if (!write_slices(p, il, end, error)) {
            return false;
        }
        for (; il <= end; ++il) {
            set_flags(p, il, flags(p, il) | SAVED);
        }
    }
    return true;
}

bool llama_kv_pages::evict(page_id p, std::string * error) {
    if (pages[p].n_resident == 0) {
        return true;
    }
    if (!inspect(p).live) {
        drop(p);
        counters.dropped++;
        return true;
    }
    std::string ignored;
    wait_for(p, &ignored);
    const stall_timer timer(counters.stall_us);
    const int64_t written = counters.bytes_written;
    if (!save(p, 0, n_layers() - 1, error)) {
        return false;
    }
    (counters.bytes_written > written ? counters.evicted_dirty : counters.evicted_clean)++;
    counters.prefetched_wasted += pages[p].ahead;
    pages[p].ahead = false;
    for (uint32_t il = 0; il < n_layers(); ++il) {
        if (flags(p, il) & RESIDENT) {
            set_flags(p, il, SAVED);
            release(p, il);
        }
    }
    return true;
}

bool llama_kv_pages::evict_layer(const std::vector<page_id> & list, uint32_t layer, std::string * error) {
    const stall_timer timer(counters.stall_us);
    for (page_id p : list) {
        if (!(flags(p, layer) & RESIDENT)) {
            continue;
        }
        std::string ignored;
        wait_for(p, &ignored);
        if (!(flags(p, layer) & RESIDENT)) {
            continue; // it could not be read ahead
        }
        if (!save(p, layer, layer, error)) {
            return false;
        }
        set_flags(p, layer, SAVED);
        release(p, layer);
    }
    return true;
}

bool llama_kv_pages::make_room(uint64_t bytes, std::string * error) {
    if (resident + bytes <= budget) {
        return true;
    }
    struct candidate {
        usage use;
        page_id p;
    };
    std::vector<candidate> order;
    for (page_id p = 0; p < n_pages(); ++p) {
        if (pages[p].n_resident > 0 && pages[p].pinned != pin_epoch) {
            order.push_back({ inspect(p), p });
        }
    }
    std::sort(order.begin(), order.end(), [](const candidate & a, const candidate & b) {
        if (a.use.live != b.use.live) {
            return !a.use.live;
        }
        return a.use.last_used != b.use.last_used ? a.use.last_used < b.use.last_used : a.p < b.p;
    });
    for (const candidate & c : order) {
        if (resident + bytes <= budget) {
            return true;
        }
        if (!evict(c.p, error)) {
            return false;
        }
    }
    if (resident + bytes <= budget) {
        return true;
    }
    *error = "KV pages need " + in_mib(resident + bytes) + " of memory at once, --kv-budget allows " + in_mib(budget) +
             "; raise it";
    return false;
}

// -------------------------------------------------------------------------------------------------- reads

struct llama_kv_pages::read_job {
    std::vector<slice> slices;
    uint64_t id = 0;

    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    bool ok = false;
    bool cancelled = false;
    std::string error;
};

std::vector<llama_kv_pages::slice> llama_kv_pages::on_disk_slices(page_id p, uint32_t first, uint32_t last) const {
    std::vector<slice> list;
    for (uint32_t il = first; pages[p].n_disk > 0 && il <= last; ++il) {
        if (flags(p, il) != SAVED) {
            continue;
        }
        if (!list.empty() && list.back().last + 1 == il) {
            list.back().last = il;
        } else {
            list.push_back({ p, il, il, pages[p].record });
        }
    }
    return list;
}

// The caller has made room. The slices count as resident from now on.
std::shared_ptr<llama_kv_pages::read_job> llama_kv_pages::start(std::vector<slice> slices) {
    auto job = std::make_shared<read_job>();
    job->slices = std::move(slices);
    jobs.push_back(job);
    for (const slice & s : job->slices) {
        for (uint32_t il = s.first; il <= s.last; ++il) {
            set_flags(s.p, il, RESIDENT | SAVED | LOADING);
        }
    }
    const auto work = [this, job](bool run) {
        std::string error;
        bool ok = run;
        try {
            for (size_t i = 0; ok && i < job->slices.size(); ++i) {
                ok = read_slice(job->slices[i], &error);
            }
        } catch (const std::exception & e) {
            ok = false;
            error = e.what();
        }
        const std::lock_guard<std::mutex> lock(job->mutex);
        job->done = true;
        job->ok = ok;
        job->cancelled = !run;
        job->error = error;
        job->changed.notify_all();
        return ok;
    };
    if (pool != nullptr) {
        job->id = pool->submit(0, work);
    } else {
        work(true);
    }
    return job;
}

bool llama_kv_pages::finish(const std::shared_ptr<read_job> & job_, std::string * error) {
    const std::shared_ptr<read_job> job = job_; // the list below may hold the last reference
    {
        std::unique_lock<std::mutex> lock(job->mutex);
        if (!job->done && pool != nullptr) {
            lock.unlock();
            pool->promote(job->id, -1);
            lock.lock();
        }
        job->changed.wait(lock, [&] { return job->done; });
    }
    jobs.erase(std::find(jobs.begin(), jobs.end(), job));
    for (const slice & s : job->slices) {
        for (uint32_t il = s.first; il <= s.last; ++il) {
            set_flags(s.p, il, job->ok ? RESIDENT | SAVED : SAVED);
        }
    }
    for (const slice & s : job->slices) {
        for (uint32_t il = s.first; !job->ok && il <= s.last; ++il) {
            release(s.p, il);
        }
    }
    if (!job->ok) {
        *error = job->error.empty() ? "reading ahead was stopped" : job->error;
    }
    return job->ok;
}

bool llama_kv_pages::wait_for(page_id p, std::string * error) {
    bool ok = true;
    while (pages[p].n_loading > 0) {
        const auto found = std::find_if(jobs.begin(), jobs.end(), [&](const std::shared_ptr<read_job> & job) {
            return std::any_of(job->slices.begin(), job->slices.end(), [&](const slice & s) { return s.p == p; });
        });
        assert(found != jobs.end());
        const stall_timer timer(counters.stall_us);
        ok = finish(*found, error) && ok;
    }
    return ok;
}

// Reads slices in as many threads as there are; the caller has made room.
bool llama_kv_pages::load(const std::vector<slice> & slices, std::string * error) {
    if (slices.empty()) {
        return true;
    }
    const stall_timer timer(counters.stall_us);
    const size_t n_jobs = pool == nullptr ? 1 : std::min(slices.size(), (size_t) 2 * (size_t) pool->n_threads());
    std::vector<std::shared_ptr<read_job>> started;
    for (size_t j = 0; j < n_jobs; ++j) {
        const size_t begin = slices.size() * j / n_jobs, end = slices.size() * (j + 1) / n_jobs;
        started.push_back(
            start(std::vector<slice>(slices.begin() + (ptrdiff_t) begin, slices.begin() + (ptrdiff_t) end)));
    }
    bool ok = true;
    for (const auto & job : started) {
        ok = finish(job, error) && ok;
    }
    return ok;
}

bool llama_kv_pages::restore(const std::vector<page_id> & list, std::string * error) {
    const pin_guard guard(*this, list);
    std::vector<slice> slices;
    uint64_t bytes = 0;
    for (page_id p : list) {
        std::string ignored; // what could not be read ahead is tried again here
        wait_for(p, &ignored);
        counters.prefetched_used += pages[p].ahead;
        pages[p].ahead = false;
        counters.restored += pages[p].n_disk > 0;
        for (const slice & s : on_disk_slices(p, 0, n_layers() - 1)) {
            slices.push_back(s);
            for (uint32_t il = s.first; il <= s.last; ++il) {
                bytes += charges[il];
            }
        }
    }
    return make_room(bytes, error) && load(slices, error);
}

bool llama_kv_pages::restore_layer(const std::vector<page_id> & list, uint32_t layer, std::string * error) {
    const pin_guard guard(*this, list);
    std::vector<slice> slices;
    for (page_id p : list) {
        std::string ignored;
        wait_for(p, &ignored);
        for (const slice & s : on_disk_slices(p, layer, layer)) {
            slices.push_back(s);
        }
    }
    return make_room(slices.size() * charges[layer], error) && load(slices, error);
}

int llama_kv_pages::prefetch(const std::vector<page_id> & list, int layer, bool count_use) {
    const pin_guard guard(*this, list);
    int n = 0;
    const uint32_t first = layer < 0 ? 0 : (uint32_t) layer, last = layer < 0 ? n_layers() - 1 : (uint32_t) layer;
    for (page_id p : list) {
        const std::vector<slice> slices = on_disk_slices(p, first, last);
        uint64_t bytes = 0;
        for (const slice & s : slices) {
            for (uint32_t il = s.first; il <= s.last; ++il) {
                bytes += charges[il];
            }
        }
        std::string error;
        if (slices.empty()) {
            continue;
        }
        if (!make_room(bytes, &error)) {
            break;
        }
        if (pool != nullptr) {
            start(slices);
        } else if (!load(slices, &error)) {
            break;
        }
        if (count_use) {
            pages[p].ahead = true;
            counters.prefetched++;
        }
        n++;
    }
    return n;
}

// ------------------------------------------------------------------------------------------------- writes

bool llama_kv_pages::write_layer(page_id p, uint32_t layer, std::string * error) {
    if (flags(p, layer) == RESIDENT) {
        return true;
    }
    const std::vector<page_id> list = { p };
    const pin_guard guard(*this, list);
    if (!restore_layer(list, layer, error)) {
        return false;
    }
    if (!(flags(p, layer) & RESIDENT) && !make_room(charges[layer], error)) {
        return false;
    }
    set_flags(p, layer, RESIDENT);
    return true;
}

bool llama_kv_pages::write(page_id p, std::string * error) {
    const uint8_t * state = &flags(p, 0);
    if (std::all_of(state, state + n_layers(), [](uint8_t s) { return s == RESIDENT; })) {
        return true;
    }
    const std::vector<page_id> list = { p };
    const pin_guard guard(*this, list);
    if (!restore(list, error)) {
        return false;
    }
    uint64_t bytes = 0;
    for (uint32_t il = 0; il < n_layers(); ++il) {
        bytes += (flags(p, il) & RESIDENT) ? 0 : charges[il];
    }
    if (!make_room(bytes, error)) {
        return false;
    }
    for (uint32_t il = 0; il < n_layers(); ++il) {
        if (flags(p, il) != RESIDENT) {
            set_flags(p, il, RESIDENT);
        }
    }
    return true;
}

bool llama_kv_pages::copy(page_id src, page_id dst, std::string * error) {
    const std::vector<page_id> pinned = { dst };
    const pin_guard guard(*this, pinned);
    std::string ignored;
    wait_for(src, &ignored);
    wait_for(dst, &ignored);
    if (!make_room(sum_charge, error)) {
        return false;
    }
    for (uint32_t il = 0; il < n_layers(); ++il) {
        const uint8_t from = flags(src, il);
        if (from == 0) {
            if (flags(dst, il) != 0) {
                set_flags(dst, il, 0);
                release(dst, il);
            }
            continue;
        }
        set_flags(dst, il, RESIDENT);
        if (from & RESIDENT) {
            for (size_t i = 0; i < geometry.layers[il].size(); ++i) {
                uint8_t *in = nullptr, *out = nullptr;
                size_t size = 0;
                span_of(src, il, i, &in, &size);
                span_of(dst, il, i, &out, &size);
                memcpy(out, in, size);
            }
        } else if (!read_slice({ dst, il, il, pages[src].record }, error)) {
            return false;
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------- bytes of tensors

bool llama_kv_pages::find(const uint8_t * at, uint32_t * layer, size_t * span, size_t * row) const {
    auto found = std::upper_bound(by_address.begin(), by_address.end(), at,
                                  [](const uint8_t * a, const auto & entry) { return a < entry.first; });
    if (found == by_address.begin()) {
        return false;
    }
    --found;
    *layer = found->second.first;
    *span = found->second.second;
    *row = (size_t) (at - found->first) / geometry.layers[*layer][*span].row_bytes;
    return *row < (size_t) geometry.n_streams * geometry.n_cells;
}

bool llama_kv_pages::read_bytes(const uint8_t * at, size_t size, void * out_, std::string * error) {
    uint8_t * out = (uint8_t *) out_;
    while (size > 0) {
        uint32_t layer = 0;
        size_t span = 0, row = 0;
        if (!find(at, &layer, &span, &row)) {
            *error = "address outside of the KV cache";
            return false;
        }
        const page_id p = page_of((uint32_t) (row / geometry.n_cells), (uint32_t) (row % geometry.n_cells));
        uint8_t * begin = nullptr;
        size_t span_size = 0;
        span_of(p, layer, span, &begin, &span_size);
        const size_t n = std::min(size, span_size - (size_t) (at - begin));
        std::string ignored;
        wait_for(p, &ignored);
        const uint8_t state = flags(p, layer);
        if (state & RESIDENT) {
            memcpy(out, at, n);
        } else if (state == 0) {
            memset(out, 0, n);
        } else {
            size_t offset = layer_begin[layer] + (size_t) (at - begin);
            for (size_t i = 0; i < span; ++i) {
                offset += geometry.layers[layer][i].row_bytes * n_cells_of(p);
            }
            const size_t align = llama_kv_spill::alignment;
            const aligned_buffer buffer(std::min(bounce_max, round_up(n, align) + align));
            for (size_t done = 0; done < n;) {
                const size_t from = (offset + done) / align * align;
                const size_t to = std::min(round_up(offset + n, align), from + bounce_max);
                if (!spill->read(pages[p].record, from, buffer.data, to - from, error)) {
                    return false;
                }
                const size_t m = std::min(n - done, to - (offset + done));
                memcpy(out + done, buffer.data + (offset + done - from), m);
                counters.bytes_read += (int64_t) (to - from);
                done += m;
            }
        }
        at += n;
        out += n;
        size -= n;
    }
    return true;
}

bool llama_kv_pages::write_bytes(uint8_t * at, size_t size, const void * in_, int value, std::string * error) {
    const uint8_t * in = (const uint8_t *) in_;
    while (size > 0) {
        uint32_t layer = 0;
        size_t span = 0, row = 0;
        if (!find(at, &layer, &span, &row)) {
            *error = "address outside of the KV cache";
            return false;
        }
        const page_id p = page_of((uint32_t) (row / geometry.n_cells), (uint32_t) (row % geometry.n_cells));
        uint8_t * begin = nullptr;
        size_t span_size = 0;
        span_of(p, layer, span, &begin, &span_size);
        const size_t n = std::min(size, span_size - (size_t) (at - begin));
        if (in != nullptr || value != 0 || flags(p, layer) != 0) { // what is empty is zero already
            if (!write_layer(p, layer, error)) {
                return false;
            }
            if (in != nullptr) {
                memcpy(at, in, n);
            } else {
                memset(at, value, n);
            }
        }
        at += n;
        in += in != nullptr ? n : 0;
        size -= n;
    }
    return true;
}
