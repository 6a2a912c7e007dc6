#include "io/address_space.h"

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#ifndef _WIN32
#    include <sys/mman.h>
#    include <unistd.h>

#    ifndef MAP_NORESERVE
#        define MAP_NORESERVE 0
#    endif
#    ifndef MAP_ANONYMOUS
#        define MAP_ANONYMOUS MAP_ANON
#    endif
#endif

namespace superllama {

#ifndef _WIN32

static const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

size_t system_page() {
    static const size_t size = (size_t) sysconf(_SC_PAGESIZE);
    return size;
}

// A child would copy every page that is written here, past any budget.
static void keep_from_children(void * at, size_t size) {
#    ifdef MADV_DONTFORK
    madvise(at, size, MADV_DONTFORK);
#    else
    (void) at, (void) size;
#    endif
}

uint8_t * address_reserve(size_t size) {
    void * base = mmap(nullptr, size, PROT_NONE, flags, -1, 0);
    if (base == MAP_FAILED) {
        return nullptr;
    }
    keep_from_children(base, size);
    return (uint8_t *) base;
}

void address_release(uint8_t * base, size_t size) {
    munmap(base, size);
}

void address_small_pages(uint8_t * at, size_t size) {
#    ifdef MADV_NOHUGEPAGE
    madvise(at, size, MADV_NOHUGEPAGE);
#    else
    (void) at, (void) size;
#    endif
}

void address_commit(uint8_t * at, size_t size, page_kind kind) {
    if (mprotect(at, size, PROT_READ | PROT_WRITE) != 0) {
        throw std::runtime_error("the system has no memory for " + std::to_string((size >> 10) + 1) +
                                 " KiB more: " + strerror(errno) +
                                 "; is it limited (ulimit -d, vm.overcommit_memory, vm.max_map_count)?");
    }
    address_small_pages(at, size);
#    ifdef MADV_HUGEPAGE
    uint8_t * first = (uint8_t *) round_up((size_t) at, huge_page);
    uint8_t * last = (uint8_t *) round_down((size_t) at + size, huge_page);
    if (kind == page_kind::huge && first < last) {
        madvise(first, (size_t) (last - first), MADV_HUGEPAGE);
    }
#    else
    (void) kind;
#    endif
}

// Mapped anew: what a mapping may need stays promised to it for as long as it is there.
void address_decommit(uint8_t * at, size_t size) {
    mmap(at, size, PROT_NONE, flags | MAP_FIXED, -1, 0);
    keep_from_children(at, size);
}

void address_discard(uint8_t * at, size_t size) {
#    ifdef __linux__
    if (madvise(at, size, MADV_DONTNEED) == 0) {
        return;
    }
#    endif
    mmap(at, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0);
}

#else

size_t system_page() {
    return 4096;
}

uint8_t * address_reserve(size_t) {
    return nullptr;
}

void address_release(uint8_t *, size_t) {}

void address_commit(uint8_t *, size_t, page_kind) {}

void address_decommit(uint8_t *, size_t) {}

void address_discard(uint8_t *, size_t) {}

void address_small_pages(uint8_t *, size_t) {}

#endif

address_range::address_range(size_t size, size_t alignment, const char * what) :
    reserved_bytes(round_up(size, alignment) + alignment),
    reserved(address_reserve(reserved_bytes)) {
    if (reserved == nullptr) {
        throw std::runtime_error("cannot reserve " + std::to_string(reserved_bytes >> 20) +
                                 " MiB of address space for " + what + "; is it limited (ulimit -v)?");
    }
    first = (uint8_t *) round_up((size_t) reserved, alignment);
}

address_range::~address_range() {
    address_release(reserved, reserved_bytes);
}

} // namespace superllama
