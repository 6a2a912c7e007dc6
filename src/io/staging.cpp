#include "io/staging.h"

#include <algorithm>

namespace superllama {

// slices of 1 MiB for six readers
static const size_t n_pages = 3;

size_t staging_buffer::bytes() {
    return n_pages * huge_page;
}

staging_buffer::staging_buffer(int n_readers) : range(bytes(), huge_page, "reading") {
    const auto n_slices = (size_t) std::clamp(n_readers, 1, 8);
    n_slice = bytes() / n_slices / system_page() * system_page();
    address_commit(range.base(), bytes(), page_kind::huge);
    for (size_t i = 0; i < n_slices; ++i) {
        free.push_back(range.base() + i * n_slice);
    }
}

uint8_t * staging_buffer::take() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (free.empty()) {
        return nullptr;
    }
    uint8_t * slice = free.back();
    free.pop_back();
    return slice;
}

void staging_buffer::give_back(uint8_t * slice) {
    const std::lock_guard<std::mutex> lock(mutex);
    free.push_back(slice);
}

} // namespace superllama
