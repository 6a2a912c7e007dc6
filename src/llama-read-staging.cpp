#include "llama-read-staging.h"

#include "llama-address-space.h"

#include <algorithm>

// slices of 1 MiB for six readers
static const size_t n_pages = 3;

size_t llama_read_staging::bytes() {
    return n_pages * llama_huge_page;
}

llama_read_staging::llama_read_staging(int n_readers) : reserved(llama_address_reserve(bytes() + llama_huge_page)) {
    const auto n_slices = (size_t) std::clamp(n_readers, 1, 8);
    n_slice = bytes() / n_slices / llama_system_page() * llama_system_page();
    if (reserved == nullptr) {
        return;
    }
    uint8_t * page = (uint8_t *) llama_round_up((size_t) reserved, llama_huge_page);
    llama_address_huge_pages(page, bytes());
    for (size_t i = 0; i < n_slices; ++i) {
        free.push_back(page + i * n_slice);
    }
}

llama_read_staging::~llama_read_staging() {
    if (reserved != nullptr) {
        llama_address_release(reserved, bytes() + llama_huge_page);
    }
}

uint8_t * llama_read_staging::take() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (free.empty()) {
        return nullptr;
    }
    uint8_t * slice = free.back();
    free.pop_back();
    return slice;
}

void llama_read_staging::give_back(uint8_t * slice) {
    const std::lock_guard<std::mutex> lock(mutex);
    free.push_back(slice);
}
