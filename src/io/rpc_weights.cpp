#include "io/rpc_weights.h"

#include "ggml-impl.h"
#include "gguf.h"
#include "io/rpc_units.h"

#ifndef _WIN32

#    include "base/checksum.h"
#    include "io/cache_file.h"
#    include "io/cache_folder.h"
#    include "io/file.h"

#    include <algorithm>
#    include <atomic>
#    include <cerrno>
#    include <cinttypes>
#    include <cstdlib>
#    include <cstring>
#    include <fcntl.h>
#    include <filesystem>
#    include <stdexcept>
#    include <sys/stat.h>
#    include <thread>
#    include <unordered_map>

#endif

namespace superllama {

static const uint64_t fnv_offset = 0xcbf29ce484222325ull;
static const uint64_t fnv_prime = 0x100000001b3ull;

uint64_t rpc_content_hash(const void * data, size_t bytes) {
    uint64_t hash = fnv_offset;
    for (size_t i = 0; i < bytes; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i]) * fnv_prime;
    }
    return hash;
}

#ifndef _WIN32

namespace fs = std::filesystem;

static const char * const index_folder = "rpc-weights"; // in the cache folder

namespace {

struct entry {
    uint64_t hash;
    uint64_t offset; // in its file
    uint64_t bytes;
};

// What tells one content of a file from another without reading it.
struct file_stamp {
    uint64_t device, inode, bytes;
    int64_t time_s, time_ns; // of the last change

    bool operator==(const file_stamp & o) const {
        return device == o.device && inode == o.inode && bytes == o.bytes && time_s == o.time_s && time_ns == o.time_ns;
    }
};

struct index_header {
    char magic[8]; // and the version of what follows
    file_stamp stamp;
    uint64_t n_entries, sum; // sum: of stamp and entries
};

const char index_magic[8] = { 'S', 'L', 'R', 'P', 'C', 'W', '0', '1' };

struct weight_file {
    std::string path;
    file_stamp stamp;
    std::vector<entry> entries;
    bool changed = false; // since it was looked through: not used any more
};

} // namespace

// False with *why for what is no regular file.
static bool stamp_of(int fd, file_stamp * stamp, std::string * why) {
    struct stat st = {};
    if (fstat(fd, &st) != 0) {
        *why = file_error(errno);
        return false;
    }
    if (!S_ISREG(st.st_mode)) {
        *why = "no regular file";
        return false;
    }
#    ifdef __APPLE__
    const timespec changed = st.st_mtimespec;
#    else
    const timespec changed = st.st_mtim;
#    endif
    *stamp = { (uint64_t) st.st_dev, (uint64_t) st.st_ino, (uint64_t) st.st_size, (int64_t) changed.tv_sec,
               (int64_t) changed.tv_nsec };
    return true;
}

// O_NONBLOCK: a FIFO would wait for somebody who writes.
static descriptor open_file(const std::string & path, std::string * why) {
    descriptor file(open_at(AT_FDCWD, path.c_str(), O_RDONLY | O_NONBLOCK));
    if (!file) {
        *why = file_error(errno);
    }
    return file;
}

// ------------------------------------------------------------------------------- looking through one file

namespace {

struct tensor_place {
    uint64_t offset, bytes;
    size_t n_slices;
};

} // namespace

static bool tensors_of(const std::string & path, uint64_t file_bytes, std::vector<tensor_place> * places,
                       std::string * why) {
    ggml_context * ctx = nullptr;
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> gguf(gguf_init_from_file(path.c_str(), { true, &ctx }),
                                                                   gguf_free);
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> tensors(ctx, ggml_free);
    if (gguf == nullptr || ctx == nullptr) {
        *why = "no GGUF file that can be read";
        return false;
    }
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); ++i) {
        const ggml_tensor * t = ggml_get_tensor(ctx, gguf_get_tensor_name(gguf.get(), i));
        const uint64_t begin = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), i);
        const uint64_t bytes = t != nullptr ? ggml_nbytes(t) : 0;
        if (begin > file_bytes || bytes > file_bytes - begin) {
            *why = "it is cut off: " + std::to_string(begin + bytes) + " bytes belong to it, " +
                   std::to_string(file_bytes) + " are there";
            return false;
        }
        places->push_back({ begin, bytes, t != nullptr ? rpc_slices(t) : 1 });
    }
    return true;
}

