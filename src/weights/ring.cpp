#include "weights/ring.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace superllama {

stream_ring::stream_ring(size_t bytes_max, size_t page) :
    page(page),
    range(bytes_max, page, "streamed weights"),
    there(round_up(bytes_max, page) / page) {}

void stream_ring::limit(size_t bytes) {
    n_limit = std::min(round_down(bytes, page), there.size() * page);
    trim();
}

bool stream_ring::has_room(size_t bytes) const {
    if (bytes == 0) {
        return places.empty() || places.rbegin()->first + places.rbegin()->second.bytes <= n_limit;
    }
    return find_room(bytes) != SIZE_MAX;
}

size_t stream_ring::find_room(size_t bytes) const {
    const size_t at = find_room(bytes, std::min(next, n_limit), n_limit);
    return at != SIZE_MAX ? at : find_room(bytes, 0, n_limit);
}

size_t stream_ring::find_room(size_t bytes, size_t first, size_t last) const {
    auto p = places.upper_bound(first);
    if (p != places.begin()) {
        const auto before = std::prev(p);
        first = std::max(first, before->first + before->second.bytes);
    }
    for (; p != places.end() && p->first < first + bytes; ++p) {
        first = p->first + p->second.bytes;
    }
    return first + bytes <= last ? first : SIZE_MAX;
}

uint8_t * stream_ring::take(uint32_t block, size_t bytes) {
    const size_t at = find_room(bytes);
    if (at == SIZE_MAX) {
        throw std::logic_error("no room for a block in the ring");
    }
    commit(at, bytes);
    places[at] = { bytes, block };
    next = at + bytes;
    return range.base() + at;
}

void stream_ring::commit(size_t at, size_t bytes) {
    const size_t first = at / page, last = round_up(at + bytes, page) / page;
    const size_t n = (size_t) std::count(there.begin() + (ptrdiff_t) first, there.begin() + (ptrdiff_t) last, false);
    if (n == 0) {
        return;
    }
    address_commit(range.base() + first * page, (last - first) * page, kind_of(page));
    std::fill(there.begin() + (ptrdiff_t) first, there.begin() + (ptrdiff_t) last, true);
    n_there += n;
}

void stream_ring::give_back(const uint8_t * place) {
    const auto p = places.find((size_t) (place - range.base()));
    const bool beyond = p->first + p->second.bytes > n_limit;
    places.erase(p);
    if (beyond) {
        trim();
    }
}

// Allocates nothing: contexts close, and give back, where there is no memory, too.
void stream_ring::trim() {
    size_t last = there.size();
    for (auto p = places.rbegin(); p != places.rend() && p->first + p->second.bytes > n_limit; ++p) {
        decommit(round_up(p->first + p->second.bytes, page) / page, last);
        last = p->first / page;
    }
    decommit(n_limit / page, last);
}

void stream_ring::decommit(size_t i, size_t last) {
    for (; i < last; ++i) {
        const size_t first = i;
        while (i < last && there[i]) {
            there[i++] = false;
        }
        if (i > first) {
            address_decommit(range.base() + first * page, (i - first) * page);
            n_there -= i - first;
        }
    }
}

void stream_ring::compact(const std::function<void(uint32_t block, uint8_t * to)> & moved) {
    std::map<size_t, taken> packed;
    next = 0;
    for (const auto & p : places) {
        if (p.first != next) {
            commit(next, p.second.bytes);
            memmove(range.base() + next, range.base() + p.first, p.second.bytes);
            moved(p.second.block, range.base() + next);
        }
        packed[next] = p.second;
        next += p.second.bytes;
    }
    places = packed;
    trim();
}

} // namespace superllama
