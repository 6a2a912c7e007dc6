// Where the content of weight_store's blocks comes from, and whether it is what it should be: samples of the model's
// files, the sidecar's copies of converted blocks, tensors that are checked for invalid numbers.
//
// A copy is only as good as what it was made from, and a sidecar is found by samples of the model. So unless it was
// made from these very files, unmodified since, a block is converted from the model when it is first needed and its
// checksum compared with that of the copy; from then on the copy is read. Whatever is wrong with a sidecar costs time,
// never an answer: the model has it all.

#include "weights/store_impl.h"

#include "base/checksum.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

namespace superllama {

static const size_t check_bytes = 1u << 20; // looked through at a time
static const size_t copy_samples = 64;      // of the sidecar, whose blocks have checksums

// ----------------------------------------------------------------------------------------------- the files

// A page from the middle of every tensor that has one, and the ends of the file: whatever was trained, merged, or
// quantised otherwise differs there.
bool weight_store::take_samples(std::string * error) {
    if (pimpl->sampled) {
        return true;
    }
    std::vector<std::vector<uint64_t>> offsets(pimpl->files.size());
    for (const weight_held & h : pimpl->held) {
        const size_t bytes = ggml_nbytes(h.tensor);
        if (bytes >= system_page()) {
            offsets[(size_t) h.source.file].push_back(h.source.offset + bytes / 2);
        }
    }
    for (size_t i = 0; i < offsets.size(); ++i) {
        const uint64_t bytes = pimpl->files[i]->bytes();
        offsets[i].push_back(0);
        offsets[i].push_back(bytes - std::min<uint64_t>(bytes, 1));
        if (!pimpl->files[i]->take_samples(offsets[i], error)) {
            return false;
        }
    }
    pimpl->sampled = true;
    return true;
}

bool weight_store::unchanged(std::string * error) {
    return std::all_of(pimpl->files.begin(), pimpl->files.end(), [&](const auto & file) {
        if ((int) (&file - pimpl->files.data()) != pimpl->copy_file) {
            return file->unchanged(error);
        }
        std::string why;
        if (!pimpl->copy_failed && !file->unchanged(&why)) {
            LLAMA_LOG_WARN("%s: %s: blocks are repacked from the model from now on\n", __func__, why.c_str());
            pimpl->copy_failed = true;
        }
        return true;
    });
}

static uint64_t of_all(const std::vector<std::unique_ptr<weight_file>> & files, uint64_t (weight_file::*of)() const) {
    uint64_t all = 0;
    for (const auto & file : files) {
        const uint64_t one = (file.get()->*of)();
        all = checksum(&one, sizeof(one), all);
    }
    return all;
}

uint64_t weight_store::fingerprint() const {
    return of_all(pimpl->files, &weight_file::fingerprint);
}

uint64_t weight_store::identity() const {
    return of_all(pimpl->files, &weight_file::identity);
}

// ----------------------------------------------------------------------------------------------- copies

// Of its tensors: what lies between them is whatever was in memory before.
uint64_t weight_store::checksum(uint32_t block) const {
    const weight_block & b = all_blocks[block];
    uint64_t sum = 0;
    for (const weight_slice & s : b.slices) {
        sum = superllama::checksum(b.addr + s.at, s.memory_bytes, sum);
    }
    return sum;
}

// A block that is nowhere, or being read by nobody else.
void weight_store::read_from(weight_block & b, bool copy) {
    for (weight_range & r : b.ranges) {
        r.file = copy ? b.copy.file : -1;
        r.offset = copy ? b.copy.offset + r.at : 0;
    }
    if (!copy) {
        b.copy = {};
    }
    b.verified = false;
}

void weight_store::set_copies(int fd, const std::vector<weight_copy> & copies, bool proven,
                              std::function<void()> all_proven) {
    if (copies.empty()) {
        return;
    }
    const int file = add_file(fd);
    const uint64_t bytes = pimpl->files.back()->bytes();
    std::vector<uint64_t> offsets;
    for (uint64_t i = 1; i < copy_samples; ++i) {
        offsets.push_back(copies.front().offset + (bytes - copies.front().offset) / copy_samples * i);
    }
    std::string why;
    if (!pimpl->files.back()->take_samples(offsets, &why)) {
        pimpl->files.pop_back();
        throw std::runtime_error(why);
    }
    proven = proven && !pimpl->checks_tensors; // which are checked as they are in the model
    pimpl->copy_file = file;
    pimpl->all_proven = std::move(all_proven);
    size_t i = 0;
    for (uint32_t id = 0; id < all_blocks.size(); ++id) {
        if (converts(id)) {
            all_blocks[id].copy = copies[i++];
            all_blocks[id].copy.file = file;
            pimpl->n_unproven += proven ? 0 : 1;
            if (proven) {
                read_from(all_blocks[id], true);
            }
        }
    }
}

bool weight_store::read_again(uint32_t block, std::string * error) {
    try {
        for (const weight_part & part : parts(block, check_bytes)) {
            if (!read_part(part, error)) {
                return false;
            }
        }
    } catch (const std::exception & e) { // no memory
        *error = e.what();
        return false;
    }
    return true;
}

bool weight_store::verified(uint32_t block) const {
    const weight_block & b = all_blocks[block];
    return b.verified || (b.copy.file < 0 && !pimpl->checks_tensors);
}

bool weight_store::verify(uint32_t block, std::string * error) {
    weight_block & b = all_blocks[block];
    if (verified(block)) {
        return true;
    }
    const bool converted = converts(block);
    const bool same = b.copy.file >= 0 && checksum(block) == b.copy.checksum;
    if (b.copy.file >= 0 && !same) {
        const weight_file & file = *pimpl->files[(size_t) b.copy.file];
        if (!pimpl->copy_differs.exchange(true)) {
            LLAMA_LOG_WARN("%s: %s %s (block %u of layer %d): what differs is repacked from the model, which costs "
                           "processor time; the next load writes the file anew\n",
                           __func__, file.path().c_str(), converted ? "was made from another model" : "is damaged",
                           block, b.layer);
            file.remove_name();
        }
        read_from(b, false);
        b.verified = converted || read_again(block, error);
        return b.verified;
    }
    if (b.copy.file >= 0 && converted) {
        read_from(b, true); // the copy itself is looked at when it is first read
        if (--pimpl->n_unproven == 0 && pimpl->all_proven) {
            pimpl->all_proven();
        }
        return true;
    }
    if (!converted && b.copy.file < 0) { // of converted ones the model's bytes were looked at
        for (size_t i = 0; i < b.slices.size(); ++i) {
            if (!weight_is_valid(b.slices[i].tensor, data(block, i), b.slices[i].bytes, error)) {
                return false;
            }
        }
    }
    b.verified = true;
    return true;
}

// ----------------------------------------------------------------------------------------------- tensors

bool weight_is_valid(const ggml_tensor * t, const void * data, size_t bytes, std::string * error) {
    if (ggml_validate_row_data(t->type, data, bytes)) {
        return true;
    }
    *error = std::string("tensor '") + t->name + "' has invalid data: the model file is damaged (--check-tensors)";
    return false;
}

void weight_store::check_tensors(bool on) {
    pimpl->checks_tensors = on;
}

bool weight_store::check_tensor(const ggml_tensor * t, const weight_source & source, std::string * error) const {
    const std::lock_guard<std::mutex> lock(pimpl->checked_mutex);
    if (!pimpl->checks_tensors || pimpl->checked.count({ source.file, source.offset }) > 0) {
        return true;
    }
    const size_t row = ggml_row_size(t->type, t->ne[0]);
    const size_t step = std::max(row, round_down(check_bytes, row));
    const page_buffer rows(step);
    for (size_t first = 0; first < ggml_nbytes(t); first += step) {
        const size_t bytes = std::min(step, ggml_nbytes(t) - first);
        const uint8_t * read =
            pimpl->files[(size_t) source.file]->read_bytes(rows, bytes, source.offset + first, error);
        if (read == nullptr || !weight_is_valid(t, read, bytes, error)) {
            return false;
        }
    }
    pimpl->checked.insert({ source.file, source.offset });
    return true;
}

} // namespace superllama
