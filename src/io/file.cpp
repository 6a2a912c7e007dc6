#include "io/file.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#ifndef _WIN32
#    include <fcntl.h>
#    include <signal.h>
#    include <sys/resource.h>
#    include <sys/stat.h>
#    include <sys/statvfs.h>
#    include <unistd.h>
#endif

#ifdef __linux__
#    include <sys/vfs.h>
#endif

namespace superllama {

int descriptor::release() {
    const int was = fd;
    fd = -1;
    return was;
}

file_calls & file_calls::of_system() {
    static file_calls calls;
    return calls;
}

file_result read_exact(int fd, void * data, size_t bytes, uint64_t offset, size_t alignment, file_calls & calls) {
    file_result result = { 0, 0 };
    while (result.done < bytes) {
        const int64_t n =
            calls.read(fd, (uint8_t *) data + result.done, bytes - result.done, (int64_t) (offset + result.done));
        if (n > 0) {
            result.done += (size_t) n;
            if (result.done % alignment != 0) {
                break;
            }
        } else if (n == 0 || errno != EINTR) {
            result.error = n < 0 ? errno : 0;
            break;
        }
    }
    return result;
}

#ifndef _WIN32

void descriptor::reset(int other) {
    if (fd >= 0) {
        close(fd);
    }
    fd = other;
}

int64_t file_calls::read(int fd, void * data, size_t bytes, int64_t offset) {
    return pread(fd, data, bytes, (off_t) offset);
}

int64_t file_calls::write(int fd, const void * data, size_t bytes, int64_t offset) {
    return pwrite(fd, data, bytes, (off_t) offset);
}

int open_at(int folder, const char * path, int flags, unsigned mode) {
    int fd;
    do {
        fd = openat(folder, path, flags | O_CLOEXEC, (mode_t) mode);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

namespace {

// A write beyond the limit of file sizes sends SIGXFSZ, which ends a process that did not ask for it. Blocked in this
// thread it is an error like any other; what arrived meanwhile is taken away, unless it had been waiting before.
class no_size_signal {
  public:
    no_size_signal() {
        sigset_t pending;
        sigpending(&pending);
        waited = sigismember(&pending, SIGXFSZ) == 1;
        sigemptyset(&signals);
        sigaddset(&signals, SIGXFSZ);
        pthread_sigmask(SIG_BLOCK, &signals, &before);
    }
    ~no_size_signal() {
        const int error = errno;
        sigset_t pending;
        sigpending(&pending);
        if (!waited && sigismember(&pending, SIGXFSZ) == 1) {
            int taken;
            sigwait(&signals, &taken);
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        errno = error;
    }

  private:
    sigset_t signals, before;
    bool waited;
};

} // namespace

file_result write_exact(int fd, const void * data, size_t bytes, uint64_t offset, size_t alignment,
                        file_calls & calls) {
    const no_size_signal guard;
    file_result result = { 0, 0 };
    while (result.done < bytes) {
        const int64_t n = calls.write(fd, (const uint8_t *) data + result.done, bytes - result.done,
                                      (int64_t) (offset + result.done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        const size_t end = result.done + (size_t) (n > 0 ? n : 0);
        const size_t whole = end == bytes ? end : end / alignment * alignment;
        if (whole <= result.done) { // the disk took nothing, or less than can be gone on from
            result.error = n < 0 ? errno : ENOSPC;
            break;
        }
        result.done = whole;
    }
    return result;
}

bool is_memory(int fd) {
#    ifdef __linux__
    struct statfs fs = {};
    return fstatfs(fd, &fs) == 0 && (fs.f_type == 0x01021994 /* tmpfs */ || fs.f_type == 0x858458f6 /* ramfs */);
#    else
    (void) fd;
    return false;
#    endif
}

uint64_t free_bytes(int fd) {
    struct statvfs fs = {};
    return fstatvfs(fd, &fs) == 0 ? (uint64_t) fs.f_bavail * fs.f_frsize : 0;
}

int reserve_file(int fd, uint64_t bytes) {
    const no_size_signal guard;
    // asked first: a call that finds too little room takes all there is before it fails, from everybody else
    if (free_bytes(fd) < bytes) {
        return ENOSPC;
    }
    int error = EOPNOTSUPP;
#    ifdef __linux__
    // not posix_fallocate(): where the filesystem has none, it writes a byte to every block, which direct I/O refuses
    do {
        error = fallocate(fd, 0, 0, (off_t) bytes) == 0 ? 0 : errno;
    } while (error == EINTR);
#    endif
    if (error != EOPNOTSUPP && error != ENOSYS && error != EINVAL) {
        return error;
    }
    do {
        error = ftruncate(fd, (off_t) bytes) == 0 ? 0 : errno;
    } while (error == EINTR);
    return error;
}

bool make_direct(int fd) {
#    if defined(O_DIRECT)
    static const size_t block_bytes = 4096;
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) != 0) {
        return false;
    }
    // some filesystems take the flag and refuse the write
    void * block = nullptr;
    if (posix_memalign(&block, block_bytes, block_bytes) == 0) {
        memset(block, 0, block_bytes);
        const bool ok = write_exact(fd, block, block_bytes, 0, block_bytes).error == 0;
        free(block);
        if (ok) {
            return true;
        }
    }
    fcntl(fd, F_SETFL, flags);
    return false;
#    elif defined(F_NOCACHE)
    return fcntl(fd, F_NOCACHE, 1) == 0;
#    else
    (void) fd;
    return false;
#    endif
}

void forget_read(int fd, uint64_t offset, uint64_t bytes) {
#    if defined(POSIX_FADV_DONTNEED)
    posix_fadvise(fd, (off_t) offset, (off_t) bytes, POSIX_FADV_DONTNEED);
#    else
    (void) fd, (void) offset, (void) bytes;
#    endif
}

void forget_written(int fd, uint64_t offset, uint64_t bytes) {
#    if defined(__linux__)
    sync_file_range(fd, (off_t) offset, (off_t) bytes, // only clean pages can be forgotten
                    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    forget_read(fd, offset, bytes);
#    else
    (void) fd, (void) offset, (void) bytes;
#    endif
}

static std::string limit_of(int resource) {
    struct rlimit limit = {};
    if (getrlimit((decltype(RLIMIT_NOFILE)) resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
        return "a number that the system chooses";
    }
    return std::to_string((unsigned long long) limit.rlim_cur);
}

std::string file_error(int error) {
    std::string text = strerror(error);
    if (error == EMFILE) {
        text += ": this process may have " + limit_of(RLIMIT_NOFILE) + " of them open; raise that with ulimit -n";
    } else if (error == EFBIG) {
        text += ": this process may write " + limit_of(RLIMIT_FSIZE) + " bytes to a file (ulimit -f)";
    }
    return text;
}

#else // _WIN32: nothing of ours reads or writes such files there yet

void descriptor::reset(int other) {
    fd = other;
}

int64_t file_calls::read(int, void *, size_t, int64_t) {
    return -1;
}

int64_t file_calls::write(int, const void *, size_t, int64_t) {
    return -1;
}

std::string file_error(int error) {
    return strerror(error);
}

#endif

} // namespace superllama
