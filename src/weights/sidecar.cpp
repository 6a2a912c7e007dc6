#include "weights/sidecar.h"

#include "base/checksum.h"
#include "ggml.h"
#include "io/cache_file.h"
#include "io/cache_folder.h"
#include "io/weight_file.h"
#include "llama-impl.h"
#include "weights/sidecar_format.h"
#include "weights/store.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <set>

#ifdef __linux__
#    include <fcntl.h>
#endif

namespace superllama {

#ifdef __linux__

static const char folder_name[] = "repacked";
static const double progress_s = 0.1;      // how often it is asked whether to go on
static const size_t read_bytes = 1u << 20; // at a time, and asks in between
static const size_t write_bytes = 4u << 20;

// A block at its home for as long as this lives.
struct placed_block {
    placed_block(weight_store & store, uint32_t id) : store(store), id(id) { store.place(id, false); }
    ~placed_block() { store.drop(id); }

    weight_store & store;
    uint32_t id;
};

// What the conversion makes of the first rows of each type: two kernel variants never share a sidecar.
static bool conversion(weight_store & store, uint64_t * hash, std::string * why) {
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
        const placed_block placed(store, id);
        if (!store.read_part(part, why)) {
            return false;
        }
        *hash = checksum(store.data(id, part.index), store.memory_of_first(t, part.bytes), *hash);
    }
    return true;
}

// What is wanted of a sidecar: of this model, by samples of its content, for these kernels, in this layout.
static bool describe(weight_store & store, const std::vector<uint32_t> & ids, sidecar_header * head,
                     std::string * why) {
    std::string text = std::to_string(store.fingerprint());
    head->bytes = sidecar_data_offset(ids.size());
    for (uint32_t id : ids) {
        const weight_block & block = store.blocks()[id];
        head->bytes += block.bytes;
        text += "/" + std::to_string(block.bytes);
        for (const weight_slice & s : block.slices) {
            text += std::string(" ") + s.tensor->name + " " + ggml_type_name(s.tensor->type);
            for (uint64_t n :
                 { (uint64_t) s.tensor->ne[0], (uint64_t) s.tensor->ne[1], (uint64_t) s.tensor->ne[2],
                   (uint64_t) s.memory_bytes, s.source.offset, (uint64_t) s.source.file, (uint64_t) s.at }) {
                text += ":" + std::to_string(n);
            }
        }
    }
    uint64_t kernels = 0;
    if (!conversion(store, &kernels, why)) {
        return false;
    }
    text += "/" + std::to_string(kernels);
    head->n_blocks = ids.size();
    head->key[0] = checksum(text.data(), text.size());
    head->key[1] = checksum(text.data(), text.size(), head->key[0]);
    return true;
}

// ------------------------------------------------------------------------------------------------ writing

namespace {

// Asked often enough to be answered within a second, and seldom enough to cost nothing.
class progress_clock {
  public:
    progress_clock(const std::function<bool(float)> & progress) : progress(progress) {}

    bool go_on(float done, std::string * why) {
        const auto now = std::chrono::steady_clock::now();
        if (std::chrono::duration<double>(now - last).count() < progress_s) {
            return true;
        }
        last = now;
        if (!progress(done)) {
            *why = "cancelled";
            return false;
        }
        return true;
    }

  private:
    const std::function<bool(float)> & progress;
    std::chrono::steady_clock::time_point last;
};

} // namespace

static bool write_blocks(weight_store & store, const std::vector<uint32_t> & ids, cache_writer & file,
                         progress_clock & clock, std::vector<uint64_t> * sums, std::string * why) {
    uint64_t offset = sidecar_data_offset(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
        const placed_block placed(store, ids[i]);
        const weight_block & block = store.blocks()[ids[i]];
        const float done = (float) i / (float) ids.size();
        for (const weight_part & part : store.parts(ids[i], read_bytes)) {
            if (!clock.go_on(done, why) || !store.read_part(part, why)) {
                return false;
            }
        }
        sums->push_back(store.checksum(ids[i]));
        for (const weight_range & range : block.ranges) {
            for (size_t at = 0; at < range.bytes; at += write_bytes) {
                if (!clock.go_on(done, why) ||
                    !file.write(block.addr + range.at + at, std::min(write_bytes, range.bytes - at),
                                offset + range.at + at, why)) {
                    return false;
                }
            }
        }
        offset += block.bytes;
    }
    return true;
}

// The header comes last: a file that is not whole is never taken for a good one.
static bool write_header(cache_writer & file, const sidecar_header & head, uint64_t identity,
                         const std::vector<uint64_t> & sums, std::string * why) {
    const size_t bytes = sidecar_data_offset(sums.size());
    const page_buffer first(bytes);
    if (!file.finish(why)) {
        return false;
    }
    sidecar_begin(head, identity, sums, first.data());
    return file.write(first.data(), bytes, 0, why) && file.finish(why);
}

