#include "io/read_trace.h"

#include "base/stream.h"
#include "llama-impl.h"

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace superllama {

static const auto t_load = std::chrono::steady_clock::now();

std::shared_ptr<read_trace> read_trace::of_process() {
    static std::mutex mutex;
    static std::weak_ptr<read_trace> shared;
    const char * path = getenv("SUPERLLAMA_READER_TRACE");
    if (path == nullptr || path[0] == '\0') {
        return nullptr;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<read_trace> trace = shared.lock();
    if (trace == nullptr) {
        FILE * out = open_stream(path, 'w');
        if (out == nullptr) {
            LLAMA_LOG_WARN("SUPERLLAMA_READER_TRACE: cannot write %s: %s\n", path, strerror(errno));
            return nullptr;
        }
        trace = std::make_shared<read_trace>(out);
        shared = trace;
    }
    return trace;
}

read_trace::read_trace(FILE * out) : out(out) {
    setvbuf(out, nullptr, _IOFBF, 1u << 20); // a trace that writes while it watches would disturb what it sees
    fprintf(out, "# superllama-reader-trace 1\n");
}

read_trace::~read_trace() {
    fclose(out);
}

int read_trace::add_file(const std::string & path) {
    const std::lock_guard<std::mutex> lock(mutex);
    fprintf(out, "file %d %s\n", n_files, path.c_str());
    return n_files++;
}

void read_trace::add_read(int file, uint64_t offset, size_t bytes) {
    using namespace std::chrono;
    const auto t_us = (long long) duration_cast<microseconds>(steady_clock::now() - t_load).count();
    const std::lock_guard<std::mutex> lock(mutex);
    fprintf(out, "%lld %llu %zu %d\n", t_us, (unsigned long long) offset, bytes, file);
}

} // namespace superllama
