// Address space that costs memory only where it is written. Addresses and sizes are multiples of the system's page.
#pragma once

#include <cstddef>
#include <cstdint>

static const size_t llama_huge_page = 2u << 20;

size_t llama_system_page();

static inline size_t llama_round_down(size_t x, size_t to) {
    return x / to * to;
}

static inline size_t llama_round_up(size_t x, size_t to) {
    return llama_round_down(x + to - 1, to);
}

uint8_t * llama_address_reserve(size_t size); // null on failure
void llama_address_release(uint8_t * base, size_t size);
void llama_address_discard(uint8_t * at, size_t size); // reads as zero afterwards

// Huge pages: never, as one byte would commit all of one; or where they lie wholly inside, as one that reaches beyond
// could not be given back alone.
void llama_address_small_pages(uint8_t * at, size_t size);
void llama_address_huge_pages(uint8_t * at, size_t size);

// Reserved for good, on small pages until some of it is told otherwise, whatever the system's default: budgets count
// pages. Throws where there is no address space; `what` says for what.
class llama_address_range {
  public:
    llama_address_range(size_t size, size_t alignment, const char * what);
    ~llama_address_range();

    llama_address_range(const llama_address_range &) = delete;
    llama_address_range & operator=(const llama_address_range &) = delete;

    uint8_t * base() const { return first; }

  private:
    size_t reserved_bytes;
    uint8_t * reserved;
    uint8_t * first; // on the alignment
};
