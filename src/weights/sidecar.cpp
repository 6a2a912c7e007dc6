#include "weights/sidecar.h"

#include "ggml.h"
#include "io/address_space.h"
#include "base/checksum.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>

#ifdef __linux__
#    include <fcntl.h>
#    include <sys/stat.h>
#    include <unistd.h>
#endif

namespace superllama {

namespace fs = std::filesystem;

static const uint64_t magic = 0x3452414345444953ull; // "SIDECAR4"

// The file: this header, a checksum for each block, then the blocks, each part on whole pages.
struct header {
    uint64_t magic;
    uint64_t key;
    uint64_t n_blocks;
    uint64_t bytes; // of the whole file
    uint64_t complete;
};

std::string weight_sidecar_folder() {
    const auto env = [](const char * name) {
        const char * value = getenv(name);
        return std::string(value != nullptr ? value : "");
    };
    fs::path cache = env("SUPERLLAMA_CACHE");
    if (cache.empty()) {
#if defined(_WIN32)
        cache = fs::path(env("LOCALAPPDATA")) / "superllama" / "Cache";
#elif defined(__APPLE__)
        cache = fs::path(env("HOME")) / "Library" / "Caches" / "superllama";
#else
        cache = (env("XDG_CACHE_HOME").empty() ? fs::path(env("HOME")) / ".cache" : fs::path(env("XDG_CACHE_HOME"))) /
                "superllama";
#endif
    }
    return (cache / "repacked").string();
}

#ifdef __linux__

// What the conversion makes of the first rows of each type: two kernel variants never share a sidecar.
static bool fingerprint(weight_store & store, uint64_t * hash, std::string * why) {
    std::set<ggml_type> seen;
    for (uint32_t id = 0; id < store.blocks().size(); ++id) {
        const weight_block & block = store.blocks()[id];
        if (!store.converts(id)) {
            continue;
        }
        const weight_part part = store.parts(id, 0).front();
        const ggml_tensor * t = block.slices[part.index].tensor;
        if (!seen.insert(t->type).second) {
            continue;
        }
        store.place(id, false);
        const bool ok = store.read_part(part, why);
        *hash = ok ? checksum(store.data(id, part.index), part.bytes, *hash) : 0;
        store.drop(id);
        if (!ok) {
            return false;
        }
    }
    return true;
}

static bool write_all(int fd, const uint8_t * data, size_t bytes, uint64_t offset, std::string * why) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = pwrite(fd, data + done, bytes - done, (off_t) (offset + done));
        if (n > 0) {
            done += (size_t) n;
        } else if (!(n < 0 && errno == EINTR)) {
            *why = std::string("writing: ") + strerror(n < 0 ? errno : ENOSPC);
            return false;
        }
    }
    return true;
}

static size_t data_offset(size_t n_blocks) {
    return round_up(sizeof(header) + n_blocks * sizeof(uint64_t), system_page());
}

