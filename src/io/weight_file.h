// A file that weights are read from: a model file, or the file of repacked blocks.
#pragma once

#include "io/file.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace superllama {

class read_trace;

// Memory for a read of so many bytes from anywhere in a file: whole pages, for they are what is read.
class page_buffer {
  public:
    explicit page_buffer(size_t bytes); // throws std::bad_alloc
    ~page_buffer();

    page_buffer(const page_buffer &) = delete;
    page_buffer & operator=(const page_buffer &) = delete;

    static size_t memory_bytes(size_t bytes);

    uint8_t * data() const { return memory; }

  private:
    uint8_t * memory;
};

class weight_file {
  public:
    // Opens the file behind fd once more, with O_DIRECT where the filesystem allows it; where it cannot be opened again
    // (no /proc, another user's file) through a duplicate of fd. Throws.
    explicit weight_file(int fd);
    ~weight_file();

    weight_file(const weight_file &) = delete;
    weight_file & operator=(const weight_file &) = delete;

    // Any thread; nothing that is read stays in the page cache. False with a message that has path, offset and reason.
    // Whole pages to a page-aligned address; what lies beyond the end of the file is left as it is.
    bool read_pages(uint8_t * addr, size_t bytes, uint64_t offset, std::string * error) const;

    // Any bytes; where they are in the buffer, or null.
    const uint8_t * read_bytes(const page_buffer & to, size_t bytes, uint64_t offset, std::string * error) const;

    // Remembers what lies in the pages of these offsets.
    bool take_samples(std::vector<uint64_t> offsets, std::string * error);

    // Whether the content is what it was when the file was opened. A time that changed says nothing about that: then
    // the samples are read again, once for each change.
    bool unchanged(std::string * error);

    uint64_t fingerprint() const; // of size and samples: equal for copies
    uint64_t identity() const;    // of which file it is and when it was written: differs for copies

    const std::string & path() const { return name; }
    uint64_t bytes() const { return size; }

    void remove_name() const; // from its folder, unless another file has it by now

    static bool supported(); // on this system

  private:
    struct version { // what the system says about content: it changes with every write, and with touch
        int64_t written_ns;
        int64_t changed_ns;
    };

    bool failed(std::string * error, size_t bytes, uint64_t offset, const std::string & why) const;
    bool reopen(int other, int flags);
    int buffered() const;
    bool hash_page(uint64_t offset, uint8_t * page, uint64_t * hash, std::string * error) const;

    std::string name;
    descriptor file;
    bool direct = false;
    uint64_t size = 0;

    // opened where direct reads are refused, or end within a sector
    mutable std::mutex mutex;
    mutable descriptor second;

    version seen = {};      // by the last look
    uint64_t opened_as = 0; // identity
    std::vector<uint64_t> sample_offsets;
    std::vector<uint64_t> sample_hashes;

    std::shared_ptr<read_trace> trace; // null unless asked for
    int trace_id = 0;
};

} // namespace superllama
