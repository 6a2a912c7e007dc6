#include "server/free_heap.h"

#include "ggml.h"

#if defined(__GLIBC__)
#    include <malloc.h>
#endif

namespace superllama {

void keep_heap_small() {
#if defined(__GLIBC__)
    const int most_bytes = 1 << 20;
    mallopt(M_MMAP_THRESHOLD, most_bytes);
    mallopt(M_TRIM_THRESHOLD, most_bytes);
#endif
}

void free_heap() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

// Where the C library does not say it, more than any.
static uint64_t bytes_free() {
#if defined(__GLIBC__)
#    if __GLIBC_PREREQ(2, 33)
    return mallinfo2().fordblks;
#    endif
#endif
    return UINT64_MAX;
}

void heap_watch::look(int64_t n_asked, int n_running) {
    const int64_t period_ms = 10000;
    const uint64_t a_little = 16 << 20;
    const int64_t now_ms = ggml_time_ms();
    const bool is_busy = n_asked != n_before || n_running > 0;
    if (now_ms < t_next_ms || !(is_busy || may_be_more)) {
        return;
    }
    may_be_more = is_busy;
    n_before = n_asked;
    t_next_ms = now_ms + period_ms;
    if (bytes_free() > a_little) {
        free_heap();
    }
}

} // namespace superllama
