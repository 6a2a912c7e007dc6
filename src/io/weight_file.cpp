#include "io/weight_file.h"

#include "base/checksum.h"
#include "io/address_space.h"
#include "io/read_trace.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef __linux__
#    include <fcntl.h>
#    include <sys/stat.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifdef __linux__

static const size_t sector = 512; // direct reads are gone on with at multiples of it

size_t page_buffer::memory_bytes(size_t bytes) {
    return round_up(bytes, system_page()) + system_page(); // begins and ends within a page
}

page_buffer::page_buffer(size_t bytes) {
    void * pages = nullptr;
    if (posix_memalign(&pages, system_page(), memory_bytes(bytes)) != 0) {
        throw std::bad_alloc();
    }
    memory = (uint8_t *) pages;
}

page_buffer::~page_buffer() {
    free(memory);
}

bool weight_file::supported() {
    return true;
}

static std::string link_of(int fd) {
    return "/proc/self/fd/" + std::to_string(fd);
}

static int64_t nanoseconds(const struct timespec & t) {
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

weight_file::weight_file(int given) {
    char path[4096];
    const ssize_t n = readlink(link_of(given).c_str(), path, sizeof(path));
    name = n > 0 ? std::string(path, (size_t) n) : "a model file";
    // one descriptor, not two: a model may have hundreds of files, and upstream has each open as well while it loads
    if (!reopen(given, O_RDONLY | O_DIRECT) && !(errno == EINVAL && reopen(given, O_RDONLY)) && errno != EMFILE &&
        errno != ENFILE) {
        file.reset(fcntl(given, F_DUPFD_CLOEXEC, 0));
    }
    struct stat st = {};
    if (!file || fstat(file.get(), &st) != 0) {
        throw std::runtime_error("cannot open " + name + " again for reading: " + file_error(errno));
    }
    direct = (fcntl(file.get(), F_GETFL) & O_DIRECT) != 0;
    size = (uint64_t) st.st_size;
    seen = { nanoseconds(st.st_mtim), nanoseconds(st.st_ctim) };
    // not the device: the same file has another one in every container
    const uint64_t parts[] = { size, (uint64_t) st.st_ino, (uint64_t) seen.written_ns, (uint64_t) seen.changed_ns };
    opened_as = checksum(parts, sizeof(parts));
    if (!direct) {
        posix_fadvise(file.get(), 0, 0, POSIX_FADV_RANDOM);
    }
    trace = read_trace::of_process();
    trace_id = trace ? trace->add_file(name) : 0;
}

weight_file::~weight_file() = default;

bool weight_file::reopen(int other, int flags) {
    file.reset(open_at(AT_FDCWD, link_of(other).c_str(), flags));
    return (bool) file;
}

// A descriptor that is not direct; -1 with errno where there can be none.
int weight_file::buffered() const {
    if (!direct) {
        return file.get();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (!second) {
        second.reset(open_at(AT_FDCWD, link_of(file.get()).c_str(), O_RDONLY));
        if (second) {
            posix_fadvise(second.get(), 0, 0, POSIX_FADV_RANDOM);
        }
    }
    return second.get();
}

bool weight_file::failed(std::string * error, size_t bytes, uint64_t offset, const std::string & why) const {
    *error =
        "reading " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " + name + ": " + why;
    return false;
}

bool weight_file::read_pages(uint8_t * addr, size_t bytes, uint64_t offset, std::string * error) const {
    const size_t wanted = (size_t) std::min<uint64_t>(bytes, size - std::min(size, offset));
    file_result result = { 0, EINVAL };
    if (direct) {
        result = read_exact(file.get(), addr, wanted == 0 ? 0 : bytes, offset, sector);
    }
    // refused, or not to be gone on with directly: the rest by way of the page cache
    if (result.done < wanted && (result.error == EINVAL || result.done % sector != 0)) {
        const int fd = buffered();
        if (fd < 0) {
            return failed(error, wanted, offset, "without direct I/O: " + file_error(errno));
        }
        const size_t done = result.done;
        result = read_exact(fd, addr + done, wanted - done, offset + done);
        result.done += done;
        forget_read(fd, offset, bytes); // not in memory twice
    }
    if (result.done < wanted) {
        const std::string end = "the file ends at " + std::to_string(offset + result.done) + ", it was cut short";
        return failed(error, wanted, offset, result.error != 0 ? file_error(result.error) : end);
    }
    if (trace) {
        trace->add_read(trace_id, offset, wanted);
    }
    return true;
}

const uint8_t * weight_file::read_bytes(const page_buffer & to, size_t bytes, uint64_t offset,
                                        std::string * error) const {
    if (offset + bytes > size) {
        failed(error, bytes, offset, "the file ends at " + std::to_string(size) + ", it was cut short");
        return nullptr;
    }
    const size_t head = offset % system_page();
    const size_t whole = round_up(head + bytes, system_page());
    return read_pages(to.data(), whole, offset - head, error) ? to.data() + head : nullptr;
}

// ---------------------------------------------------------------------------------------------- its content

// Of what lies in a page of the file, which may end in it.
bool weight_file::hash_page(uint64_t offset, uint8_t * page, uint64_t * hash, std::string * error) const {
    const size_t bytes = (size_t) std::min<uint64_t>(system_page(), size - offset);
    if (!read_pages(page, system_page(), offset, error)) {
        return false;
    }
    *hash = checksum(page, bytes);
    return true;
}

bool weight_file::take_samples(std::vector<uint64_t> offsets, std::string * error) {
    for (uint64_t & offset : offsets) {
        offset -= offset % system_page();
    }
    std::sort(offsets.begin(), offsets.end());
    offsets.erase(std::unique(offsets.begin(), offsets.end()), offsets.end());
    while (!offsets.empty() && offsets.back() >= size) {
        offsets.pop_back();
    }
    const page_buffer page(system_page());
    std::vector<uint64_t> hashes(offsets.size());
    for (size_t i = 0; i < offsets.size(); ++i) {
        if (!hash_page(offsets[i], page.data(), &hashes[i], error)) {
            return false;
        }
    }
    sample_offsets = std::move(offsets);
    sample_hashes = std::move(hashes);
    return true;
}

bool weight_file::unchanged(std::string * error) {
    struct stat st = {};
    if (fstat(file.get(), &st) != 0) {
        *error = "looking at " + name + ": " + file_error(errno);
        return false;
    }
    if ((uint64_t) st.st_size != size) {
        *error = name + " changed while the model was in use: it had " + std::to_string(size) + " bytes, now " +
                 std::to_string((uint64_t) st.st_size) + "; load the model again";
        return false;
    }
    const version now = { nanoseconds(st.st_mtim), nanoseconds(st.st_ctim) };
    if (now.written_ns == seen.written_ns && now.changed_ns == seen.changed_ns) {
        return true;
    }
    const page_buffer page(system_page());
    for (size_t i = 0; i < sample_offsets.size(); ++i) {
        uint64_t hash;
        if (!hash_page(sample_offsets[i], page.data(), &hash, error)) {
            return false;
        }
        if (hash != sample_hashes[i]) {
            *error = name + " changed while the model was in use: it still has " + std::to_string(size) +
                     " bytes, but others at offset " + std::to_string(sample_offsets[i]) + "; load the model again";
            return false;
        }
    }
    seen = now;
    return true;
}

uint64_t weight_file::fingerprint() const {
    return checksum(sample_hashes.data(), sample_hashes.size() * sizeof(uint64_t), size);
}

void weight_file::remove_name() const {
    struct stat mine = {}, named = {};
    if (fstat(file.get(), &mine) == 0 && lstat(name.c_str(), &named) == 0 && mine.st_ino == named.st_ino &&
        mine.st_dev == named.st_dev) {
        unlink(name.c_str());
    }
}

#else

page_buffer::page_buffer(size_t) : memory(nullptr) {}

page_buffer::~page_buffer() = default;

size_t page_buffer::memory_bytes(size_t bytes) {
    return bytes;
}

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

const uint8_t * weight_file::read_bytes(const page_buffer &, size_t bytes, uint64_t offset, std::string * error) const {
    failed(error, bytes, offset, "not supported on this system");
    return nullptr;
}

bool weight_file::take_samples(std::vector<uint64_t>, std::string * error) {
    return failed(error, 0, 0, "not supported on this system");
}

bool weight_file::unchanged(std::string *) {
    return true;
}

uint64_t weight_file::fingerprint() const {
    return 0;
}

void weight_file::remove_name() const {}

#endif

uint64_t weight_file::identity() const {
    return opened_as;
}

} // namespace superllama
