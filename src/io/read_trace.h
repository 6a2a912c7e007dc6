// Every read of weights, as lines of a text file that SUPERLLAMA_READER_TRACE names: the application's side of a study
// of reads from disk.
//
//   # superllama-reader-trace 1
//   file 0 /path/of/the/model.gguf
//   1523 4096 16777216 0        microseconds since the library was loaded, offset in the file, bytes, number of the
//   file
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>

namespace superllama {

class read_trace {
  public:
    // Null where the variable is not set, or the file cannot be written: one line in the log says so.
    static std::shared_ptr<read_trace> of_process();

    explicit read_trace(FILE * out);
    ~read_trace();

    // Any thread. Lines are buffered and written at the latest when the last user is gone.
    int add_file(const std::string & path);
    void add_read(int file, uint64_t offset, size_t bytes);

  private:
    std::mutex mutex;
    FILE * out;
    int n_files = 0;
};

} // namespace superllama
