#include "llama-weight-store.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "llama-address-space.h"
#include "llama-checksum.h"
#include "llama-expert-frames.h"
#include "llama-expert-table.h"
#include "llama-read-staging.h"
#include "llama-stream-ring.h"
#include "llama-weight-file.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <stdexcept>
#include <unordered_set>

static const size_t block_bytes_wanted = 8u << 20; // neighbouring matrices are read together up to this size
static const size_t block_gap_max = 64u << 10;     // small tensors between them that are read along
static const size_t matrix_bytes_min = 16u << 10;  // smaller ones are always resident
static const size_t row_bytes_cap = 4u << 20;      // pages of row tensors that may stay between two ubatches
static const size_t convert_bytes = 1u << 20;      // converted at a time: the staging memory of one reader
static const size_t resident_drop_min = 64u << 10; // smaller resident tensors stay, also while they are elsewhere

static const size_t huge_ranges_max = 16384;       // each is a mapping, of which the kernel limits the number
static const size_t huge_ring_min = 64u << 20;     // of blocks; of fewer, huge pages would be a large share
static const size_t arena_slack = llama_huge_page; // to begin with a whole one

// -------------------------------------------------------------------------------------------------- state

namespace {

enum tensor_role {
    ROLE_RESIDENT,
    ROLE_BY_ROW,
    ROLE_STREAM,
    ROLE_EXPERTS,
};

struct held_tensor {
    ggml_tensor * tensor;
    tensor_role role;
    bool converts; // the buffer type changes the layout of what is set
    llama_weight_source source;
    int32_t layer;
    int32_t n_experts = 0;
    uint32_t block = 0;  // the first one
    size_t addr_off = 0; // in its arena
    uint8_t * addr = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    bool held = true;   // of a resident tensor: it is to be in memory
    bool there = false; // and it is
};

struct arena {
    uint8_t * base;
    size_t bytes;
};

} // namespace

struct llama_weight_store::impl {
    explicit impl(int n_readers) : staging(n_readers) {}

    std::vector<std::unique_ptr<llama_weight_file>> files;
    std::vector<arena> arenas;
    std::unordered_set<const ggml_context *> contexts;

    std::vector<held_tensor> held;
    std::unordered_map<const ggml_tensor *, size_t> index;                // into held
    std::map<std::pair<int32_t, int32_t>, uint32_t> expert_blocks;        // (layer, expert)
    std::unordered_map<const ggml_tensor *, std::vector<bool>> row_pages; // which pages of a row tensor are there
    size_t n_row_pages = 0;
    size_t n_huge_ranges = 0;

    std::unique_ptr<llama_stream_ring> ring;                       // from the first budget on that streams
    std::map<size_t, std::unique_ptr<llama_expert_frames>> frames; // by the size of an expert
    std::unordered_map<const ggml_tensor *, llama_expert_table *> tables;
    llama_expert_waiters waiters;
    size_t n_frame_slack = 0; // of memory, where frames end on huge pages
    llama_read_staging staging;

    mutable std::atomic<uint64_t> n_read{ 0 };

    const held_tensor * find(const ggml_tensor * t) const {
        const auto it = index.find(t);
        return it == index.end() ? nullptr : &held[it->second];
    }
};

llama_weight_store::llama_weight_store(int n_readers) :
    pimpl(std::make_unique<impl>(n_readers)),
    n_resident(llama_read_staging::bytes()) {}

llama_weight_store::~llama_weight_store() {
    for (const arena & a : pimpl->arenas) {
        llama_address_release(a.base, a.bytes + arena_slack);
    }
}

int llama_weight_store::add_file(int fd) {
    pimpl->files.push_back(std::make_unique<llama_weight_file>(fd));
    return (int) pimpl->files.size() - 1;
}

// ------------------------------------------------------------------------------------------------- layout

static int32_t layer_of(const char * name) {
    int il = -1;
    return sscanf(name, "blk.%d.", &il) == 1 ? il : -1;
}

