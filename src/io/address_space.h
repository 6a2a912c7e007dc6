// Address space that costs memory only where it is written. Addresses and sizes are multiples of the system's page.
#pragma once

#include <cstddef>
#include <cstdint>

namespace superllama {

static const size_t huge_page = 2u << 20;

size_t system_page();

static inline size_t round_down(size_t x, size_t to) {
    return x / to * to;
}

static inline size_t round_up(size_t x, size_t to) {
    return round_down(x + to - 1, to);
}

uint8_t * address_reserve(size_t size); // null on failure
void address_release(uint8_t * base, size_t size);
void address_discard(uint8_t * at, size_t size); // reads as zero afterwards

// Huge pages: never, as one byte would commit all of one; or where they lie wholly inside, as one that reaches beyond
// could not be given back alone.
void address_small_pages(uint8_t * at, size_t size);
void address_huge_pages(uint8_t * at, size_t size);

// Reserved for good, on small pages until some of it is told otherwise, whatever the system's default: budgets count
// pages. Throws where there is no address space; `what` says for what.
class address_range {
  public:
    address_range(size_t size, size_t alignment, const char * what);
    ~address_range();

    address_range(const address_range &) = delete;
    address_range & operator=(const address_range &) = delete;

    uint8_t * base() const { return first; }

  private:
    size_t reserved_bytes;
    uint8_t * reserved;
    uint8_t * first; // on the alignment
};

} // namespace superllama
