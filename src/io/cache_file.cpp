#include "io/cache_file.h"

#include <cerrno>
#include <cstring>

#ifdef __linux__
#    include <dirent.h>
#    include <fcntl.h>
#    include <sys/file.h>
#    include <sys/random.h>
#    include <sys/stat.h>
#    include <sys/vfs.h>
#    include <time.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifdef __linux__

static const char temporary_end[] = ".writing";
static const time_t quiet_s =
    3600; // a writer that wrote nothing for so long is taken for dead, where locks do not tell
static const size_t alignment = 4096;

static bool others_may_write(const struct stat & st) {
    return (st.st_mode & (S_IWGRP | S_IWOTH)) != 0;
}

static bool is_trusted(const struct stat & st) {
    return st.st_uid == geteuid() || st.st_uid == 0;
}

static std::string owner_of(const struct stat & st) {
    return "it belongs to user " + std::to_string(st.st_uid) + ", this is user " + std::to_string(geteuid());
}

// ----------------------------------------------------------------------------------------------- the folder

// The folder and those above it. 0, or an errno.
static int make_folders(const std::string & path) {
    for (size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
        const std::string part = path.substr(0, end);
        struct stat st = {};
        if (mkdir(part.c_str(), 0700) != 0 && errno != EEXIST) {
            const int error = errno; // of a folder that is there, other reasons come first (a read-only filesystem)
            if (stat(part.c_str(), &st) != 0 || !S_ISDIR(st.st_mode)) {
                return error;
            }
        }
        if (end == std::string::npos) {
            return 0;
        }
    }
}

bool cache_dir::open(const std::string & path, const std::string & in, bool make, std::string * why) {
    name = path + "/" + in;
    folder.reset();
    const int error = make ? make_folders(path) : 0;
    if (error != 0) {
        *why = "creating " + path + ": " + strerror(error);
        return false;
    }
    // the place itself may be a link that the user made, to a larger disk; what is in it may not
    const descriptor place(open_at(AT_FDCWD, path.c_str(), O_RDONLY | O_DIRECTORY));
    struct stat st = {}, link = {};
    if (!place || fstat(place.get(), &st) != 0 || lstat(path.c_str(), &link) != 0) {
        *why = path + ": " + file_error(errno);
        return false;
    }
    st = is_trusted(link) ? st : link;
    if (!is_trusted(st)) {
        *why = path + " is not trusted: " + owner_of(st);
        return false;
    }
    if (make && mkdirat(place.get(), in.c_str(), 0700) != 0 && errno != EEXIST && errno != EROFS) {
        *why = "creating " + name + ": " + strerror(errno);
        return false;
    }
    descriptor opened(open_at(place.get(), in.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW));
    if (!opened || fstat(opened.get(), &st) != 0) {
        *why = name + ": " + file_error(errno);
        return false;
    }
    if (!is_trusted(st)) {
        *why = name + " is not trusted: " + owner_of(st);
        return false;
    }
    // one of ours that a generous umask opened to others is closed to them; each file in it has to be ours by itself
    if (others_may_write(st) && (st.st_uid != geteuid() || fchmod(opened.get(), st.st_mode & 0755) != 0)) {
        *why = name + " is not trusted: others may write in it";
        return false;
    }
    folder = std::move(opened);
    return true;
}

descriptor cache_dir::file(const std::string & file_name, int flags, std::string * why) const {
    // a pipe with nobody at its other end must not be waited for
    descriptor opened(open_at(folder.get(), file_name.c_str(), flags | O_NOFOLLOW | O_NONBLOCK));
    const std::string whole = name + "/" + file_name;
    struct stat st = {};
    if (!opened || fstat(opened.get(), &st) != 0) {
        *why = errno == ENOENT ? "there is none yet" : whole + ": " + file_error(errno);
    } else if (!S_ISREG(st.st_mode)) {
        *why = whole + " is not a file";
    } else if (!is_trusted(st)) {
        *why = whole + " is not trusted: " + owner_of(st);
    } else if (others_may_write(st)) {
        *why = whole + " is not trusted: others may write it";
    } else {
        return opened;
    }
    return descriptor();
}

