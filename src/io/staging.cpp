#include "io/staging.h"

#include "io/address_space.h"

#include <algorithm>

namespace superllama {

// slices of 1 MiB for six readers
static const size_t n_pages = 3;

size_t staging_buffer::bytes() {
    return n_pages * huge_page;
}

staging_buffer::staging_buffer(int n_readers) : reserved(address_reserve(bytes() + huge_page)) {
    const auto n_slices = (size_t) std::clamp(n_readers, 1, 8);
    n_slice = bytes() / n_slices / system_page() * system_page();
    if (reserved == nullptr) {
        return;
    }
    uint8_t * page = (uint8_t *) round_up((size_t) reserved, huge_page);
    address_huge_pages(page, bytes());
    for (size_t i = 0; i < n_slices; ++i) {
        free.push_back(page + i * n_slice);
    }
}

staging_buffer::~staging_buffer() {
    if (reserved != nullptr) {
        address_release(reserved, bytes() + huge_page);
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