// All of the tensor, its slices, and its units. One byte after the other depends on the one before it, in each hash:
// several side by side cost what one does.
static bool hash_tensor(int fd, const tensor_place & t, std::vector<uint8_t> & unit, std::vector<entry> * entries,
                        std::string * why) {
    uint64_t whole = fnv_offset;
    size_t n_units = 0;
    const uint64_t slice_bytes = t.bytes / t.n_slices;
    for (uint64_t slice = 0; slice < t.bytes; slice += slice_bytes) {
        for (uint64_t at = 0; at < slice_bytes; at += rpc_unit_bytes) {
            const auto n = (size_t) std::min<uint64_t>(rpc_unit_bytes, slice_bytes - at);
            const file_result got = read_exact(fd, unit.data(), n, t.offset + slice + at);
            if (got.error != 0 || got.done < n) {
                *why = got.error != 0 ? file_error(got.error) : "it became shorter";
                return false;
            }
            uint64_t hash = fnv_offset;
            for (size_t i = 0; i < n; ++i) {
                hash = (hash ^ unit[i]) * fnv_prime;
                whole = (whole ^ unit[i]) * fnv_prime;
            }
            if (n >= rpc_unit_least) {
                entries->push_back({ hash, t.offset + slice + at, n });
            }
            n_units++;
        }
    }
    if (n_units > 1 && t.bytes >= rpc_unit_least) {
        entries->push_back({ whole, t.offset, t.bytes });
    }
    return true;
}

// Reads all of it once, on several cores.
static bool hash_file(int fd, const std::vector<tensor_place> & places, std::vector<entry> * entries,
                      std::string * why) {
    const size_t n_threads =
        std::max<size_t>(1, std::min<size_t>({ 8, std::thread::hardware_concurrency(), places.size() }));
    std::vector<std::vector<entry>> found(n_threads);
    std::vector<std::string> errors(n_threads);
    std::atomic<size_t> next{ 0 };
    std::atomic<bool> failed{ false };
    const auto work = [&](size_t me) {
        try {
            std::vector<uint8_t> unit(rpc_unit_bytes);
            for (size_t i = next++; i < places.size() && !failed; i = next++) {
                if (!hash_tensor(fd, places[i], unit, &found[me], &errors[me])) {
                    failed = true;
                }
            }
        } catch (const std::exception & e) { // no memory
            errors[me] = e.what();
            failed = true;
        }
    };
    std::vector<std::thread> threads;
    try {
        for (size_t i = 1; i < n_threads; ++i) {
            threads.emplace_back(work, i);
        }
    } catch (const std::exception &) { // there are no more: those that there are do it
    }
    work(0);
    for (std::thread & thread : threads) {
        thread.join();
    }
    for (size_t i = 0; i < n_threads; ++i) {
        entries->insert(entries->end(), found[i].begin(), found[i].end());
        *why = errors[i].empty() ? *why : errors[i];
    }
    return !failed;
}

// ----------------------------------------------------------------------------------- what the cache keeps

static uint64_t sum_of(const file_stamp & stamp, const std::vector<entry> & entries) {
    return checksum(entries.data(), entries.size() * sizeof(entry), checksum(&stamp, sizeof(stamp)));
}

static std::string index_name(const std::string & path) {
    char name[32];
    snprintf(name, sizeof(name), "%016" PRIx64 ".index", checksum(path.data(), path.size()));
    return name;
}