static tensor_role role_of(const ggml_tensor * t, bool by_row) {
    if (by_row) {
        return ROLE_BY_ROW;
    }
    if (layer_of(t->name) < 0 || ggml_n_dims(t) < 2 || ggml_nbytes(t) < matrix_bytes_min || t->view_src != nullptr) {
        return ROLE_RESIDENT;
    }
    if (t->ne[2] > 1) {
        return strstr(t->name, "_exps.weight") != nullptr && t->ne[3] == 1 ? ROLE_EXPERTS : ROLE_RESIDENT;
    }
    return ROLE_STREAM;
}

// A buffer over memory of ours that behaves like one that `buft` would allocate.
static ggml_backend_buffer_t make_buffer(ggml_backend_buffer_type_t buft, uint8_t * base, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(base, size);
    if (buft != ggml_backend_cpu_buffer_type()) {
        ggml_backend_buffer_ptr model(ggml_backend_buft_alloc_buffer(buft, 64));
        buffer->buft = buft;
        buffer->iface.init_tensor = model->iface.init_tensor;
        buffer->iface.set_tensor = model->iface.set_tensor;
        buffer->iface.get_tensor = model->iface.get_tensor;
        buffer->iface.cpy_tensor = model->iface.cpy_tensor;
    }
    return buffer;
}

