// Reads into small pages go through huge pages that all readers share, and are copied from there: a drive fills a few
// large pieces of memory much faster than many small ones, where every 4 KiB are an entry of their own in its queue.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

class llama_read_staging {
  public:
    static size_t bytes(); // of memory

    // Slices for so many readers. Where there is no memory for it, take() finds none.
    explicit llama_read_staging(int n_readers);
    ~llama_read_staging();

    llama_read_staging(const llama_read_staging &) = delete;
    llama_read_staging & operator=(const llama_read_staging &) = delete;

    size_t slice_bytes() const { return n_slice; }
    uint8_t * take(); // null: all are in use. Any thread
    void give_back(uint8_t * slice);

  private:
    uint8_t * reserved;
    size_t n_slice;

    std::mutex mutex;
    std::vector<uint8_t *> free;
};
