// The reads of weight_store: from files into its memory.

#include "weights/store_impl.h"

#include "ggml-backend-impl.h"

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
static bool convert_rows(const weight_file & file, const weight_slice & slice, const ggml_tensor & host, uint8_t * to,
                         size_t first, size_t bytes, bool check, std::string * error) {
    const page_buffer staging(bytes);
    const uint8_t * read = file.read_bytes(staging, bytes, slice.source.offset + first, error);
    if (read == nullptr || (check && !weight_is_valid(slice.tensor, read, bytes, error))) {
        return false;
    }
    ggml_tensor rows = rows_of(&host, bytes);
    rows.data = to + memory_of(&host, host.buffer->buft, first);
    rows.buffer->iface.set_tensor(rows.buffer, &rows, read, 0, bytes);
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
        const ggml_tensor & host = pimpl->find(slice.tensor)->host;
        ok = convert_rows(*pimpl->files[(size_t) slice.source.file], slice, host, to, part.first, part.bytes,
                          pimpl->checks_tensors && !b.verified, error);
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
    if (!ok && b.copy.file >= 0 && !converts(part.block)) {
        pimpl->copy_failed = true; // the next time this is read from the model
    }
    return ok;
}

bool weight_store::load_resident(std::string * error) {
    if (!take_samples(error)) {
        return false;
    }
    for (const auto & size : expert_sizes()) {
        auto & frames = pimpl->frames[size.first];
        if (frames == nullptr) {
            frames = std::make_unique<expert_frames>(size.first, size.second, pimpl->locked);
        }
    }
    for (weight_held & h : pimpl->held) {
        if (h.role != weight_role::resident || !h.held || h.there) {
            continue;
        }
        const weight_file & file = *pimpl->files[(size_t) h.source.file];
        const size_t bytes = ggml_nbytes(h.tensor);
        const size_t head = h.addr_off % system_page();
        bool ok = true;
        address_commit(h.addr - head, round_up(head + h.bytes, system_page()), page_kind::huge);
        if (h.converts) {
            const size_t step = convert_step(h.tensor);
            for (size_t first = 0; ok && first < bytes; first += step) {
                ok = convert_rows(file, { h.tensor, bytes, h.source, h.bytes }, h.host, h.addr, first,
                                  std::min(step, bytes - first), pimpl->checks_tensors, error);
            }
        } else {
            ok = file.read_pages(h.addr - head, round_up(head + bytes, system_page()), h.source.offset - head, error) &&
                 (!pimpl->checks_tensors || weight_is_valid(h.tensor, h.tensor->data, bytes, error));
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

size_t weight_store::row_bytes_more() const {
    const size_t bytes = pimpl->keeps_rows ? n_row_all : n_row_now.load();
    return bytes - std::min(bytes, n_row_max);
}

void weight_store::keep_rows(bool all) {
    pimpl->keeps_rows = all;
    for (const auto & entry : pimpl->rows) {
        trim_rows(entry.first);
    }
}

// Of a tensor whose pieces may all be there, rows are not kept besides.
bool weight_store::keeps_rows_of(const weight_held & h) const {
    return pimpl->keeps_rows && h.pieces.empty();
}

void weight_store::drop_rows(const weight_held & h) {
    const size_t page = system_page();
    row_pages & rows = pimpl->rows.at(h.tensor);
    address_decommit(h.rows_addr() - h.source.offset % page, rows.there.size() * page);
    rows.there.assign(rows.there.size(), false);
    n_row_now -= rows.n * page;
    rows.n = 0;
}

// Where too many have stayed.
void weight_store::trim_rows(const ggml_tensor * t) {
    const weight_held & h = *pimpl->find(t);
    if (!keeps_rows_of(h) && pimpl->rows.at(t).n * system_page() > weight_row_bytes_cap) {
        drop_rows(h);
    }
}

bool weight_store::read_rows(const ggml_tensor * t, const int32_t * ids, size_t n, std::string * error) {
    const weight_held & h = *pimpl->find(t);
    const weight_file & file = *pimpl->files[(size_t) h.source.file];
    const size_t page = system_page();
    row_pages & rows = pimpl->rows.at(t);
    std::vector<bool> & there = rows.there;
    const size_t head = h.source.offset % page;
    uint8_t * base = h.rows_addr() - head;
    const size_t row = ggml_row_size(t->type, t->ne[0]);

    trim_rows(t);
    const size_t step = keeps_rows_of(h) ? std::max<size_t>(1, row_read_bytes / page) : 1;
    for (size_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= t->ne[1]) {
            *error = "row " + std::to_string(ids[i]) + " of " + t->name + " does not exist";
            return false;
        }
        const size_t first = (head + row * (size_t) ids[i]) / page / step * step;
        const size_t end = ((head + row * (size_t) ids[i] + row - 1) / page / step + 1) * step;
        const size_t last = std::min(end, there.size()) - 1;
        if (!std::all_of(there.begin() + (ptrdiff_t) first, there.begin() + (ptrdiff_t) last + 1,
                         [](bool b) { return b; })) {
            address_commit(base + first * page, (last - first + 1) * page, page_kind::small);
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
        // each row that is looked up: others came along with it
        if (pimpl->checks_tensors && !weight_is_valid(t, base + head + row * (size_t) ids[i], row, error)) {
            return false;
        }
    }
    return true;
}

uint64_t weight_store::bytes_read() const {
    return pimpl->n_read;
}

} // namespace superllama
