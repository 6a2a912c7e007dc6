#include "io/address_space.h"

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

uint8_t * address_reserve(size_t size) {
    void * base = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (base == MAP_FAILED) {
        return nullptr;
    }
#    ifdef MADV_DONTFORK
    madvise(base, size, MADV_DONTFORK); // a child would copy every page that is written here, past any budget
#    endif
    return (uint8_t *) base;
}

void address_release(uint8_t * base, size_t size) {
    munmap(base, size);
}

void address_discard(uint8_t * at, size_t size) {
#    ifdef __linux__
    if (madvise(at, size, MADV_DONTNEED) == 0) {
        return;
    }
#    endif
    mmap(at, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0);
}

void address_small_pages(uint8_t * at, size_t size) {
#    ifdef MADV_NOHUGEPAGE
    madvise(at, size, MADV_NOHUGEPAGE);
#    else
    (void) at, (void) size;
#    endif
}

void address_huge_pages(uint8_t * at, size_t size) {
#    ifdef MADV_HUGEPAGE
    uint8_t * first = (uint8_t *) round_up((size_t) at, huge_page);
    uint8_t * last = (uint8_t *) round_down((size_t) at + size, huge_page);
    if (first < last) {
        madvise(first, (size_t) (last - first), MADV_HUGEPAGE);
    }
#    else
    (void) at, (void) size;
#    endif
}

#else

size_t system_page() {
    return 4096;
}

uint8_t * address_reserve(size_t) {
    return nullptr;
}

void address_release(uint8_t *, size_t) {}

void address_discard(uint8_t *, size_t) {}

void address_small_pages(uint8_t *, size_t) {}

void address_huge_pages(uint8_t *, size_t) {}

#endif

address_range::address_range(size_t size, size_t alignment, const char * what) :
    reserved_bytes(round_up(size, alignment) + alignment),
    reserved(address_reserve(reserved_bytes)) {
    if (reserved == nullptr) {
        throw std::runtime_error("cannot reserve " + std::to_string(reserved_bytes >> 20) +
                                 " MiB of address space for " + what + "; is it limited (ulimit -v)?");
    }
    first = (uint8_t *) round_up((size_t) reserved, alignment);
    address_small_pages(reserved, reserved_bytes);
}

address_range::~address_range() {
    address_release(reserved, reserved_bytes);
}

} // namespace superllama