// ------------------------------------------------------------------------------------------------ one load

namespace {

struct sidecar {
    weight_store & store;
    std::vector<uint32_t> ids;
    sidecar_header head = {};
    uint64_t identity = 0;
    std::string name, place;

    // False: what is there is no sidecar of this model.
    bool use(const cache_dir & dir, int fd, std::string * why) {
        std::vector<uint64_t> sums;
        bool proven = false;
        if (!sidecar_read(fd, head, identity, &sums, &proven, why)) {
            *why = dir.path() + "/" + name + ": " + *why;
            return false;
        }
        std::vector<weight_copy> copies;
        uint64_t offset = sidecar_data_offset(ids.size());
        for (size_t i = 0; i < ids.size(); ++i) {
            copies.push_back({ -1, offset, sums[i] });
            offset += store.blocks()[ids[i]].bytes;
        }
        store.set_copies(fd, copies, proven, [place = place, name = name, head = head, identity = identity] {
            cache_dir again;
            std::string ignored;
            if (again.open(place, folder_name, false, &ignored)) {
                sidecar_add_origin(again.file(name, O_RDWR, &ignored).get(), head, identity);
            }
        });
        return true;
    }

    bool find(const cache_dir & dir, std::string * why) {
        const descriptor file = dir.file(name, O_RDONLY, why);
        return file && use(dir, file.get(), why);
    }

    bool write(const cache_dir & dir, progress_clock & clock, std::string * why) {
        cache_writer file(dir);
        std::vector<uint64_t> sums;
        // what was read while the model's files changed is not kept
        if (!file.create(head.bytes, why) || !write_blocks(store, ids, file, clock, &sums, why) ||
            !store.unchanged(why) || !write_header(file, head, identity, sums, why)) {
            return false;
        }
        // another process may have been faster: its file stays, then
        const auto is_good = [&] {
            std::string ignored;
            bool proven = false;
            const descriptor theirs = dir.file(name, O_RDONLY, &ignored);
            return theirs && sidecar_read(theirs.get(), head, identity, &sums, &proven, &ignored) && proven;
        };
        std::string no_name;
        const bool published = file.publish(name, is_good, &no_name);
        return (published && find(dir, why)) || use(dir, file.fd(), why); // without a name it serves this load
    }
};

} // namespace

static bool attach(weight_store & store, bool write, const std::function<bool(float)> & progress,
                   weight_sidecar_info * info, std::string * why) {
    sidecar mine = { store, {}, {}, store.identity(), "", "" };
    for (uint32_t id = 0; id < store.blocks().size(); ++id) {
        if (store.converts(id)) {
            mine.ids.push_back(id);
        }
    }
    if (!describe(store, mine.ids, &mine.head, why)) {
        return false;
    }
    char name[32];
    snprintf(name, sizeof(name), "%016llx.blocks", (unsigned long long) mine.head.key[0]);
    mine.name = name;
    info->bytes = mine.head.bytes;

    const std::vector<cache_place> places = cache_places();
    *why = "there is none yet";
    for (const cache_place & place : places) {
        cache_dir dir;
        std::string reason;
        mine.place = place.path;
        if (!dir.open(place.path, folder_name, false, &reason)) {
            continue; // to be written, it says why
        }
        dir.remove_leftovers();
        info->path = dir.path() + "/" + name;
        if (mine.find(dir, &reason)) {
            return true;
        }
        if (dir.has(name)) {
            LLAMA_LOG_WARN("%s: a file of repacked weights is not used: %s\n", __func__, reason.c_str());
        }
    }
    if (!write) {
        return false;
    }
    std::string reasons;
    for (const cache_place & place : places) {
        cache_dir dir;
        std::string reason;
        mine.place = place.path;
        if (dir.open(place.path, folder_name, true, &reason) && dir.in_memory() && !place.asked_for) {
            reason = dir.path() + " is in memory; name a folder on a disk with SUPERLLAMA_CACHE";
        }
        if (reason.empty()) {
            progress_clock clock(progress);
            info->path = dir.path() + "/" + name;
            info->written = mine.write(dir, clock, why);
            return info->written;
        }
        reasons += (reasons.empty() ? "" : "; ") + reason;
    }
    *why = reasons.empty() ? "there is no folder for it; name one with SUPERLLAMA_CACHE" : reasons;
    return false;
}

bool weight_sidecar_attach(weight_store & store, bool write, const std::function<bool(float)> & progress,
                           weight_sidecar_info * info, std::string * why) {
    try {
        return attach(store, write, progress, info, why);
    } catch (const std::exception & e) { // without it the model works all the same
        *why = e.what();
        return false;
    }
}

#else

bool weight_sidecar_attach(weight_store &, bool, const std::function<bool(float)> &, weight_sidecar_info *,
                           std::string * why) {
    *why = "not supported on this system";
    return false;
}

#endif

} // namespace superllama
