#include "kv/pages.h"

#include "io/address_space.h"

#include <algorithm>
#include <cstring>

namespace superllama {

// What an operation works on stays while it makes room.
struct page_table::pin_guard {
    page_table & owner;
    const std::vector<page_id> & list;
    std::vector<uint64_t> before;

    pin_guard(page_table & owner, const std::vector<page_id> & list) : owner(owner), list(list) {
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

page_table::page_table(kv_layout layout, uint64_t budget, std::unique_ptr<kv_spill> spill, readers * pool,
                       inspect_fn inspect) :
    kv_layout(std::move(layout)),
    budget(budget),
    spill(std::move(spill)),
    pool(pool),
    inspect(std::move(inspect)),
    pages(n_pages()),
    states(pages.size() * n_layers()) {}

page_table::~page_table() {
    std::string error;
    while (!jobs.empty()) {
        finish(jobs.back(), &error);
    }
}

// ------------------------------------------------------------------------------------------------ states

void page_table::set_flags(page_id id, uint32_t layer, uint8_t value) {
    uint8_t & state = states[(size_t) id * n_layers() + layer];
    page & p = pages[id];
    const bool was_resident = p.n_resident > 0, was_disk = p.n_resident == 0 && p.n_disk > 0;

    const auto count = [&](uint8_t s, int sign) {
        p.n_resident += (s & RESIDENT) ? sign : 0;
        p.n_loading += (s & LOADING) ? sign : 0;
        p.n_disk += (s & SAVED) && !(s & RESIDENT) ? sign : 0;
        resident += (s & RESIDENT) ? (uint64_t) ((int64_t) layer_charge(layer) * sign) : 0;
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

uint64_t page_table::resident_bytes(page_id p) const {
    if (in_memory(p)) {
        return page_charge();
    }
    uint64_t bytes = 0;
    for (uint32_t layer = 0; pages[p].n_resident > 0 && layer < n_layers(); ++layer) {
        bytes += (flags(p, layer) & RESIDENT) ? layer_charge(layer) : 0;
    }
    return bytes;
}

// Gives the memory of a slice back. A page of the system that it shares with neighbours goes with the last of them;
// until then the slice's part of it is zero where the slice is empty.
void page_table::release(page_id p, uint32_t layer) {
    for (size_t i = 0; i < n_spans(layer); ++i) {
        const span own = span_of(p, layer, i);
        const uintptr_t first = (uintptr_t) own.at, last = first + own.size;
        uintptr_t begin = first, end = last;

        const uintptr_t floor = round_down(begin, os_page);
        const uintptr_t ceil = round_up(end, os_page);
        const auto free_between = [&](page_id q, int step, uintptr_t from, uintptr_t to) {
            for (q += (page_id) step; q < n_pages(); q += (page_id) step) {
                const span other = span_of(q, layer, i);
                if ((uintptr_t) other.at >= to || (uintptr_t) other.at + other.size <= from) {
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
            address_discard((uint8_t *) begin, end - begin);
        } else {
            begin = end = ceil;
        }
        if (flags(p, layer) == 0) {
            memset(own.at, 0, first < begin ? std::min(begin, last) - first : 0);
            memset((uint8_t *) end, 0, end < last ? last - end : 0);
        }
    }
}

void page_table::free_record(page_id p) {
    if (pages[p].record >= 0) {
        spill->release(pages[p].record);
        pages[p].record = -1;
    }
}

void page_table::drop(page_id p) {
    std::string error;
    wait_for(p, &error);
    counters.prefetched_wasted += pages[p].ahead;
    pages[p].ahead = false;
    pages[p].elsewhere = false;
    for (uint32_t il = 0; il < n_layers(); ++il) {
        set_flags(p, il, 0);
    }
    for (uint32_t il = 0; il < n_layers(); ++il) {
        if (!is_away(il)) {
            release(p, il);
        }
    }
    free_record(p);
}

void page_table::clear() {
    for (page_id p = 0; p < n_pages(); ++p) {
        if (!is_empty(p)) {
            drop(p);
        }
    }
    if (spill != nullptr) {
        spill->clear();
    }
}

void page_table::scrub(page_id p) {
    for (uint32_t il = 0; il < n_layers(); ++il) {
        if (!(flags(p, il) & RESIDENT)) {
            release(p, il);
        }
    }
}

void page_table::for_each_evicted(const std::function<void(uint8_t *, size_t)> & visit) const {
    for (page_id p = 0; p < n_pages(); ++p) {
        for (uint32_t il = 0; il < n_layers(); ++il) {
            for (size_t i = 0; flags(p, il) == SAVED && i < n_spans(il); ++i) {
                const span s = span_of(p, il, i);
                visit(s.at, s.size);
            }
        }
    }
}

// ------------------------------------------------------------------------------------ eviction and budget

bool page_table::evict(page_id p, std::string * error) {
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

bool page_table::evict_layer(const std::vector<page_id> & list, uint32_t layer, std::string * error) {
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

bool page_table::make_room(uint64_t bytes, std::string * error) {
    if (resident + bytes > budget && !evict_some(bytes, error)) {
        return false;
    }
    if (growth) {
        growth(resident + bytes);
    }
    return true;
}

bool page_table::evict_some(uint64_t bytes, std::string * error) {
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
    *error = "KV pages need " + kv_mib(resident + bytes) + " of memory at once, --kv-budget allows " + kv_mib(budget) +
             "; raise it";
    return false;
}

// ------------------------------------------------------------------------------------------- restoring

bool page_table::restore(const std::vector<page_id> & list, std::string * error) {
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
                bytes += layer_charge(il);
            }
        }
    }
    return make_room(bytes, error) && load(slices, error);
}

bool page_table::restore_layer(const std::vector<page_id> & list, uint32_t layer, std::string * error) {
    const pin_guard guard(*this, list);
    std::vector<slice> slices;
    for (page_id p : list) {
        std::string ignored;
        wait_for(p, &ignored);
        for (const slice & s : on_disk_slices(p, layer, layer)) {
            slices.push_back(s);
        }
    }
    return make_room(slices.size() * layer_charge(layer), error) && load(slices, error);
}

int page_table::prefetch(const std::vector<page_id> & list, int layer, bool count_use) {
    const pin_guard guard(*this, list);
    int n = 0;
    const uint32_t first = layer < 0 ? 0 : (uint32_t) layer, last = layer < 0 ? n_layers() - 1 : (uint32_t) layer;
    for (page_id p : list) {
        const std::vector<slice> slices = on_disk_slices(p, first, last);
        uint64_t bytes = 0;
        for (const slice & s : slices) {
            for (uint32_t il = s.first; il <= s.last; ++il) {
                bytes += layer_charge(il);
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

bool page_table::write_layer(page_id p, uint32_t layer, std::string * error) {
    if (flags(p, layer) == RESIDENT) {
        return true;
    }
    const std::vector<page_id> list = { p };
    const pin_guard guard(*this, list);
    if (!restore_layer(list, layer, error)) {
        return false;
    }
    if (!(flags(p, layer) & RESIDENT) && !make_room(layer_charge(layer), error)) {
        return false;
    }
    set_flags(p, layer, RESIDENT);
    return true;
}

bool page_table::write(page_id p, std::string * error) {
    written_elsewhere(p);
    bool ready = true;
    for (uint32_t il = 0; ready && il < n_layers(); ++il) {
        ready = flags(p, il) == RESIDENT || is_away(il);
    }
    if (ready) {
        return true;
    }
    const std::vector<page_id> list = { p };
    const pin_guard guard(*this, list);
    if (!restore(list, error)) {
        return false;
    }
    uint64_t bytes = 0;
    for (uint32_t il = 0; il < n_layers(); ++il) {
        bytes += (flags(p, il) & RESIDENT) ? 0 : layer_charge(il);
    }
    if (!make_room(bytes, error)) {
        return false;
    }
    for (uint32_t il = 0; il < n_layers(); ++il) {
        if (flags(p, il) != RESIDENT && !is_away(il)) {
            set_flags(p, il, RESIDENT);
        }
    }
    return true;
}

bool page_table::copy(page_id src, page_id dst, std::string * error) {
    const std::vector<page_id> pinned = { dst };
    const pin_guard guard(*this, pinned);
    std::string ignored;
    wait_for(src, &ignored);
    wait_for(dst, &ignored);
    if (!make_room(page_charge(), error)) {
        return false;
    }
    pages[dst].elsewhere = pages[src].elsewhere;
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
            for (size_t i = 0; i < n_spans(il); ++i) {
                const span from_span = span_of(src, il, i);
                memcpy(span_of(dst, il, i).at, from_span.at, from_span.size);
            }
        } else if (!read_slice({ dst, il, il, pages[src].record }, error)) {
            return false;
        }
    }
    return true;
}

} // namespace superllama
