// Address space, and memory in it where it is asked for: what is only reserved counts nowhere, also where the system
// promises no more than it has (overcommit, ulimit -d) or a process locks its memory. Addresses and sizes are multiples
// of the system's page.
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

uint8_t * address_reserve(size_t size); // null on failure; nothing can be read or written there
void address_release(uint8_t * base, size_t size);

// Pages of the system's size, whatever its default, as budgets count them: one byte would commit all of a huge page. Or
// huge ones where they lie wholly inside, as one that reaches beyond could not be given back alone.
enum class page_kind { small, huge };

static inline page_kind kind_of(size_t page) { // where memory comes and goes in these
    return page == huge_page ? page_kind::huge : page_kind::small;
}

// From now on it has memory where it is written; what has some already keeps it. Throws where the system has none.
void address_commit(uint8_t * at, size_t size, page_kind kind);
void address_decommit(uint8_t * at, size_t size); // as reserved

// Of memory that stays committed, or that others allocated: reads as zero afterwards; has no huge pages.
void address_discard(uint8_t * at, size_t size);
void address_small_pages(uint8_t * at, size_t size);

// Reserved for good. Throws where there is no address space; `what` says for what.
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
