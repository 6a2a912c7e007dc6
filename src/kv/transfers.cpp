// The transfers of page_table: between memory, the spill file, and whoever reads or writes tensors.

#include "kv/pages.h"

#include "io/address_space.h"
#include "io/readers.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <new>

namespace superllama {

// Empty where there is no memory for it.
struct bounce_buffer {
    std::unique_ptr<uint8_t[]> memory;
    uint8_t * data = nullptr;

    bounce_buffer(size_t size, std::string * error) : memory(new(std::nothrow) uint8_t[size + kv_spill::alignment]) {
        if (memory == nullptr) {
            *error = "no memory for a buffer of " + kv_mib(size) + " to read or write a KV page; lower --kv-budget";
            return;
        }
        data = (uint8_t *) round_up((size_t) memory.get(), kv_spill::alignment);
    }
};

// ------------------------------------------------------------------------------------- slices and records

bool page_table::read_slice(const slice & s, std::string * error) const {
    const size_t begin = layer_begin[s.first], end = layer_begin[s.last + 1];
    const size_t chunk = std::min(bounce_bytes(), end - begin);
    const bounce_buffer buffer(chunk, error);
    for (size_t at = begin; buffer.data != nullptr && at < end; at += chunk) {
        const size_t size = std::min(chunk, end - at);
        if (!spill->read(s.record, at, buffer.data, size, error)) {
            return false;
        }
        copy_record(s.p, at, at + size, buffer.data, true);
        counters.bytes_read += (int64_t) size;
    }
    return buffer.data != nullptr;
}

bool page_table::write_slices(page_id p, uint32_t first, uint32_t last, std::string * error) {
    const size_t begin = layer_begin[first], end = layer_begin[last + 1];
    const size_t chunk = std::min(bounce_bytes(), end - begin);
    const bounce_buffer buffer(chunk, error);
    if (buffer.data == nullptr) {
        return false;
    }
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
bool page_table::save(page_id p, uint32_t first, uint32_t last, std::string * error) {
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

// -------------------------------------------------------------------------------- reads, ahead and awaited

struct page_table::read_job {
    std::vector<slice> slices;
    uint64_t id = 0;

    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    bool ok = false;
    bool cancelled = false;
    std::string error;
};

std::vector<page_table::slice> page_table::on_disk_slices(page_id p, uint32_t first, uint32_t last) const {
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
std::shared_ptr<page_table::read_job> page_table::start(std::vector<slice> slices) {
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

bool page_table::finish(const std::shared_ptr<read_job> & job_, std::string * error) {
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

bool page_table::wait_for(page_id p, std::string * error) {
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
bool page_table::load(const std::vector<slice> & slices, std::string * error) {
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

// ------------------------------------------------------------------------------- layers that go to a device

bool page_table::send_layer(uint32_t layer, const take_fn & copy, std::string * error) {
    std::vector<uint8_t> saved;
    for (page_id p = 0; p < n_pages(); ++p) {
        std::string ignored; // what could not be read ahead is tried again here
        wait_for(p, &ignored);
        for (size_t i = 0; flags(p, layer) != 0 && i < n_spans(layer); ++i) {
            const span s = span_of(p, layer, i);
            const auto offset = (size_t) (s.at - span_of(0, layer, i).at);
            if (flags(p, layer) & RESIDENT) {
                copy(i, offset, s.at, s.size);
                continue;
            }
            saved.resize(s.size);
            if (!read_bytes(s.at, s.size, saved.data(), error)) {
                return false;
            }
            copy(i, offset, saved.data(), s.size);
        }
    }
    empty_layer(layer, true);
    set_away(layer, true);
    return true;
}

bool page_table::fetch_layer(uint32_t layer, const fill_fn & copy, std::string * error) {
    set_away(layer, false);
    bool ok = true;
    try {
        for (page_id p = 0; ok && p < n_pages(); ++p) {
            ok = !pages[p].elsewhere || write_layer(p, layer, error);
            for (size_t i = 0; ok && pages[p].elsewhere && i < n_spans(layer); ++i) {
                const span s = span_of(p, layer, i);
                copy(i, (size_t) (s.at - span_of(0, layer, i).at), s.at, s.size);
            }
        }
    } catch (const std::exception & e) { // whoever is told of the growth has no room for it
        *error = e.what();
        ok = false;
    }
    if (!ok) {
        empty_layer(layer, false);
        set_away(layer, true);
        return false;
    }
    for (page & p : pages) {
        p.elsewhere = p.elsewhere && n_here() < n_layers();
    }
    return true;
}

// Nothing of the layer is here any more. What goes is on a device.
void page_table::empty_layer(uint32_t layer, bool goes) {
    std::vector<page_id> emptied;
    for (page_id p = 0; p < n_pages(); ++p) {
        if (flags(p, layer) != 0) {
            emptied.push_back(p);
            set_flags(p, layer, 0);
            pages[p].elsewhere = pages[p].elsewhere || goes;
        }
    }
    for (page_id p : emptied) {
        release(p, layer);
        const uint8_t * state = &flags(p, 0);
        if (std::none_of(state, state + n_layers(), [](uint8_t s) { return (s & SAVED) != 0; })) {
            free_record(p);
        }
    }
}

// ---------------------------------------------------------------------------------------- bytes of tensors

bool page_table::read_record(int64_t record, size_t offset, size_t size, uint8_t * out, std::string * error) {
    const size_t align = kv_spill::alignment, end = offset + size;
    const auto floor = [&](size_t n) { return n / align * align; };
    const bounce_buffer buffer(std::min(bounce_bytes(), floor(end + align - 1) - floor(offset)), error);
    while (buffer.data != nullptr && offset < end) {
        const size_t from = floor(offset), to = std::min(floor(end + align - 1), from + bounce_bytes());
        if (!spill->read(record, from, buffer.data, to - from, error)) {
            return false;
        }
        const size_t n = std::min(end, to) - offset;
        memcpy(out, buffer.data + (offset - from), n);
        counters.bytes_read += (int64_t) (to - from);
        out += n;
        offset += n;
    }
    return buffer.data != nullptr;
}

static const char * const beyond = "address outside of the KV cache";

bool page_table::read_bytes(const uint8_t * at, size_t size, void * out_, std::string * error) {
    uint8_t * out = (uint8_t *) out_;
    *error = beyond;
    return walk(at, size, [&](const piece & part) {
        std::string ignored;
        wait_for(part.p, &ignored);
        const uint8_t state = flags(part.p, part.layer);
        if (state & RESIDENT) {
            memcpy(out, part.at, part.size);
        } else if (state == 0) {
            memset(out, 0, part.size);
        } else if (!read_record(pages[part.p].record, part.record_offset, part.size, out, error)) {
            return false;
        }
        out += part.size;
        return true;
    });
}

bool page_table::write_bytes(uint8_t * at, size_t size, const void * in_, int value, std::string * error) {
    const uint8_t * in = (const uint8_t *) in_;
    *error = beyond;
    return walk(at, size, [&](const piece & part) {
        if (in == nullptr && value == 0 && flags(part.p, part.layer) == 0) {
            return true; // what is empty is zero already
        }
        if (!write_layer(part.p, part.layer, error)) {
            return false;
        }
        if (in != nullptr) {
            memcpy(part.at, in, part.size);
            in += part.size;
        } else {
            memset(part.at, value, part.size);
        }
        return true;
    });
}

} // namespace superllama
