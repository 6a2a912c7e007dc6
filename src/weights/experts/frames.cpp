#include "weights/experts/frames.h"

#include <cstring>
#include <stdexcept>

namespace superllama {

static const size_t huge_bytes_min = 64u << 20; // of all frames; below, huge pages would be a large share of them

static size_t page_of(size_t frame_bytes, size_t n_max) {
    return frame_bytes * n_max < huge_bytes_min ? system_page() : huge_page;
}

size_t expert_frames::slack(size_t frame_bytes, size_t n_max) {
    return page_of(frame_bytes, n_max) - system_page();
}

expert_frames::expert_frames(size_t frame_bytes, size_t n_max) :
    frame_bytes(frame_bytes),
    n_max(n_max),
    page(page_of(frame_bytes, n_max)),
    range(frame_bytes * n_max, page, "experts") {}

// Where the pages begin and end that the frame of this number needs beside those before it.
std::pair<size_t, size_t> expert_frames::pages_of(size_t i) const {
    return { round_up(i * frame_bytes, page), round_up((i + 1) * frame_bytes, page) };
}

uint8_t * expert_frames::take(uint32_t block) {
    if (free.empty()) {
        if (owners.size() == n_max) {
            throw std::logic_error("more experts than there are");
        }
        const auto pages = pages_of(owners.size());
        if (pages.first < pages.second) {
            address_commit(range.base() + pages.first, pages.second - pages.first, kind_of(page));
        }
        owners.push_back(block);
        return at(owners.size() - 1);
    }
    const size_t i = *free.begin();
    free.erase(free.begin());
    owners[i] = block;
    return at(i);
}

void expert_frames::give_back(uint8_t * frame) {
    const size_t i = (size_t) (frame - range.base()) / frame_bytes;
    owners[i] = -1;
    free.insert(i);
}

bool expert_frames::shrink(const std::function<bool(uint32_t block)> & may_move,
                           const std::function<void(uint32_t block, uint8_t * to)> & moved) {
    if (owners.empty()) {
        return false;
    }
    const size_t last = owners.size() - 1;
    const int64_t owner = owners[last];
    if (owner < 0) {
        free.erase(last);
    } else {
        if (free.empty() || !may_move((uint32_t) owner)) {
            return false;
        }
        uint8_t * to = take((uint32_t) owner);
        memcpy(to, at(last), frame_bytes);
        moved((uint32_t) owner, to);
    }
    owners.pop_back();
    const auto pages = pages_of(last);
    if (pages.first < pages.second) {
        address_decommit(range.base() + pages.first, pages.second - pages.first);
    }
    return true;
}

} // namespace superllama