static bool load_index(weight_file & file) {
    for (const cache_place & place : cache_places()) {
        cache_dir dir;
        std::string ignored;
        if (!dir.open(place.path, index_folder, false, &ignored)) {
            continue;
        }
        const descriptor found = dir.file(index_name(file.path), O_RDONLY, &ignored);
        index_header head = {};
        struct stat st = {};
        if (!found || fstat(found.get(), &st) != 0 ||
            read_exact(found.get(), &head, sizeof(head), 0).done != sizeof(head) ||
            memcmp(head.magic, index_magic, sizeof(head.magic)) != 0 || !(head.stamp == file.stamp) ||
            head.n_entries > ((uint64_t) st.st_size - sizeof(head)) / sizeof(entry)) {
            continue;
        }
        std::vector<entry> entries(head.n_entries);
        const size_t bytes = entries.size() * sizeof(entry);
        if (read_exact(found.get(), entries.data(), bytes, sizeof(head)).done == bytes &&
            sum_of(head.stamp, entries) == head.sum) {
            file.entries = std::move(entries);
            return true;
        }
    }
    return false;
}

static void keep_index(const weight_file & file) {
    index_header head = {};
    memcpy(head.magic, index_magic, sizeof(head.magic));
    head.stamp = file.stamp;
    head.n_entries = file.entries.size();
    head.sum = sum_of(file.stamp, file.entries);
    // in whole pages, from a page on: it may be written past the page cache
    const size_t page = 4096;
    const size_t bytes = sizeof(head) + file.entries.size() * sizeof(entry);
    const size_t whole = GGML_PAD(bytes, page);
    std::vector<uint8_t> memory(whole + page);
    auto * data = (uint8_t *) GGML_PAD((uintptr_t) memory.data(), page);
    memcpy(data, &head, sizeof(head));
    std::copy(file.entries.begin(), file.entries.end(), (entry *) (data + sizeof(head)));

    std::string reasons = "there is no folder for it";
    for (const cache_place & place : cache_places()) {
        cache_dir dir;
        if (!dir.open(place.path, index_folder, true, &reasons)) {
            continue;
        }
        dir.remove_leftovers();
        cache_writer writer(dir);
        if (writer.create(whole, &reasons) && writer.write(data, whole, 0, &reasons) && writer.finish(&reasons) &&
            writer.publish(index_name(file.path), [] { return false; }, &reasons)) {
            return;
        }
    }
    GGML_LOG_WARN("%s: what was found in %s is not kept, and it will be read again next time: %s\n", __func__,
                  file.path.c_str(), reasons.c_str());
}

// -------------------------------------------------------------------------------------------- a folder

struct rpc_weight_files::impl {
    struct place {
        size_t file;
        entry at;
    };

    std::vector<weight_file> files;
    std::unordered_multimap<uint64_t, place> places; // the same weights may be in several files

    // Files that are links count, as in Hugging Face's cache; folders that are links do not, which could be a circle.
    void find(const fs::path & folder) {
        std::error_code ec;
        fs::recursive_directory_iterator it(folder, fs::directory_options::skip_permission_denied, ec);
        if (ec) {
            throw std::runtime_error("cannot read the folder of models " + folder.string() + ": " + ec.message() +
                                     "; name a folder that holds GGUF files");
        }
        std::vector<std::string> paths;
        for (; it != fs::recursive_directory_iterator(); it.increment(ec)) {
            if (it->path().extension() == ".gguf") {
                paths.push_back(it->path().string());
            }
        }
        if (ec) {
            GGML_LOG_WARN("%s: not all of %s can be read: %s\n", __func__, folder.string().c_str(),
                          ec.message().c_str());
        }
        std::sort(paths.begin(), paths.end());
        for (const std::string & path : paths) {
            add(path);
        }
    }

    void add(const std::string & path) {
        weight_file file;
        std::string why;
        try {
            if (look_through(path, file, &why)) {
                for (const entry & e : file.entries) {
                    places.emplace(e.hash, place{ files.size(), e });
                }
                files.push_back(std::move(file));
                return;
            }
        } catch (const std::exception & e) { // no memory
            why = e.what();
        }
        GGML_LOG_WARN("%s: %s is passed over: %s\n", __func__, path.c_str(), why.c_str());
    }

