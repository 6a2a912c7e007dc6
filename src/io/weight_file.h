// A file that weights are read from: a model file, or the sidecar of repacked blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace superllama {

class read_trace;

class weight_file {
  public:
    // Opens the file behind fd once more, with O_DIRECT where the filesystem allows it. Throws.
    explicit weight_file(int fd);
    ~weight_file();

    weight_file(const weight_file &) = delete;
    weight_file & operator=(const weight_file &) = delete;

    // Any thread; nothing that is read stays in the page cache. False with a message that has path, offset and reason.
    // Whole pages to a page-aligned address; what lies beyond the end of the file is left as it is.
    bool read_pages(uint8_t * addr, size_t bytes, uint64_t offset, std::string * error) const;
    bool read_bytes(void * data, size_t bytes, uint64_t offset, std::string * error) const;

    bool unchanged(std::string * error) const; // neither size nor time of modification
    std::string content_key() const;           // differs where these differ

    const std::string & path() const { return name; }

    static bool supported(); // on this system

  private:
    bool failed(std::string * error, size_t bytes, uint64_t offset, const std::string & why) const;

    std::string name;
    int fd_direct = -1; // -1: the filesystem refuses O_DIRECT
    int fd = -1;
    uint64_t size = 0;
    int64_t mtime_ns = 0;
    std::shared_ptr<read_trace> trace; // null unless asked for
    int trace_id = 0;
};

} // namespace superllama
