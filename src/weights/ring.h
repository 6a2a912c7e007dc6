// Memory that streamed blocks take turns in: places beside each other in one stretch of address space. What one block
// leaves the next one takes over, so that no page is freed, zeroed or mapped while weights stream.
#pragma once

#include "io/address_space.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

namespace superllama {

class stream_ring {
  public:
    // Sizes are multiples of the system's page; `page` is what memory comes and goes in. Throws where there is no
    // address space.
    stream_ring(size_t bytes_max, size_t page);

    // No places beyond this from now on; whole pages there go back to the system as soon as nothing lies in them.
    void limit(size_t bytes);

    bool has_room(size_t bytes) const; // in one piece; for 0 bytes: whether nothing lies beyond the limit
    uint8_t * take(uint32_t block, size_t bytes);
    void give_back(const uint8_t * place);

    // Moves what there is to the beginning, for room in one piece. Nobody may be reading or writing.
    void compact(const std::function<void(uint32_t block, uint8_t * to)> & moved);

    size_t memory_bytes() const { return n_there * page; } // of places and between them

  private:
    struct taken {
        size_t bytes;
        uint32_t block;
    };

    size_t find_room(size_t bytes) const; // the first after what was taken last, round the end; SIZE_MAX: none
    size_t find_room(size_t bytes, size_t first, size_t last) const;
    void commit(size_t at, size_t bytes);
    void trim();
    void decommit(size_t i, size_t last); // pages that have memory, of those

    size_t page;
    address_range range;
    size_t n_limit = 0;
    size_t next = 0;                // end of what was taken last
    std::map<size_t, taken> places; // by where they begin
    std::vector<bool> there;        // pages that have memory
    size_t n_there = 0;
};

} // namespace superllama
