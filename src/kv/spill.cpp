#include "kv/spill.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifndef _WIN32
#endif

#ifndef _WIN32
#    include <fcntl.h>
#    include <sys/stat.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifndef _WIN32

bool kv_spill::is_supported() {
    return true;
}

int64_t kv_spill::system::read(int fd, void * data, size_t size, int64_t offset) {
    return pread(fd, data, size, (off_t) offset);
}

int64_t kv_spill::system::write(int fd, const void * data, size_t size, int64_t offset) {
    return pwrite(fd, data, size, (off_t) offset);
}

static int open_unnamed(const std::string & dir) {
#    ifdef O_TMPFILE
    const int fd = open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0) {
        return fd;
    }
#    endif
    std::string path = dir + "/superllama-kv-XXXXXX";
    const int named = mkstemp(&path[0]); // mode 0600
    if (named >= 0) {
        fcntl(named, F_SETFD, FD_CLOEXEC);
        unlink(path.c_str());
    }
    return named;
}

// Past the page cache, which would hold the pages a second time.
static bool set_direct(int fd) {
#    if defined(O_DIRECT)
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) != 0) {
        return false;
    }
    // some file systems take the flag and refuse the write
    void * block = nullptr;
    if (posix_memalign(&block, kv_spill::alignment, kv_spill::alignment) != 0) {
        return false;
    }
    memset(block, 0, kv_spill::alignment);
    const bool ok = pwrite(fd, block, kv_spill::alignment, 0) == (ssize_t) kv_spill::alignment;
    free(block);
    if (!ok) {
        fcntl(fd, F_SETFL, flags);
    }
    return ok;
#    elif defined(F_NOCACHE)
    return fcntl(fd, F_NOCACHE, 1) == 0;
#    else
    (void) fd;
    return false;
#    endif
}

kv_spill::kv_spill(const std::string & dir_, size_t record_bytes, system * sys_) :
    dir(dir_),
    record_bytes(record_bytes),
    sys(sys_ ? sys_ : &sys_default) {
    if (dir.empty()) {
        const char * tmp = getenv("TMPDIR");
        dir = tmp != nullptr && tmp[0] != '\0' ? tmp : "/tmp";
    }
    fd = open_unnamed(dir);
    if (fd < 0) {
        throw std::runtime_error("cannot make a KV spill file in " + dir + ": " + strerror(errno) +
                                 "; name a folder that exists and is writable with --spill-dir");
    }
    direct = set_direct(fd);
    if (ftruncate(fd, 0) != 0) {
        direct = false; // nothing depends on it
    }
}

kv_spill::~kv_spill() {
    close(fd);
}

void kv_spill::clear() {
    n_records = 0;
    freed.clear();
    if (ftruncate(fd, 0) != 0) {
        return; // the space is used again by the next records
    }
}

bool kv_spill::read(int64_t record, size_t offset, void * data, size_t size, std::string * error) const {
    const int64_t begin = record * (int64_t) record_bytes + (int64_t) offset;
    size_t done = 0;
    while (done < size) {
        const int64_t n = sys->read(fd, (char *) data + done, size - done, begin + (int64_t) done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            *error = "cannot read a KV page from the spill file in " + dir + ": " +
                     (n < 0 ? strerror(errno) : "the file is shorter than what was written");
            return false;
        }
        done += (size_t) n;
    }
#    if defined(POSIX_FADV_DONTNEED)
    if (!direct) {
        posix_fadvise(fd, (off_t) begin, (off_t) size, POSIX_FADV_DONTNEED);
    }
#    endif
    return true;
}

bool kv_spill::write(int64_t record, size_t offset, const void * data, size_t size, std::string * error) {
    const int64_t begin = record * (int64_t) record_bytes + (int64_t) offset;
    size_t done = 0;
    while (done < size) {
        const int64_t n = sys->write(fd, (const char *) data + done, size - done, begin + (int64_t) done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        // a short write is tried again from where it ended, on an aligned offset: direct I/O wants that
        const size_t whole = n > 0 ? ((done + (size_t) n) / alignment) * alignment - done : 0;
        if (n <= 0 || whole == 0) {
            const int reason = n < 0 ? errno : ENOSPC;
            *error = "cannot write a KV page to the spill file in " + dir + ": " + strerror(reason) +
                     "; free disk space, or name another folder with --spill-dir, or raise --kv-budget";
            return false;
        }
        done += whole;
    }
#    if defined(__linux__) && defined(POSIX_FADV_DONTNEED)
    if (!direct) { // only clean pages can be forgotten
        sync_file_range(fd, (off_t) begin, (off_t) size,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
        posix_fadvise(fd, (off_t) begin, (off_t) size, POSIX_FADV_DONTNEED);
    }
#    endif
    return true;
}

#else // _WIN32

bool kv_spill::is_supported() {
    return false;
}

int64_t kv_spill::system::read(int, void *, size_t, int64_t) {
    return -1;
}

int64_t kv_spill::system::write(int, const void *, size_t, int64_t) {
    return -1;
}

kv_spill::kv_spill(const std::string & dir, size_t record_bytes, system *) :
    dir(dir),
    record_bytes(record_bytes),
    sys(&sys_default) {
    throw std::runtime_error("KV pages do not spill on this system");
}

kv_spill::~kv_spill() {}

void kv_spill::clear() {}

bool kv_spill::read(int64_t, size_t, void *, size_t, std::string *) const {
    return false;
}

bool kv_spill::write(int64_t, size_t, const void *, size_t, std::string *) {
    return false;
}

#endif

int64_t kv_spill::acquire() {
    if (freed.empty()) {
        return n_records++;
    }
    const int64_t record = freed.back();
    freed.pop_back();
    return record;
}

void kv_spill::release(int64_t record) {
    freed.push_back(record);
}

} // namespace superllama