ggml_backend_buffer_t llama_weight_store::alloc(ggml_context * ctx, ggml_backend_buffer_type_t buft,
                                                const std::function<llama_weight_source(const ggml_tensor *)> & source,
                                                const std::function<bool(const ggml_tensor *)> & by_row) {
    const bool plain = buft == ggml_backend_cpu_buffer_type();
    if (!plain && strcmp(ggml_backend_buft_name(buft), "CPU_REPACK") != 0) {
        return nullptr;
    }
    const size_t page = llama_system_page();

    std::vector<held_tensor> mine;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        held_tensor h = {};
        h.tensor = t;
        h.role = role_of(t, plain && by_row(t));
        h.converts = !plain;
        h.source = source(t);
        h.layer = layer_of(t->name);
        mine.push_back(h);
    }
    std::stable_sort(mine.begin(), mine.end(), [](const held_tensor & a, const held_tensor & b) {
        return std::make_pair(a.source.file, a.source.offset) < std::make_pair(b.source.file, b.source.offset);
    });

    // every tensor begins on pages of its own, at the offset in the page that it has in the file; matrices of
    // one block keep the distances that they have in the file, so that one read brings them all
    size_t end = 0;
    for (size_t i = 0; i < mine.size(); ++i) {
        held_tensor & h = mine[i];
        const size_t in_page = plain ? h.source.offset % page : 0;
        const size_t bytes = ggml_nbytes(h.tensor);
        if (h.role == ROLE_EXPERTS) {
            h.n_experts = (int32_t) h.tensor->ne[2];
            h.addr_off = llama_round_up(end, page); // of the table; the rest stays address space
            end = llama_round_up(h.addr_off + std::max(bytes, llama_expert_table::bytes((size_t) h.n_experts)), page);
            for (int32_t e = 0; e < h.n_experts; ++e) {
                const auto key = std::make_pair(h.layer, e);
                if (pimpl->expert_blocks.find(key) == pimpl->expert_blocks.end()) {
                    pimpl->expert_blocks[key] = (uint32_t) all_blocks.size();
                    all_blocks.emplace_back();
                    all_blocks.back().layer = h.layer;
                    all_blocks.back().expert = e;
                }
                const size_t share = bytes / (size_t) h.n_experts;
                all_blocks[pimpl->expert_blocks[key]].slices.push_back(
                    { h.tensor, share * (size_t) e, share, { h.source.file, h.source.offset + share * (uint64_t) e } });
            }
            h.block = pimpl->expert_blocks[{ h.layer, 0 }];
            continue;
        }
        if (h.role != ROLE_STREAM) {
            h.addr_off =
                llama_round_up(end, h.role == ROLE_RESIDENT && bytes >= llama_huge_page ? llama_huge_page : page) +
                in_page;
            end = llama_round_up(h.addr_off + bytes, page);
            continue;
        }
        llama_weight_block * last = all_blocks.empty() ? nullptr : &all_blocks.back();
        const held_tensor * previous = i > 0 ? &mine[i - 1] : nullptr;
        const bool joins = last != nullptr && last->expert < 0 && previous != nullptr &&
                           previous->role == ROLE_STREAM && previous->layer == h.layer &&
                           previous->source.file == h.source.file && last->bytes + bytes <= block_bytes_wanted &&
                           h.source.offset - (previous->source.offset + ggml_nbytes(previous->tensor)) <= block_gap_max;
        if (joins) {
            const size_t previous_end = previous->source.offset + ggml_nbytes(previous->tensor);
            h.addr_off = previous->addr_off + ggml_nbytes(previous->tensor);
            h.addr_off += plain ? h.source.offset - previous_end : llama_round_up(h.addr_off, 64) - h.addr_off;
        } else {
            all_blocks.emplace_back();
            last = &all_blocks.back();
            last->layer = h.layer;
            h.addr_off = llama_round_up(end, llama_huge_page) + in_page;
        }
        h.block = (uint32_t) (all_blocks.size() - 1);
        last->slices.push_back({ h.tensor, 0, bytes, h.source });
        last->bytes += bytes;
        end = llama_round_up(h.addr_off + bytes, page);
    }

    arena a = { nullptr, std::max(end, page) };
    a.base = llama_address_reserve(a.bytes + arena_slack);
    if (a.base == nullptr) {
        throw std::runtime_error("cannot reserve " + std::to_string(a.bytes >> 20) +
                                 " MiB of address space for weights; is it limited (ulimit -v)?");
    }
    llama_address_small_pages(a.base, a.bytes + arena_slack); // whatever the system's default: the budget counts pages
    pimpl->arenas.push_back(a);
    uint8_t * base = (uint8_t *) llama_round_up((size_t) a.base, llama_huge_page);

    ggml_backend_buffer_t buffer = make_buffer(buft, base, a.bytes);
    for (held_tensor & h : mine) {
        ggml_backend_tensor_alloc(buffer, h.tensor, base + h.addr_off);
        h.addr = base + h.addr_off;
        h.buffer = buffer;
        pimpl->index[h.tensor] = pimpl->held.size();
        pimpl->held.push_back(h);
        const size_t pages = llama_round_up(h.addr_off % page + ggml_nbytes(h.tensor), page);
        if (h.role == ROLE_RESIDENT) {
            n_resident += pages;
            llama_address_huge_pages(base + h.addr_off, ggml_nbytes(h.tensor));
        } else if (h.role == ROLE_EXPERTS) {
            h.tensor->flags |= GGML_TENSOR_FLAG_TABLE;
            pimpl->tables[h.tensor] = llama_expert_table::create(h.addr, (size_t) h.n_experts, pimpl->waiters);
            n_resident += llama_round_up(llama_expert_table::bytes((size_t) h.n_experts), page);
        } else if (h.role == ROLE_BY_ROW) {
            n_row_max += std::min(pages, 2 * row_bytes_cap); // what stays, and what one ubatch adds
            pimpl->row_pages[h.tensor].resize(pages / page);
        }
    }
    pimpl->contexts.insert(ctx);

    // the pages of each block
    for (llama_weight_block & b : all_blocks) {
        if (!b.ranges.empty() && b.expert < 0) {
            continue; // of an earlier buffer
        }
        b.ranges.clear();
        b.bytes = 0;
        const auto add = [&](size_t bytes, const llama_weight_source & from, bool converts) {
            const size_t head = converts ? 0 : from.offset % page;
            b.ranges.push_back({ b.bytes, llama_round_up(head + bytes, page), converts ? -1 : from.file,
                                 converts ? 0 : from.offset - head });
            return b.bytes + head;
        };
        if (b.expert >= 0) {
            for (llama_weight_slice & s : b.slices) {
                if (s.tensor->data != nullptr) {
                    const bool converts = pimpl->find(s.tensor)->converts;
                    s.at = add(s.bytes, s.source, converts);
                    b.bytes +=
                        llama_round_up(s.bytes, page) + (converts ? 0 : page); // the same for all: room for any head
                }
            }
            continue;
        }
        const auto * first = (uint8_t *) b.slices.front().tensor->data;
        const auto * last = (uint8_t *) b.slices.back().tensor->data + b.slices.back().bytes;
        const size_t head =
            add((size_t) (last - first), b.slices.front().source, pimpl->find(b.slices.front().tensor)->converts);
        for (llama_weight_slice & s : b.slices) {
            s.at = head + (size_t) ((uint8_t *) s.tensor->data - first);
        }
        b.home = (uint8_t *) b.slices.front().tensor->data - head;
        b.bytes = b.ranges.front().bytes;
        n_dense += b.bytes;
        if (b.bytes >= llama_huge_page && pimpl->n_huge_ranges < huge_ranges_max) {
            llama_address_huge_pages(b.home, b.bytes);
            pimpl->n_huge_ranges++;
        }
    }

    n_resident -= pimpl->n_frame_slack;
    pimpl->n_frame_slack = 0;
    for (const auto & size : expert_sizes()) {
        pimpl->n_frame_slack += llama_expert_frames::slack(size.first, size.second);
    }
    n_resident += pimpl->n_frame_slack;
    return buffer;
}

