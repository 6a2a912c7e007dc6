// Reads into small pages go through huge pages that all readers share, and are copied from there: a drive fills a few
// large pieces of memory much faster than many small ones, where every 4 KiB are an entry of their own in its queue.
#pragma once

#include "io/address_space.h"

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace superllama {

class staging_buffer {
  public:
    static size_t bytes(); // of memory

    explicit staging_buffer(int n_readers); // slices for so many; throws where there is no memory

    size_t slice_bytes() const { return n_slice; }
    uint8_t * take(); // null: all are in use. Any thread
    void give_back(uint8_t * slice);

  private:
    address_range range;
    size_t n_slice;

    std::mutex mutex;
    std::vector<uint8_t *> free;
};

} // namespace superllama
