// Memory of blocks that are gone, kept for blocks that come: freeing pages, zeroing and allocating them again costs
// more than moving them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_set>
#include <vector>

class llama_spare_memory {
  public:
    // A range of whole pages and the size of the pieces that move: huge pages where there is room for them. Always the
    // same for a range, so that a piece is one mapping or part of one.
    struct range {
        uint8_t * first;
        uint8_t * last; // equal to first: too little to be worth a mapping of its own
        size_t piece;
    };
    static range of(uint8_t * first, uint8_t * last);

    bool works() const { return can_move; } // on this system
    void add(const range & r);
    void take(const range & r); // moves what there is, or less, into a range that has no memory
    void trim(size_t bytes);    // gives back what is more
    size_t bytes() const { return n_bytes; }

  private:
    std::map<size_t, std::vector<uint8_t *>> pieces; // by size, where they lie now
    size_t n_bytes = 0;
    std::unordered_set<const uint8_t *> mapped; // pieces that are mappings of their own, since they were moved to
    bool can_move = true;
};
