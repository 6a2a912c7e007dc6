// Preloaded by the tests of faults: makes reads or writes of one file fail when told to.
//
// FAULT_PATH is how the file's path begins. fault_arm(after, count, kind) lets `after` reads of it pass and spoils the
// next `count`; fault_count() says how many were spoiled. Writes are spoiled by kinds FAULT_NOSPC and FAULT_BADDISK
// only.
//
// FAULT_LATE_MS=N: the first spoiled read takes so long, the next one twice that: it fails when others have gone on.
// FAULT_WRITES=AFTER,KIND arms writes from the start, all that come AFTER so many. FAULT_NO names what the system does
// not have: "tmpfile" files without a name, "fallocate" room that is promised, "proc" /proc/self/fd, "amx" tiles of the
// processor (ggml then takes the repacked layout, as everywhere else).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum kind {
    FAULT_EIO = 0,
    FAULT_SHORT = 1,  // half of what was asked for
    FAULT_UNEVEN = 2, // an odd number of bytes
    FAULT_END = 3,    // as at the end of the file
    FAULT_EINTR = 4,
    FAULT_NODIRECT = 5, // EINVAL from descriptors that were opened with O_DIRECT
    FAULT_NOSPC = 6,    // of writes
    FAULT_BADDISK = 7,  // of writes: EIO
};

static atomic_int n_before, n_left, n_spoiled, what;

void fault_arm(int after, int count, int kind) {
    n_before = after;
    n_spoiled = 0;
    what = kind;
    n_left = count;
}

int fault_count(void) {
    return n_spoiled;
}

static int writes_only(void) {
    return what == FAULT_NOSPC || what == FAULT_BADDISK;
}

static int has_no(const char * name) {
    const char * missing = getenv("FAULT_NO");
    return missing != NULL && strstr(missing, name) != NULL;
}

__attribute__((constructor)) static void arm_from_environment(void) {
    const char * given = getenv("FAULT_WRITES");
    int after, kind;
    if (given != NULL && sscanf(given, "%d,%d", &after, &kind) == 2) {
        fault_arm(after, 1 << 30, kind);
    }
}

static ssize_t real_readlink(const char * path, char * to, size_t size) {
    return ((ssize_t(*)(const char *, char *, size_t)) dlsym(RTLD_NEXT, "readlink"))(path, to, size);
}

static int is_ours(int fd) {
    const char * path = getenv("FAULT_PATH");
    char link[64], name[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n = real_readlink(link, name, sizeof(name) - 1);
    if (path == NULL || n < 0) {
        return 0;
    }
    name[n] = 0;
    return strncmp(name, path, strlen(path)) == 0;
}

static ssize_t spoiled_pread(ssize_t (*next)(int, void *, size_t, off_t), int fd, void * buf, size_t n, off_t offset) {
    if (n_left <= 0 || writes_only() || !is_ours(fd) ||
        (what == FAULT_NODIRECT && (fcntl(fd, F_GETFL) & O_DIRECT) == 0)) {
        return next(fd, buf, n, offset);
    }
    if (atomic_fetch_sub(&n_before, 1) > 0 || atomic_fetch_sub(&n_left, 1) <= 0) {
        return next(fd, buf, n, offset);
    }
    n_spoiled++;
    if (getenv("FAULT_LATE_MS") != NULL) {
        usleep(1000 * (useconds_t) (atoi(getenv("FAULT_LATE_MS")) * n_spoiled));
    }
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
    return spoiled_pread((ssize_t(*)(int, void *, size_t, off_t)) dlsym(RTLD_NEXT, "pread"), fd, buf, n, offset);
}

ssize_t pread64(int fd, void * buf, size_t n, off_t offset) {
    return spoiled_pread((ssize_t(*)(int, void *, size_t, off_t)) dlsym(RTLD_NEXT, "pread64"), fd, buf, n, offset);
}

static ssize_t spoiled_pwrite(const char * name, int fd, const void * buf, size_t n, off_t offset) {
    if (n_left > 0 && writes_only() && is_ours(fd) && atomic_fetch_sub(&n_before, 1) <= 0 &&
        atomic_fetch_sub(&n_left, 1) > 0) {
        n_spoiled++;
        errno = what == FAULT_NOSPC ? ENOSPC : EIO;
        return -1;
    }
    return ((ssize_t(*)(int, const void *, size_t, off_t)) dlsym(RTLD_NEXT, name))(fd, buf, n, offset);
}

ssize_t pwrite(int fd, const void * buf, size_t n, off_t offset) {
    return spoiled_pwrite("pwrite", fd, buf, n, offset);
}

ssize_t pwrite64(int fd, const void * buf, size_t n, off_t offset) {
    return spoiled_pwrite("pwrite64", fd, buf, n, offset);
}

static int real_openat(const char * name, int folder, const char * path, int flags, mode_t mode) {
    if ((flags & O_TMPFILE) == O_TMPFILE && has_no("tmpfile")) {
        errno = EOPNOTSUPP;
        return -1;
    }
    if (strncmp(path, "/proc/self/fd/", 14) == 0 && has_no("proc")) {
        errno = ENOENT;
        return -1;
    }
    return ((int (*)(int, const char *, int, ...)) dlsym(RTLD_NEXT, name))(folder, path, flags, mode);
}

int openat(int folder, const char * path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = va_arg(more, mode_t); // junk where there is none, and then nobody reads it
    va_end(more);
    return real_openat("openat", folder, path, flags, mode);
}

int openat64(int folder, const char * path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return real_openat("openat64", folder, path, flags, mode);
}

ssize_t readlink(const char * path, char * to, size_t size) {
    if (strncmp(path, "/proc/self/fd/", 14) == 0 && has_no("proc")) {
        errno = ENOENT;
        return -1;
    }
    return real_readlink(path, to, size);
}

int access(const char * path, int mode) {
    if (strncmp(path, "/proc/self/fd", 13) == 0 && has_no("proc")) {
        errno = ENOENT;
        return -1;
    }
    return ((int (*)(const char *, int)) dlsym(RTLD_NEXT, "access"))(path, mode);
}

static int real_fallocate(const char * name, int fd, int mode, off_t offset, off_t size) {
    if (has_no("fallocate")) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return ((int (*)(int, int, off_t, off_t)) dlsym(RTLD_NEXT, name))(fd, mode, offset, size);
}

int fallocate(int fd, int mode, off_t offset, off_t size) {
    return real_fallocate("fallocate", fd, mode, offset, size);
}

int fallocate64(int fd, int mode, off_t offset, off_t size) {
    return real_fallocate("fallocate64", fd, mode, offset, size);
}

long syscall(long number, ...) {
    va_list more;
    va_start(more, number);
    long a[6];
    for (int i = 0; i < 6; ++i) {
        a[i] = va_arg(more, long);
    }
    va_end(more);
#ifdef SYS_arch_prctl
    if (number == SYS_arch_prctl && has_no("amx")) {
        errno = EOPNOTSUPP;
        return -1;
    }
#endif
    return ((long (*)(long, ...)) dlsym(RTLD_NEXT, "syscall"))(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
