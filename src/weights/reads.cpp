// The reads of weight_store: from files into its memory.

#include "weights/store_impl.h"

#include "ggml-backend-impl.h"
#include "base/checksum.h"

#include <algorithm>
#include <cstring>

namespace superllama {

static size_t convert_step(const ggml_tensor * t) {
    const size_t group = ggml_row_size(t->type, t->ne[0]) * (size_t) group_rows;
    return std::max(group, round_down(convert_bytes, group));
}

bool weight_store::converts(uint32_t block) const {
    for (const weight_range & r : all_blocks[block].ranges) {
        if (r.file < 0) {
            return true;
        }
    }
    return false;
}

uint64_t weight_store::checksum(uint32_t block) const {
    const weight_block & b = all_blocks[block];
    if (b.expert < 0) {
        return superllama::checksum(b.addr, b.bytes, 0);
    }
    uint64_t sum = 0;
    for (const weight_slice & s : b.slices) {
        sum = superllama::checksum(b.addr + s.at, s.memory_bytes, sum);
    }
    return sum;
}

bool weight_store::verify(uint32_t block, std::string * error) {
    weight_block & b = all_blocks[block];
    if (b.checksum != 0 && b.checksum != checksum(block)) {
        *error = pimpl->files[(size_t) b.ranges.front().file]->path() + " is damaged: block " + std::to_string(block) +
                 " of layer " + std::to_string(b.layer) +
                 " is not what was written; remove the file (`superllama cache prune`) and load the model again";
        return false;
    }
    b.checksum = 0;
    return true;
}

std::vector<weight_part> weight_store::parts(uint32_t block, size_t part_bytes) const {
    std::vector<weight_part> result;
    const weight_block & b = all_blocks[block];
    const auto cut = [&](uint32_t index, size_t first, size_t last, size_t step) {
        for (; first < last; first += step) {
            result.push_back({ block, index, first, std::min(step, last - first) });
        }
    };
    if (converts(block)) {
        for (uint32_t i = 0; i < b.slices.size(); ++i) {
            cut(i, 0, b.slices[i].bytes, convert_step(b.slices[i].tensor));
        }
        return result;
    }
    if (b.expert >= 0) {
        for (uint32_t i = 0; i < b.ranges.size(); ++i) {
            cut(i, 0, b.ranges[i].bytes, part_bytes);
        }
        return result;
    }
    const size_t huge = huge_bytes(b);
    cut(0, 0, huge, part_bytes);
    cut(0, huge, b.bytes, std::min(part_bytes, pimpl->staging.slice_bytes()));
    return result;
}

// Reads rows in the file's layout and lets the buffer put them in place in its own.
static bool convert_rows(const weight_file & file, const weight_slice & slice, uint8_t * to, size_t first, size_t bytes,
                         std::string * error) {
    std::vector<uint8_t> staging(bytes);
    if (!file.read_bytes(staging.data(), bytes, slice.source.offset + first, error)) {
        return false;
    }
    ggml_tensor rows = rows_of(slice.tensor, bytes);
    rows.data = to + memory_of(slice.tensor, slice.tensor->buffer->buft, first);
    rows.buffer->iface.set_tensor(rows.buffer, &rows, staging.data(), 0, bytes);
    return true;
}

// Into small pages by way of a huge one, if no other reader has it.
static bool read_small_pages(const weight_file & file, staging_buffer & staging, uint8_t * addr, size_t bytes,
                             uint64_t offset, std::string * error) {
    uint8_t * slice = bytes <= staging.slice_bytes() ? staging.take() : nullptr;
    if (slice == nullptr) {
        return file.read_pages(addr, bytes, offset, error);
    }
    const bool ok = file.read_pages(slice, bytes, offset, error);
    if (ok) {
        memcpy(addr, slice, bytes);
    }
    staging.give_back(slice);
    return ok;
}

bool weight_store::read_part(const weight_part & part, std::string * error) const {
    const weight_block & b = all_blocks[part.block];
    bool ok;
    if (converts(part.block)) {
        const weight_slice & slice = b.slices[part.index];
        uint8_t * to = const_cast<uint8_t *>(data(part.block, part.index));
        ok = convert_rows(*pimpl->files[(size_t) slice.source.file], slice, to, part.first, part.bytes, error);
    } else {
        const weight_range & range = b.ranges[part.index];
        const weight_file & file = *pimpl->files[(size_t) range.file];
        uint8_t * addr = b.addr + range.at + part.first;
        const uint64_t offset = range.offset + part.first;
        ok = b.expert >= 0 || part.first < huge_bytes(b)
                 ? file.read_pages(addr, part.bytes, offset, error)
                 : read_small_pages(file, pimpl->staging, addr, part.bytes, offset, error);
    }
    pimpl->n_read += ok ? part.bytes : 0;
    return ok;
}

bool weight_store::load_resident(std::string * error) {
    for (const auto & size : expert_sizes()) {
        auto & frames = pimpl->frames[size.first];
        if (frames == nullptr) {
            frames = std::make_unique<expert_frames>(size.first, size.second);
        }
    }
    for (weight_held & h : pimpl->held) {
        if (h.role != weight_role::resident || !h.held || h.there) {
            continue;
        }
        const weight_file & file = *pimpl->files[(size_t) h.source.file];
        const size_t bytes = ggml_nbytes(h.tensor);
        bool ok = true;
        if (h.converts) {
            const size_t step = convert_step(h.tensor);
            for (size_t first = 0; ok && first < bytes; first += step) {
                ok = convert_rows(file, { h.tensor, bytes, h.source, h.bytes }, h.addr, first,
                                  std::min(step, bytes - first), error);
            }
        } else {
            const size_t head = h.source.offset % system_page();
            ok = file.read_pages((uint8_t *) h.tensor->data - head, round_up(head + bytes, system_page()),
                                 h.source.offset - head, error);
        }
        if (!ok) {
            return false;
        }
        pimpl->n_read += bytes;
        h.there = true;
    }
    return true;
}

const uint8_t * weight_store::read(const weight_source & from, size_t bytes, uint8_t * staging,
                                   std::string * error) const {
    const size_t head = from.offset % system_page();
    const size_t whole = round_up(head + bytes, system_page());
    if (!pimpl->files[(size_t) from.file]->read_pages(staging, whole, from.offset - head, error)) {
        return nullptr;
    }
    pimpl->n_read += bytes;
    return staging + head;
}

bool weight_store::unchanged(std::string * error) const {
    return std::all_of(pimpl->files.begin(), pimpl->files.end(),
                       [error](const auto & file) { return file->unchanged(error); });
}

bool weight_store::read_rows(const ggml_tensor * t, const int32_t * ids, size_t n, std::string * error) {
    const weight_held & h = *pimpl->find(t);
    const weight_file & file = *pimpl->files[(size_t) h.source.file];
    const size_t page = system_page();
    row_pages & rows = pimpl->rows.at(t);
    std::vector<bool> & there = rows.there;
    const size_t head = h.source.offset % page;
    uint8_t * base = (uint8_t *) t->data - head;
    const size_t row = ggml_row_size(t->type, t->ne[0]);

    if (rows.n * page > weight_row_bytes_cap) {
        address_discard(base, there.size() * page);
        there.assign(there.size(), false);
        n_row_now -= rows.n * page;
        rows.n = 0;
    }
    for (size_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= t->ne[1]) {
            *error = "row " + std::to_string(ids[i]) + " of " + t->name + " does not exist";
            return false;
        }
        const size_t first = (head + row * (size_t) ids[i]) / page;
        const size_t last = (head + row * (size_t) ids[i] + row - 1) / page;
        if (std::all_of(there.begin() + (ptrdiff_t) first, there.begin() + (ptrdiff_t) last + 1,
                        [](bool b) { return b; })) {
            continue;
        }
        if (!file.read_pages(base + first * page, (last - first + 1) * page, h.source.offset - head + first * page,
                             error)) {
            return false;
        }
        pimpl->n_read += (last - first + 1) * page;
        for (size_t p = first; p <= last; ++p) {
            n_row_now += there[p] ? 0 : page;
            rows.n += there[p] ? 0 : 1;
            there[p] = true;
        }
    }
    return true;
}

uint64_t weight_store::bytes_read() const {
    return pimpl->n_read;
}

std::string weight_store::content_key() const {
    std::string key;
    for (const auto & file : pimpl->files) {
        key += file->content_key() + ";";
    }
    return key;
}

} // namespace superllama
