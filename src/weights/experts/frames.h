// Memory for experts of one size: frames side by side. An expert that comes takes the frame of one that went; they fill
// up from the front, and memory goes back to the system from the end.
#pragma once

#include "io/address_space.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <utility>
#include <vector>

namespace superllama {

class expert_frames {
  public:
    expert_frames(size_t frame_bytes, size_t n_max); // throws where there is no address space

    // Frames lie on huge pages where there are many of them; the last page is then partly unused.
    static size_t slack(size_t frame_bytes, size_t n_max);

    bool has_free() const { return !free.empty(); } // one that has memory
    uint8_t * take(uint32_t block);                 // a free one, or one more
    void give_back(uint8_t * frame);

    size_t memory_bytes() const { return owners.size() * frame_bytes; } // of frames, free ones among them

    // Gives back the memory of the last frame; what is in it moves to a free one, if it may. False: it may not.
    bool shrink(const std::function<bool(uint32_t block)> & may_move,
                const std::function<void(uint32_t block, uint8_t * to)> & moved);

  private:
    uint8_t * at(size_t i) const { return range.base() + i * frame_bytes; }
    std::pair<size_t, size_t> pages_of(size_t i) const;

    size_t frame_bytes;
    size_t n_max;
    size_t page; // memory comes and goes in these
    address_range range;
    std::vector<int64_t> owners; // by frame; -1: free
    std::set<size_t> free;
};

} // namespace superllama