static bool write_sidecar(weight_store & store, const std::vector<uint32_t> & ids, const header & head,
                          const std::string & path, const std::function<bool(float)> & progress, std::string * why) {
    const std::string tmp = path + "." + std::to_string(getpid());
    int fd = open(tmp.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_DIRECT, 0600);
    if (fd < 0 && errno == EINVAL) {
        fd = open(tmp.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    }
    if (fd < 0) {
        *why = "creating " + tmp + ": " + strerror(errno);
        return false;
    }
    bool ok = posix_fallocate(fd, 0, (off_t) head.bytes) == 0;
    if (!ok) {
        *why = "no room for " + std::to_string(head.bytes >> 20) + " MiB in " + fs::path(path).parent_path().string();
    }
    std::vector<uint64_t> sums;
    uint64_t offset = data_offset(ids.size());
    for (size_t i = 0; ok && i < ids.size(); ++i) {
        const uint32_t id = ids[i];
        store.place(id, false);
        for (const weight_part & part : store.parts(id, 1 << 20)) {
            ok = ok && store.read_part(part, why);
        }
        sums.push_back(store.checksum(id));
        for (const weight_range & range : store.blocks()[id].ranges) {
            ok = ok && write_all(fd, store.blocks()[id].addr + range.at, range.bytes, offset + range.at, why);
        }
        offset += store.blocks()[id].bytes;
        store.drop(id);
        if (ok && !progress((float) (i + 1) / (float) ids.size())) {
            *why = "cancelled";
            ok = false;
        }
    }
    if (ok) {
        // the header comes last: an interrupted file is never taken for a good one
        const size_t bytes = data_offset(ids.size());
        void * first = nullptr;
        ok = fdatasync(fd) == 0 && posix_memalign(&first, system_page(), bytes) == 0;
        if (ok) {
            memset(first, 0, bytes);
            memcpy(first, &head, sizeof(head));
            memcpy((uint8_t *) first + sizeof(head), sums.data(), sums.size() * sizeof(uint64_t));
            ok = write_all(fd, (const uint8_t *) first, bytes, 0, why) && fdatasync(fd) == 0;
        }
        free(first);
    }
    close(fd);
    if (!ok || rename(tmp.c_str(), path.c_str()) != 0) {
        unlink(tmp.c_str());
        *why = why->empty() ? std::string("renaming: ") + strerror(errno) : *why;
        return false;
    }
    return true;
}

// The file's checksums, if it is whole and what is wanted.
static bool read_header(const std::string & path, const header & wanted, std::vector<uint64_t> * sums) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    header head = {};
    struct stat st = {};
    sums->resize(wanted.n_blocks);
    const auto bytes = (ssize_t) (wanted.n_blocks * sizeof(uint64_t));
    const bool ok = fd >= 0 && pread(fd, &head, sizeof(head), 0) == (ssize_t) sizeof(head) &&
                    memcmp(&head, &wanted, sizeof(head)) == 0 && fstat(fd, &st) == 0 &&
                    (uint64_t) st.st_size == wanted.bytes &&
                    pread(fd, sums->data(), (size_t) bytes, sizeof(head)) == bytes;
    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

bool weight_sidecar_attach(weight_store & store, const std::string & model_key, bool write,
                           const std::function<bool(float)> & progress, weight_sidecar_info * info, std::string * why) {
    std::vector<uint32_t> ids;
    header head = { magic, checksum(model_key.data(), model_key.size()), 0, 0, 1 };
    for (uint32_t id = 0; id < store.blocks().size(); ++id) {
        if (store.converts(id)) {
            ids.push_back(id);
            head.bytes += store.blocks()[id].bytes;
            head.key = checksum(&store.blocks()[id].bytes, sizeof(size_t), head.key);
        }
    }
    head.n_blocks = ids.size();
    head.bytes += data_offset(ids.size());
    if (!fingerprint(store, &head.key, why)) {
        return false;
    }

    char name[32];
    snprintf(name, sizeof(name), "%016llx.blocks", (unsigned long long) head.key);
    std::error_code ec;
    const fs::path folder = weight_sidecar_folder();
    info->path = (folder / name).string();
    info->bytes = head.bytes;
    std::vector<uint64_t> sums;
    if (!read_header(info->path, head, &sums)) {
        if (!write) {
            *why = "there is none yet";
            return false;
        }
        fs::create_directories(folder, ec);
        why->clear();
        if (ec) {
            *why = "creating " + folder.string() + ": " + ec.message();
            return false;
        }
        if (!write_sidecar(store, ids, head, info->path, progress, why)) {
            return false;
        }
        info->written = true;
    }

    const int fd = open(info->path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || !read_header(info->path, head, &sums)) {
        *why = info->path + ": " + (fd < 0 ? strerror(errno) : "not what was written");
        return false;
    }
    const int file = store.add_file(fd);
    close(fd);
    uint64_t offset = data_offset(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
        store.set_source(ids[i], file, offset, sums[i]);
        offset += store.blocks()[ids[i]].bytes;
    }
    return true;
}

#else

bool weight_sidecar_attach(weight_store &, const std::string &, bool, const std::function<bool(float)> &,
                           weight_sidecar_info *, std::string * why) {
    *why = "not supported on this system";
    return false;
}

#endif

} // namespace superllama
