// The spill file of a KV cache: records of one size, read and written in parts. It has no name from the
// moment it exists, and belongs to its owner only.
#pragma once

#include "io/file.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace superllama {

class kv_spill {
  public:
    static const size_t alignment = 4096; // of offsets, sizes and memory, for direct I/O

    // dir "" is the system's temporary folder, or another one where that is memory. Throws std::runtime_error where no
    // file can be made.
    kv_spill(const std::string & dir, size_t record_bytes, file_calls * sys = nullptr);
    kv_spill(const kv_spill &) = delete;
    kv_spill & operator=(const kv_spill &) = delete;

    // Records; one thread at a time.
    int64_t acquire();
    void release(int64_t record);
    void clear(); // all of them, and the disk space

    // `data`, `offset` and `size` aligned; reads may run in several threads. After a failed write what the
    // record held there is undefined.
    bool read(int64_t record, size_t offset, void * data, size_t size, std::string * error) const;
    bool write(int64_t record, size_t offset, const void * data, size_t size, std::string * error);

    const std::string & folder() const { return dir; }
    bool is_memory() const; // what is spilled stays in memory: its folder lies on a filesystem that is
    bool is_direct() const { return direct; } // false: through the page cache, which is asked to forget

    static bool is_supported(); // on this system

  private:
    std::string dir;
    size_t record_bytes;
    file_calls * sys;
    descriptor file;
    bool direct = false;
    int64_t n_records = 0;
    std::vector<int64_t> freed;
};

} // namespace superllama