    static bool look_through(const std::string & path, weight_file & file, std::string * why) {
        const descriptor fd = open_file(path, why);
        if (!fd || !stamp_of(fd.get(), &file.stamp, why)) {
            return false;
        }
        file.path = fs::absolute(path).string();
        if (load_index(file)) {
            return true;
        }
        std::vector<tensor_place> places;
        if (!tensors_of(path, file.stamp.bytes, &places, why)) {
            return false;
        }
        GGML_LOG_INFO("looking through %s, %.2f GB, once\n", path.c_str(), (double) file.stamp.bytes / 1e9);
        file_stamp after = {};
        if (!hash_file(fd.get(), places, &file.entries, why) || !stamp_of(fd.get(), &after, why)) {
            return false;
        }
        if (!(after == file.stamp)) {
            *why = "it changes while it is read";
            return false;
        }
        keep_index(file);
        return true;
    }

    bool read(const place & p, uint64_t hash, std::vector<uint8_t> & data) {
        weight_file & file = files[p.file];
        std::string why = "it was changed";
        file_stamp now = {};
        if (file.changed) {
            return false;
        }
        const descriptor fd = open_file(file.path, &why);
        if (fd && stamp_of(fd.get(), &now, &why) && now == file.stamp) {
            data.resize((size_t) p.at.bytes);
            const file_result got = read_exact(fd.get(), data.data(), data.size(), p.at.offset);
            if (got.error == 0 && got.done == data.size() && rpc_content_hash(data.data(), data.size()) == hash) {
                return true;
            }
            why = got.error != 0 ? file_error(got.error) : "its bytes are not what they were";
        }
        file.changed = true;
        GGML_LOG_WARN(
            "%s: %s is not used any more: %s; clients send these weights, until the server is started again\n",
            __func__, file.path.c_str(), why.c_str());
        return false;
    }
};

rpc_weight_files::rpc_weight_files(const std::string & folder) : pimpl(new impl) {
    pimpl->find(folder);
}

bool rpc_weight_files::read(uint64_t hash, std::vector<uint8_t> & data) {
    const auto [first, last] = pimpl->places.equal_range(hash);
    for (auto it = first; it != last; ++it) {
        try {
            if (pimpl->read(it->second, hash, data)) {
                return true;
            }
        } catch (const std::exception & e) { // no memory: the client sends it piece by piece
            GGML_LOG_WARN("%s: %" PRIu64 " bytes of weights: %s\n", __func__, it->second.at.bytes, e.what());
        }
    }
    return false;
}

size_t rpc_weight_files::n_files() const {
    return pimpl->files.size();
}

uint64_t rpc_weight_files::bytes() const {
    uint64_t sum = 0;
    for (const weight_file & file : pimpl->files) {
        sum += file.stamp.bytes;
    }
    return sum;
}

#else

struct rpc_weight_files::impl {};

rpc_weight_files::rpc_weight_files(const std::string &) {
    throw std::runtime_error("a folder of models is not supported on this system");
}

bool rpc_weight_files::read(uint64_t, std::vector<uint8_t> &) {
    return false;
}

size_t rpc_weight_files::n_files() const {
    return 0;
}

uint64_t rpc_weight_files::bytes() const {
    return 0;
}

#endif

rpc_weight_files::~rpc_weight_files() = default;

// ------------------------------------------------------------------------------------------- this server's

static std::unique_ptr<rpc_weight_files> own; // set before clients are served, by one thread

void rpc_open_weights() {
    const char * folder = getenv("SUPERLLAMA_RPC_MODEL_DIR"); // from the program's --model-dir
    if (folder != nullptr && own == nullptr) {
        own = std::make_unique<rpc_weight_files>(folder);
        printf("  model files    : %zu in %s, %.2f GB\n", own->n_files(), folder, (double) own->bytes() / 1e9);
    }
}

bool rpc_has_weights() {
    return own != nullptr && own->n_files() > 0;
}

bool rpc_local_weights(uint64_t hash, std::vector<uint8_t> & data) {
    return own != nullptr && own->read(hash, data);
}

} // namespace superllama
