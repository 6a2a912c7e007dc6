#include "llama-kv-memory.h"

#ifndef _WIN32
#    include <sys/mman.h>
#    include <unistd.h>

#    ifndef MAP_NORESERVE
#        define MAP_NORESERVE 0
#    endif
#    ifndef MAP_ANONYMOUS
#        define MAP_ANONYMOUS MAP_ANON
#    endif

static const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

uint8_t * llama_kv_reserve(size_t size) {
    void * base = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (base == MAP_FAILED) {
        return nullptr;
    }
#    ifdef MADV_NOHUGEPAGE
    madvise(base, size, MADV_NOHUGEPAGE); // one cell would commit 2 MiB in every layer, past the budget
#    endif
    return (uint8_t *) base;
}

void llama_kv_unreserve(uint8_t * base, size_t size) {
    munmap(base, size);
}

void llama_kv_discard(uint8_t * at, size_t size) {
#    ifdef __linux__
    if (madvise(at, size, MADV_DONTNEED) == 0) {
        return;
    }
#    endif
    mmap(at, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0);
}

size_t llama_kv_system_page() {
    return (size_t) sysconf(_SC_PAGESIZE);
}

#else

uint8_t * llama_kv_reserve(size_t) {
    return nullptr;
}

void llama_kv_unreserve(uint8_t *, size_t) {}

void llama_kv_discard(uint8_t *, size_t) {}

size_t llama_kv_system_page() {
    return 4096;
}

#endif