// How many experts there are of each size.
std::map<size_t, size_t> llama_weight_store::expert_sizes() const {
    std::map<size_t, size_t> sizes;
    for (const llama_weight_block & b : all_blocks) {
        if (b.expert >= 0) {
            sizes[b.bytes]++;
        }
    }
    return sizes;
}

bool llama_weight_store::owns(const ggml_context * ctx) const {
    return pimpl->contexts.count(ctx) > 0;
}

int32_t llama_weight_store::n_experts(const ggml_tensor * t) const {
    const held_tensor * h = pimpl->find(t);
    return h != nullptr ? h->n_experts : 0;
}

int32_t llama_weight_store::block_of(const ggml_tensor * t, int32_t expert) const {
    const held_tensor * h = pimpl->find(t);
    if (h == nullptr || (h->role != ROLE_STREAM && h->role != ROLE_EXPERTS)) {
        return -1;
    }
    return h->role == ROLE_STREAM ? (int32_t) h->block : (int32_t) pimpl->expert_blocks.at({ h->layer, expert });
}

size_t llama_weight_store::bytes_on_disk() const {
    size_t bytes = 0;
    for (const held_tensor & h : pimpl->held) {
        bytes += ggml_nbytes(h.tensor);
    }
    return bytes;
}

// ------------------------------------------------------------------------------------------------ reading

bool llama_weight_store::converts(uint32_t block) const {
    for (const llama_weight_range & r : all_blocks[block].ranges) {
        if (r.file < 0) {
            return true;
        }
    }
    return false;
}

uint64_t llama_weight_store::checksum(uint32_t block) const {
    const llama_weight_block & b = all_blocks[block];
    if (b.expert < 0) {
        return llama_checksum(b.addr, b.bytes, 0);
    }
    uint64_t sum = 0;
    for (const llama_weight_slice & s : b.slices) {
        sum = llama_checksum(b.addr + s.at, s.bytes, sum);
    }
    return sum;
}

bool llama_weight_store::verify(uint32_t block, std::string * error) {
    llama_weight_block & b = all_blocks[block];
    if (b.checksum != 0 && b.checksum != checksum(block)) {
        *error = pimpl->files[(size_t) b.ranges.front().file]->path() + " is damaged: block " + std::to_string(block) +
                 " of layer " + std::to_string(b.layer) +
                 " is not what was written; remove the file (`superllama cache prune`) and load the model again";
        return false;
    }
    b.checksum = 0;
    return true;
}

void llama_weight_store::set_source(uint32_t block, int file, uint64_t offset, uint64_t checksum) {
    all_blocks[block].checksum = checksum;
    for (llama_weight_range & r : all_blocks[block].ranges) {
        r.file = file;
        r.offset = offset + r.at;
    }
}