bool cache_dir::has(const std::string & file_name) const {
    return faccessat(folder.get(), file_name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

bool cache_dir::in_memory() const {
    return is_memory(folder.get());
}

// Whether a lock that is taken on one machine, or in one virtual machine, is seen by all that see the file.
static bool locks_are_shared(int fd) {
    struct statfs fs = {};
    if (fstatfs(fd, &fs) != 0) {
        return false;
    }
    switch ((uint32_t) fs.f_type) {
        case 0x6969:     // NFS
        case 0xff534d42: // CIFS
        case 0xfe534d42: // SMB2
        case 0x01021997: // 9P
        case 0x65735546: // FUSE, virtiofs
        case 0x00c36400: // Ceph
        case 0x0bd00bd0: // Lustre
        case 0x47504653: // GPFS
            return false;
        default:
            return true;
    }
}

// Of a temporary file: whether nobody writes it any more. `locked` says whether its name is one of those that are
// locked.
static bool is_dead(int fd, bool locked) {
    struct stat st = {};
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        return false;
    }
    const bool lock_tells = locked && locks_are_shared(fd);
    const bool got = flock(fd, LOCK_EX | LOCK_NB) == 0;
    if (!got && errno == EWOULDBLOCK) {
        return false;
    }
    return (got && lock_tells) || time(nullptr) - st.st_mtime > quiet_s;
}

void cache_dir::remove_leftovers() const {
    const int own = open_at(folder.get(), ".", O_RDONLY | O_DIRECTORY);
    DIR * entries = own >= 0 ? fdopendir(own) : nullptr;
    if (entries == nullptr) {
        descriptor(own).reset();
        return;
    }
    while (const dirent * entry = readdir(entries)) {
        const std::string found = entry->d_name;
        const size_t n = strlen(temporary_end);
        const bool locked = found.size() > n && found.compare(found.size() - n, n, temporary_end) == 0;
        // earlier versions put the number of a process behind the name
        const size_t dot = found.find(".blocks.");
        const bool numbered = dot != std::string::npos && dot + 8 < found.size() &&
                              found.find_first_not_of("0123456789", dot + 8) == std::string::npos;
        if (locked || numbered) {
            const descriptor left(open_at(own, found.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK));
            if (left && is_dead(left.get(), locked)) {
                unlinkat(own, found.c_str(), 0);
            }
        }
    }
    closedir(entries);
}

// ---------------------------------------------------------------------------------------------- a new file

static std::string random_name() {
    uint64_t number[2] = {};
    if (getrandom(number, sizeof(number), 0) != (ssize_t) sizeof(number)) {
        number[0] = (uint64_t) time(nullptr); // O_EXCL decides, a name that is taken is not used
        number[1] = (uint64_t) getpid();
    }
    char text[40];
    snprintf(text, sizeof(text), ".%016llx%016llx", (unsigned long long) number[0], (unsigned long long) number[1]);
    return text + std::string(temporary_end);
}

cache_writer::~cache_writer() {
    if (!temporary.empty()) {
        unlinkat(dir.fd(), temporary.c_str(), 0);
    }
}

bool cache_writer::create(uint64_t bytes, std::string * why) {
    // without a name nothing is left of it when this process is killed; to get one it needs /proc
    if (unnamed && access("/proc/self/fd", X_OK) == 0) {
        handle.reset(open_at(dir.fd(), ".", O_TMPFILE | O_RDWR, 0600));
    }
    unnamed = (bool) handle;
    for (int attempt = 0; !handle && attempt < 16; ++attempt) {
        temporary = random_name();
        handle.reset(open_at(dir.fd(), temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0600));
        if (!handle) {
            const int error = errno;
            temporary.clear();
            errno = error;
            if (error != EEXIST) {
                break;
            }
            continue;
        }
        // another process may have taken it for a leftover, before this lock tells it otherwise
        struct stat st = {};
        flock(handle.get(), LOCK_EX | LOCK_NB);
        if (fstat(handle.get(), &st) == 0 && st.st_nlink == 0) {
            handle.reset();
        }
    }
    if (unnamed) {
        flock(handle.get(), LOCK_EX | LOCK_NB); // it may get such a name for a moment
    }
    if (!handle) {
        *why = "creating a file in " + dir.path() + ": " + file_error(errno);
        return false;
    }
    direct = make_direct(handle.get());
    const int error = reserve_file(handle.get(), bytes);
    if (error == ENOSPC || error == EDQUOT) {
        *why = "no room in " + dir.path() + ": " + std::to_string(bytes >> 20) + " MiB are needed, " +
               std::to_string(free_bytes(handle.get()) >> 20) + " MiB are free" +
               (error == EDQUOT ? std::string(", and ") + strerror(error) : "");
    } else if (error != 0) {
        *why = "a file of " + std::to_string(bytes >> 20) + " MiB in " + dir.path() + ": " + file_error(error);
    }
    return error == 0;
}

bool cache_writer::write(const void * data, size_t bytes, uint64_t offset, std::string * why) {
    const file_result result = write_exact(handle.get(), data, bytes, offset, alignment);
    if (result.done < bytes) {
        *why = "writing " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of a file in " +
               dir.path() + ": " + file_error(result.error);
        return false;
    }
    if (!direct) {
        forget_written(handle.get(), offset, bytes); // now, not all of it at the end
    }
    return true;
}

bool cache_writer::finish(std::string * why) {
    int result;
    do {
        result = fdatasync(handle.get());
    } while (result != 0 && errno == EINTR);
    if (result != 0) {
        *why = "writing a file in " + dir.path() + ": " + file_error(errno);
    }
    return result == 0;
}

bool cache_writer::link_as(const std::string & name) {
    if (!unnamed) {
        return linkat(dir.fd(), temporary.c_str(), dir.fd(), name.c_str(), 0) == 0;
    }
    const std::string link = "/proc/self/fd/" + std::to_string(handle.get());
    return linkat(AT_FDCWD, link.c_str(), dir.fd(), name.c_str(), AT_SYMLINK_FOLLOW) == 0;
}

bool cache_writer::publish(const std::string & name, const std::function<bool()> & is_good, std::string * why) {
    // a link fails where the name is taken, a rename would not
    if (link_as(name) || (errno == EEXIST && is_good())) {
        return true;
    }
    bool ok = true;
    if (unnamed) { // replaces what is there in one step, which a link cannot
        const std::string other = random_name();
        ok = link_as(other);
        temporary = ok ? other : "";
    }
    ok = ok && renameat(dir.fd(), temporary.c_str(), dir.fd(), name.c_str()) == 0;
    if (!ok) {
        *why = "naming " + dir.path() + "/" + name + ": " + file_error(errno);
        return false;
    }
    temporary.clear();
    return true;
}

#endif

} // namespace superllama
