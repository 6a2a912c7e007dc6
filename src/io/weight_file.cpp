#include "io/weight_file.h"

#include "io/read_trace.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#ifdef __linux__
#    include <fcntl.h>
#    include <sys/stat.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifdef __linux__

bool weight_file::supported() {
    return true;
}

static int64_t mtime_of(const struct stat & st) {
    return (int64_t) st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
}

weight_file::weight_file(int fd_given) {
    const std::string link = "/proc/self/fd/" + std::to_string(fd_given);
    char path[4096];
    const ssize_t n = readlink(link.c_str(), path, sizeof(path));
    name = n > 0 ? std::string(path, (size_t) n) : "a model file";
    struct stat st = {};
    fd = open(link.c_str(), O_RDONLY | O_CLOEXEC);
    fd_direct = open(link.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd < 0 || fstat(fd, &st) != 0) {
        throw std::runtime_error("cannot open " + name + " again for reading: " + strerror(errno));
    }
    size = (uint64_t) st.st_size;
    mtime_ns = mtime_of(st);
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    trace = read_trace::of_process();
    trace_id = trace ? trace->add_file(name) : 0;
}

weight_file::~weight_file() {
    for (int f : { fd_direct, fd }) {
        if (f >= 0) {
            close(f);
        }
    }
}

bool weight_file::failed(std::string * error, size_t bytes, uint64_t offset, const std::string & why) const {
    *error =
        "reading " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " + name + ": " + why;
    return false;
}

bool weight_file::read_pages(uint8_t * addr, size_t bytes, uint64_t offset, std::string * error) const {
    const size_t wanted = (size_t) std::min<uint64_t>(bytes, size - std::min(size, offset));
    int from = fd_direct >= 0 ? fd_direct : fd;
    for (size_t done = 0; done < wanted;) {
        const ssize_t n = pread(from, addr + done, bytes - done, (off_t) (offset + done));
        if (n > 0) {
            // a direct read that stops between two sectors cannot be continued directly
            done += (size_t) n;
            from = from == fd_direct && done % 512 != 0 ? fd : from;
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && errno == EINVAL && from == fd_direct) {
            from = fd;
        } else {
            const std::string end = "the file ends at " + std::to_string(offset + done) + ", it was cut short";
            return failed(error, wanted, offset, n < 0 ? strerror(errno) : end);
        }
    }
    if (from == fd) {
        posix_fadvise(fd, (off_t) offset, (off_t) bytes, POSIX_FADV_DONTNEED); // not in memory twice
    }
    if (trace) {
        trace->add_read(trace_id, offset, wanted);
    }
    return true;
}

bool weight_file::read_bytes(void * data, size_t bytes, uint64_t offset, std::string * error) const {
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = pread(fd, (uint8_t *) data + done, bytes - done, (off_t) (offset + done));
        if (n > 0) {
            done += (size_t) n;
        } else if (!(n < 0 && errno == EINTR)) {
            return failed(error, bytes, offset, n < 0 ? strerror(errno) : "the file ends, it was cut short");
        }
    }
    posix_fadvise(fd, (off_t) offset, (off_t) bytes, POSIX_FADV_DONTNEED);
    if (trace) {
        trace->add_read(trace_id, offset, bytes);
    }
    return true;
}

bool weight_file::unchanged(std::string * error) const {
    struct stat st = {};
    if (fstat(fd, &st) == 0 && (uint64_t) st.st_size == size && mtime_of(st) == mtime_ns) {
        return true;
    }
    *error = name + " changed while the model was in use (it had " + std::to_string(size) + " bytes, now " +
             std::to_string((uint64_t) st.st_size) + "); load the model again";
    return false;
}

#else

bool weight_file::supported() {
    return false;
}

weight_file::weight_file(int) {
    throw std::runtime_error("--dynamic-layers is not supported on this system yet");
}

weight_file::~weight_file() = default;

bool weight_file::failed(std::string * error, size_t, uint64_t, const std::string & why) const {
    *error = why;
    return false;
}

bool weight_file::read_pages(uint8_t *, size_t bytes, uint64_t offset, std::string * error) const {
    return failed(error, bytes, offset, "not supported on this system");
}

bool weight_file::read_bytes(void *, size_t bytes, uint64_t offset, std::string * error) const {
    return failed(error, bytes, offset, "not supported on this system");
}

bool weight_file::unchanged(std::string *) const {
    return true;
}

#endif

std::string weight_file::content_key() const {
    return std::to_string(size) + "@" + std::to_string(mtime_ns);
}

} // namespace superllama