std::vector<llama_weight_part> llama_weight_store::parts(uint32_t block, size_t part_bytes) const {
    std::vector<llama_weight_part> result;
    const llama_weight_block & b = all_blocks[block];
    const auto cut = [&](uint32_t index, size_t first, size_t last, size_t step) {
        for (; first < last; first += step) {
            result.push_back({ block, index, first, std::min(step, last - first) });
        }
    };
    if (converts(block)) {
        for (uint32_t i = 0; i < b.slices.size(); ++i) {
            // rows are interleaved in groups of up to 16
            const size_t group = ggml_row_size(b.slices[i].tensor->type, b.slices[i].tensor->ne[0]) * 16;
            cut(i, 0, b.slices[i].bytes, std::max(group, llama_round_down(convert_bytes, group)));
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

// Of a block that is no expert: so many of its first bytes lie on huge pages, where the system has any.
size_t llama_weight_store::huge_bytes(const llama_weight_block & b) const {
    if (b.addr == b.home) {
        return llama_round_down(b.bytes, llama_huge_page);
    }
    return ring_page() == llama_huge_page ? b.bytes : 0;
}

const uint8_t * llama_weight_store::data(uint32_t block, size_t slice) const {
    return all_blocks[block].addr + all_blocks[block].slices[slice].at;
}

// Reads rows in the file's layout and lets the buffer put them in place in its own.
static bool convert_rows(const llama_weight_file & file, const llama_weight_slice & slice, uint8_t * to, size_t first,
                         size_t bytes, std::string * error) {
    std::vector<uint8_t> staging(bytes);
    if (!file.read_bytes(staging.data(), bytes, slice.source.offset + first, error)) {
        return false;
    }
    ggml_tensor rows = *slice.tensor;
    rows.data = to + first;
    rows.ne[1] = (int64_t) (bytes / ggml_row_size(rows.type, rows.ne[0]));
    rows.ne[2] = rows.ne[3] = 1;
    rows.nb[2] = rows.nb[3] = rows.nb[1] * (size_t) rows.ne[1];
    rows.buffer->iface.set_tensor(rows.buffer, &rows, staging.data(), 0, bytes);
    return true;
}

// Into small pages by way of a huge one, if no other reader has it.
static bool read_small_pages(const llama_weight_file & file, llama_read_staging & staging, uint8_t * addr, size_t bytes,
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

bool llama_weight_store::read_part(const llama_weight_part & part, std::string * error) const {
    const llama_weight_block & b = all_blocks[part.block];
    bool ok;
    if (converts(part.block)) {
        const llama_weight_slice & slice = b.slices[part.index];
        uint8_t * to = const_cast<uint8_t *>(data(part.block, part.index));
        ok = convert_rows(*pimpl->files[(size_t) slice.source.file], slice, to, part.first, part.bytes, error);
    } else {
        const llama_weight_range & range = b.ranges[part.index];
        const llama_weight_file & file = *pimpl->files[(size_t) range.file];
        uint8_t * addr = b.addr + range.at + part.first;
        const uint64_t offset = range.offset + part.first;
        ok = b.expert >= 0 || part.first < huge_bytes(b)
                 ? file.read_pages(addr, part.bytes, offset, error)
                 : read_small_pages(file, pimpl->staging, addr, part.bytes, offset, error);
    }
    pimpl->n_read += ok ? part.bytes : 0;
    return ok;
}

bool llama_weight_store::load_resident(std::string * error) {
    for (const auto & size : expert_sizes()) {
        auto & frames = pimpl->frames[size.first];
        if (frames == nullptr) {
            frames = std::make_unique<llama_expert_frames>(size.first, size.second);
        }
    }
    for (held_tensor & h : pimpl->held) {
        if (h.role != ROLE_RESIDENT || !h.held || h.there) {
            continue;
        }
        const llama_weight_file & file = *pimpl->files[(size_t) h.source.file];
        const size_t bytes = ggml_nbytes(h.tensor);
        bool ok = true;
        if (h.converts) {
            const size_t group = ggml_row_size(h.tensor->type, h.tensor->ne[0]) * 16;
            const size_t step = std::max(group, llama_round_down(convert_bytes, group));
            for (size_t first = 0; ok && first < bytes; first += step) {
                ok = convert_rows(file, { h.tensor, 0, bytes, h.source }, h.addr, first, std::min(step, bytes - first),
                                  error);
            }
        } else {
            const size_t head = h.source.offset % llama_system_page();
            ok = file.read_pages((uint8_t *) h.tensor->data - head, llama_round_up(head + bytes, llama_system_page()),
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

std::vector<llama_weight_tensor> llama_weight_store::tensors() const {
    std::vector<llama_weight_tensor> result;
    for (const held_tensor & h : pimpl->held) {
        if (h.role != ROLE_BY_ROW) {
            result.push_back({ h.tensor, h.source, h.layer });
        }
    }
    return result;
}

const uint8_t * llama_weight_store::read(const llama_weight_source & from, size_t bytes, uint8_t * staging,
                                         std::string * error) const {
    const size_t head = from.offset % llama_system_page();
    const size_t whole = llama_round_up(head + bytes, llama_system_page());
    if (!pimpl->files[(size_t) from.file]->read_pages(staging, whole, from.offset - head, error)) {
        return nullptr;
    }
    pimpl->n_read += bytes;
    return staging + head;
}

void llama_weight_store::hold_resident(const ggml_tensor * t, bool held) {
    const auto found = pimpl->index.find(t);
    if (found == pimpl->index.end()) {
        return;
    }
    held_tensor & h = pimpl->held[found->second];
    const size_t bytes = ggml_nbytes(t);
    if (h.role != ROLE_RESIDENT || h.held == held) {
        return;
    }
    const size_t page = llama_system_page();
    const size_t pages = llama_round_up(h.addr_off % page + bytes, page);
    h.held = held;
    if (bytes < resident_drop_min) {
        return;
    }
    if (held) {
        n_resident += pages;
    } else {
        h.there = false;
        n_resident -= pages;
        llama_address_discard(h.addr - h.addr_off % page, pages);
    }
}

bool llama_weight_store::is_resident(const ggml_tensor * t) const {
    const held_tensor * h = pimpl->find(t);
    return h != nullptr && h->role == ROLE_RESIDENT && h->there;
}

bool llama_weight_store::is_plain(const ggml_tensor * t) const {
    const held_tensor * h = pimpl->find(t);
    return h != nullptr && !h->converts;
}

bool llama_weight_store::is_here(const ggml_tensor * t) const {
    const held_tensor * h = pimpl->find(t);
    return h != nullptr && h->tensor->buffer == h->buffer;
}

bool llama_weight_store::unchanged(std::string * error) const {
    return std::all_of(pimpl->files.begin(), pimpl->files.end(),
                       [error](const auto & file) { return file->unchanged(error); });
}

bool llama_weight_store::is_by_row(const ggml_tensor * t) const {
    const held_tensor * h = pimpl->find(t);
    return h != nullptr && h->role == ROLE_BY_ROW;
}

bool llama_weight_store::read_rows(const ggml_tensor * t, const int32_t * ids, size_t n, std::string * error) {
    const held_tensor & h = *pimpl->find(t);
    const llama_weight_file & file = *pimpl->files[(size_t) h.source.file];
    const size_t page = llama_system_page();
    std::vector<bool> & there = pimpl->row_pages.at(t);
    const size_t head = h.source.offset % page;
    uint8_t * base = (uint8_t *) t->data - head;
    const size_t row = ggml_row_size(t->type, t->ne[0]);

    if (pimpl->n_row_pages * page > row_bytes_cap) {
        llama_address_discard(base, there.size() * page);
        there.assign(there.size(), false);
        pimpl->n_row_pages = 0;
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
            pimpl->n_row_pages += there[p] ? 0 : 1;
            there[p] = true;
        }
    }
    return true;
}

// ------------------------------------------------------------------------------------------------- memory

void llama_weight_store::place(uint32_t block, bool streamed) {
    llama_weight_block & b = all_blocks[block];
    if (b.expert >= 0) {
        set_frame(block, pimpl->frames.at(b.bytes)->take(block));
    } else {
        b.addr = streamed ? pimpl->ring->take(block, b.bytes) : b.home;
    }
}

void llama_weight_store::point(uint32_t block) {
    for (size_t i = 0; i < all_blocks[block].slices.size(); ++i) {
        ggml_tensor * t = all_blocks[block].slices[i].tensor;
        if (is_here(t)) {
            t->data = const_cast<uint8_t *>(data(block, i));
        }
    }
}

void llama_weight_store::drop(uint32_t block) {
    llama_weight_block & b = all_blocks[block];
    if (b.expert >= 0) {
        pimpl->frames.at(b.bytes)->give_back(b.addr);
        set_frame(block, nullptr);
    } else if (b.addr == b.home) {
        llama_address_discard(b.home, b.bytes);
    } else {
        pimpl->ring->give_back(b.addr);
    }
    b.addr = nullptr;
}

size_t llama_weight_store::ring_page() const {
    return n_dense < huge_ring_min ? llama_system_page() : llama_huge_page;
}

void llama_weight_store::limit_ring(size_t bytes) {
    if (pimpl->ring == nullptr && bytes > 0) {
        pimpl->ring = std::make_unique<llama_stream_ring>(n_dense, ring_page());
    }
    if (pimpl->ring != nullptr) {
        pimpl->ring->limit(bytes);
    }
}

bool llama_weight_store::has_ring_room(size_t bytes) const {
    return pimpl->ring != nullptr ? pimpl->ring->has_room(bytes) : bytes == 0;
}

void llama_weight_store::compact_ring(const std::function<void(uint32_t)> & moved) {
    pimpl->ring->compact([&](uint32_t block, uint8_t * to) {
        all_blocks[block].addr = to;
        moved(block);
    });
}

size_t llama_weight_store::ring_memory() const {
    return pimpl->ring != nullptr ? pimpl->ring->memory_bytes() : 0;
}

void llama_weight_store::set_frame(uint32_t expert, uint8_t * frame) {
    llama_weight_block & b = all_blocks[expert];
    for (const llama_weight_slice & s : b.slices) {
        pimpl->tables.at(s.tensor)->set(b.expert, nullptr);
    }
    b.addr = frame;
}

void llama_weight_store::publish(uint32_t expert, size_t slice) {
    const llama_weight_slice & s = all_blocks[expert].slices[slice];
    pimpl->tables.at(s.tensor)->set(all_blocks[expert].expert, data(expert, slice));
}

int64_t llama_weight_store::waited_us() const {
    const std::lock_guard<std::mutex> lock(pimpl->waiters.mutex);
    return pimpl->waiters.waited_us;
}

size_t llama_weight_store::expert_memory() const {
    size_t bytes = 0;
    for (const auto & entry : pimpl->frames) {
        bytes += entry.second->memory_bytes();
    }
    return bytes;
}

bool llama_weight_store::has_frame(uint32_t block, size_t limit) const {
    const size_t bytes = all_blocks[block].bytes;
    const size_t memory = expert_memory();
    return memory + (pimpl->frames.at(bytes)->has_free() ? 0 : bytes) <= limit;
}

void llama_weight_store::trim_experts(size_t limit, const std::function<bool(uint32_t)> & may_move) {
    const auto moved = [this](uint32_t block, uint8_t * to) {
        set_frame(block, to);
        for (size_t i = 0; i < all_blocks[block].slices.size(); ++i) {
            publish(block, i);
        }
    };
    for (const auto & entry : pimpl->frames) {
        while (expert_memory() > limit && entry.second->has_free() && entry.second->shrink(may_move, moved)) {
        }
    }
}

uint64_t llama_weight_store::bytes_read() const {
    return pimpl->n_read;
}

std::string llama_weight_store::content_key() const {
    std::string key;
    for (const auto & file : pimpl->files) {
        key += file->content_key() + ";";
    }
    return key;
}
