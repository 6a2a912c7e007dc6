// Preloaded by the tests of faults: makes reads or writes of one file fail when told to.
//
// FAULT_PATH is how the file's path begins. fault_arm(after, count, kind) lets `after` reads of it pass and spoils the
// next `count`; fault_count() says how many were spoiled. Writes are spoiled by kind FAULT_NOSPC only.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum kind {
    FAULT_EIO      = 0,
    FAULT_SHORT    = 1, // half of what was asked for
    FAULT_UNEVEN   = 2, // an odd number of bytes
    FAULT_END      = 3, // as at the end of the file
    FAULT_EINTR    = 4,
    FAULT_NODIRECT = 5, // EINVAL from descriptors that were opened with O_DIRECT
    FAULT_NOSPC    = 6, // of writes
};

static atomic_int n_before, n_left, n_spoiled, what;

void fault_arm(int after, int count, int kind) {
    n_before  = after;
    n_spoiled = 0;
    what      = kind;
    n_left    = count;
}

int fault_count(void) {
    return n_spoiled;
}

static int is_ours(int fd) {
    const char * path = getenv("FAULT_PATH");
    char         link[64], name[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, name, sizeof(name) - 1);
    if (path == NULL || n < 0) {
        return 0;
    }
    name[n] = 0;
    return strncmp(name, path, strlen(path)) == 0;
}

static ssize_t spoiled_pread(ssize_t (*next)(int, void *, size_t, off_t), int fd, void * buf, size_t n, off_t offset) {
    if (n_left <= 0 || what == FAULT_NOSPC || !is_ours(fd) ||
        (what == FAULT_NODIRECT && (fcntl(fd, F_GETFL) & O_DIRECT) == 0)) {
        return next(fd, buf, n, offset);
    }
    if (atomic_fetch_sub(&n_before, 1) > 0 || atomic_fetch_sub(&n_left, 1) <= 0) {
        return next(fd, buf, n, offset);
    }
    n_spoiled++;
    switch (what) {
        case FAULT_SHORT:
            return next(fd, buf, n >= 8192 ? n / 2 / 4096 * 4096 : n, offset);
        case FAULT_UNEVEN: {
            const ssize_t got = next(fd, buf, n, offset);
            return got > 1001 ? 1001 : got;
        }
        case FAULT_END:
            return 0;
        case FAULT_EINTR:
            errno = EINTR;
            return -1;
        case FAULT_NODIRECT:
            errno = EINVAL;
            return -1;
        default:
            errno = EIO;
            return -1;
    }
}

ssize_t pread(int fd, void * buf, size_t n, off_t offset) {
    return spoiled_pread((ssize_t (*)(int, void *, size_t, off_t)) dlsym(RTLD_NEXT, "pread"), fd, buf, n, offset);
}

ssize_t pread64(int fd, void * buf, size_t n, off_t offset) {
    return spoiled_pread((ssize_t (*)(int, void *, size_t, off_t)) dlsym(RTLD_NEXT, "pread64"), fd, buf, n, offset);
}

static ssize_t spoiled_pwrite(const char * name, int fd, const void * buf, size_t n, off_t offset) {
    if (n_left > 0 && what == FAULT_NOSPC && is_ours(fd) && atomic_fetch_sub(&n_before, 1) <= 0 &&
        atomic_fetch_sub(&n_left, 1) > 0) {
        n_spoiled++;
        errno = ENOSPC;
        return -1;
    }
    return ((ssize_t (*)(int, const void *, size_t, off_t)) dlsym(RTLD_NEXT, name))(fd, buf, n, offset);
}

ssize_t pwrite(int fd, const void * buf, size_t n, off_t offset) {
    return spoiled_pwrite("pwrite", fd, buf, n, offset);
}

ssize_t pwrite64(int fd, const void * buf, size_t n, off_t offset) {
    return spoiled_pwrite("pwrite64", fd, buf, n, offset);
}
