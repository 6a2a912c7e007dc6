// The layout of weight_store: which tensors are read together, where each has its home, and questions about that.

#include "weights/store_impl.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-backend.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace superllama {

static const size_t block_bytes_wanted = 8u << 20; // neighbouring matrices are read together up to this size
static const size_t block_gap_max = 64u << 10;     // small tensors between them that are read along
static const size_t matrix_bytes_min = 16u << 10;  // smaller ones are always resident

static int32_t layer_of(const char * name) {
    int il = -1;
    return sscanf(name, "blk.%d.", &il) == 1 ? il : -1;
}

static weight_role role_of(const ggml_tensor * t, bool by_row, bool by_piece) {
    if (by_row || by_piece) {
        return by_row ? weight_role::by_row : weight_role::by_piece;
    }
    if (layer_of(t->name) < 0 || ggml_n_dims(t) < 2 || ggml_nbytes(t) < matrix_bytes_min || t->view_src != nullptr) {
        return weight_role::resident;
    }
    if (t->ne[2] > 1) {
        return strstr(t->name, "_exps.weight") != nullptr && t->ne[3] == 1 ? weight_role::experts
                                                                           : weight_role::resident;
    }
    return weight_role::streamed;
}

// What a tensor that is always resident begins on.
static size_t page_for(size_t bytes) {
    return bytes >= huge_page ? huge_page : system_page();
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

// Every tensor begins on pages of its own, at the offset in the page that it has in the file; matrices of one block
// keep the distances that they have in the file, so that one read brings them all. The size of all.
size_t weight_store::lay_out(std::vector<weight_held> & mine, ggml_backend_buffer_type_t buft) {
    const size_t page = system_page();
    size_t end = 0;
    const weight_held * previous = nullptr;
    for (weight_held & h : mine) {
        const size_t in_page = h.converts ? 0 : h.source.offset % page;
        const size_t bytes = h.bytes;
        switch (h.role) {
            case weight_role::experts:
                h.n_experts = (int32_t) h.tensor->ne[2];
                h.addr_off = round_up(end, page); // of the table; the rest stays address space
                end = h.addr_off + std::max(bytes, expert_table::bytes((size_t) h.n_experts));
                add_experts(h);
                break;
            case weight_role::streamed:
                if (joins_last_block(h, previous)) {
                    const size_t previous_end = previous->source.offset + ggml_nbytes(previous->tensor);
                    h.addr_off = previous->addr_off + previous->bytes;
                    h.addr_off = h.converts ? round_up(h.addr_off, 64) : h.addr_off + h.source.offset - previous_end;
                } else {
                    all_blocks.emplace_back();
                    all_blocks.back().layer = h.layer;
                    h.addr_off = round_up(end, huge_page) + in_page;
                }
                h.block = (uint32_t) (all_blocks.size() - 1);
                all_blocks.back().slices.push_back({ h.tensor, ggml_nbytes(h.tensor), h.source, bytes });
                all_blocks.back().bytes += bytes;
                end = h.addr_off + bytes;
                break;
            default:
                h.addr_off = round_up(end, h.role == weight_role::resident ? page_for(bytes) : page) + in_page;
                end = h.addr_off + bytes;
                h.rows_off = h.addr_off;
                if (h.piece_layer >= 0) {
                    add_pieces(h, buft);
                    h.rows_off = round_up(end, page) + in_page;
                    end = h.rows_off + (h.role == weight_role::by_row ? bytes : 0);
                }
        }
        end = round_up(end, page);
        previous = &h;
    }
    return std::max(end, page);
}

bool weight_store::joins_last_block(const weight_held & h, const weight_held * previous) const {
    return previous != nullptr && previous->role == weight_role::streamed && previous->layer == h.layer &&
           previous->source.file == h.source.file && all_blocks.back().bytes + h.bytes <= block_bytes_wanted &&
           h.source.offset - (previous->source.offset + ggml_nbytes(previous->tensor)) <= block_gap_max;
}

// So many rows that kernels which interleave them, and the conversion, see whole groups, and that every piece begins at
// the same offset in a page.
void weight_store::add_pieces(weight_held & h, ggml_backend_buffer_type_t buft) {
    const size_t row = ggml_row_size(h.tensor->type, h.tensor->ne[0]);
    const size_t memory_row = memory_of(h.tensor, buft, row * (size_t) group_rows) / (size_t) group_rows;
    const size_t page = system_page();
    const size_t step = std::max((size_t) group_rows, page / std::gcd(memory_row, page));
    const auto n_rows = (int64_t) round_up(std::max<size_t>(1, block_bytes_wanted / row), step);
    for (int64_t first = 0; first < h.tensor->ne[1]; first += n_rows) {
        const size_t bytes = row * (size_t) std::min(n_rows, h.tensor->ne[1] - first);
        const weight_source source = { h.source.file, h.source.offset + row * (uint64_t) first };
        h.pieces.push_back((uint32_t) all_blocks.size());
        weight_block & b = all_blocks.emplace_back();
        b.layer = h.piece_layer;
        b.first_row = first;
        b.slices.push_back({ h.tensor, bytes, source, memory_of(h.tensor, buft, bytes) });
    }
}

// A share of the tensor to the block of each expert of its layer.
void weight_store::add_experts(weight_held & h) {
    const size_t share = ggml_nbytes(h.tensor) / (size_t) h.n_experts;
    const size_t memory_share = h.bytes / (size_t) h.n_experts;
    for (int32_t e = 0; e < h.n_experts; ++e) {
        const auto added = pimpl->expert_blocks.insert({ { h.layer, e }, (uint32_t) all_blocks.size() });
        if (added.second) {
            all_blocks.emplace_back();
            all_blocks.back().layer = h.layer;
            all_blocks.back().expert = e;
        }
        const size_t first = share * (size_t) e;
        all_blocks[added.first->second].slices.push_back(
            { h.tensor, share, { h.source.file, h.source.offset + first }, memory_share });
    }
    h.block = pimpl->expert_blocks[{ h.layer, 0 }];
}

ggml_backend_buffer_t weight_store::alloc(ggml_context * ctx, ggml_backend_buffer_type_t buft,
                                          const std::function<weight_source(const ggml_tensor *)> & source,
                                          const std::function<bool(const ggml_tensor *)> & by_row,
                                          const std::function<int32_t(const ggml_tensor *)> & by_piece) {
    const bool plain = keeps_layout(buft);
    if (plain) {
        buft = ggml_backend_cpu_buffer_type(); // a device's host memory too: ours lies in ranges of our own
    }
    if (!plain && !converts_by_rows(ctx, buft)) {
        n_resident += ggml_backend_buft_is_host(buft) || is_of_cpu(buft) ? bytes_of(ctx, buft) : 0;
        return nullptr;
    }

    std::vector<weight_held> mine;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        weight_held h = {};
        h.tensor = t;
        h.piece_layer = by_piece(t);
        h.role = role_of(t, plain && by_row(t), h.piece_layer >= 0);
        h.converts = !plain;
        h.bytes = plain ? ggml_nbytes(t) : ggml_backend_buft_get_alloc_size(buft, t);
        h.source = source(t);
        h.layer = layer_of(t->name);
        mine.push_back(h);
    }
    std::stable_sort(mine.begin(), mine.end(), [](const weight_held & a, const weight_held & b) {
        return std::make_pair(a.source.file, a.source.offset) < std::make_pair(b.source.file, b.source.offset);
    });
    const size_t size = lay_out(mine, buft);

    pimpl->arenas.push_back(std::make_unique<address_range>(size, huge_page, "weights"));
    uint8_t * base = pimpl->arenas.back()->base();
    ggml_backend_buffer_t buffer = make_buffer(buft, base, size);
    for (weight_held & h : mine) {
        ggml_backend_tensor_alloc(buffer, h.tensor, base + h.addr_off);
        h.addr = base + h.addr_off;
        h.buffer = buffer;
        h.host = *h.tensor;
        take_over(h);
    }
    pimpl->contexts.insert(ctx);
    for (weight_block & b : all_blocks) {
        if (b.expert >= 0) {
            lay_out_expert(b);
        } else if (b.home == nullptr && b.first_row >= 0) {
            lay_out_piece(b);
        } else if (b.home == nullptr) {
            lay_out_dense(b);
        }
    }

    count_slack();
    return buffer;
}

void weight_store::count_slack() {
    n_resident -= pimpl->n_frame_slack;
    pimpl->n_frame_slack = 0;
    for (const auto & entry : expert_sizes()) {
        pimpl->n_frame_slack += frame_memory::slack(entry.first, entry.second, pimpl->locked != nullptr);
    }
    n_resident += pimpl->n_frame_slack;
}

bool weight_store::is_locked(const ggml_tensor * t) const {
    return pimpl->locked != nullptr && n_experts(t) > 0;
}

void weight_store::lock_experts(ggml_backend_buffer_type_t buft) {
    pimpl->locked = buft;
    count_slack();
}

void weight_store::take_over(const weight_held & h) {
    pimpl->index[h.tensor] = pimpl->held.size();
    pimpl->names[h.tensor->name] = h.tensor;
    if (!h.pieces.empty()) {
        pimpl->names_in_pieces[h.tensor->name] = h.tensor;
    }
    pimpl->held.push_back(h);
    const size_t page = system_page();
    const size_t pages = round_up(h.addr_off % page + h.bytes, page);
    if (h.role == weight_role::resident) {
        n_resident += pages;
    } else if (h.role == weight_role::experts) {
        h.tensor->flags |= GGML_TENSOR_FLAG_TABLE;
        address_commit(h.addr, round_up(expert_table::bytes((size_t) h.n_experts), page), page_kind::small);
        pimpl->tables[h.tensor] = expert_table::create(h.addr, (size_t) h.n_experts, pimpl->waiters);
        n_resident += round_up(expert_table::bytes((size_t) h.n_experts), page);
    } else if (h.role == weight_role::by_row) {
        n_row_max += row_bytes(pages);
        n_row_all += h.pieces.empty() ? pages : 0; // all its pieces are all its rows
        pimpl->rows[h.tensor].there.resize(pages / page);
    }
}

// A range of whole pages, and where the slice begins in the block.
static size_t add_range(weight_block & b, size_t bytes, const weight_source & from, bool converts) {
    const size_t page = system_page();
    const size_t head = converts ? 0 : from.offset % page;
    b.ranges.push_back(
        { b.bytes, round_up(head + bytes, page), converts ? -1 : from.file, converts ? 0 : from.offset - head });
    return b.bytes + head;
}

// One range for all its matrices.
void weight_store::lay_out_dense(weight_block & b) {
    const auto * first = (uint8_t *) b.slices.front().tensor->data;
    const auto * last = (uint8_t *) b.slices.back().tensor->data + b.slices.back().memory_bytes;
    const weight_source & from = b.slices.front().source;
    b.bytes = 0;
    const size_t head = add_range(b, (size_t) (last - first), from, pimpl->find(b.slices.front().tensor)->converts);
    for (weight_slice & s : b.slices) {
        s.at = head + (size_t) ((uint8_t *) s.tensor->data - first);
    }
    b.home = (uint8_t *) b.slices.front().tensor->data - head;
    b.bytes = b.ranges.front().bytes;
    n_dense += b.bytes;
}

void weight_store::lay_out_piece(weight_block & b) {
    weight_slice & s = b.slices.front();
    const weight_held & h = *pimpl->find(s.tensor);
    b.bytes = 0;
    s.at = add_range(b, s.memory_bytes, s.source, h.converts);
    const size_t before = ggml_row_size(h.tensor->type, h.tensor->ne[0]) * (size_t) b.first_row;
    b.home = h.addr + memory_of_first(h.tensor, before) - s.at;
    b.bytes = b.ranges.front().bytes;
    n_dense += b.bytes;
}

// A range for each of its matrices that is there already.
void weight_store::lay_out_expert(weight_block & b) {
    const size_t page = system_page();
    b.ranges.clear();
    b.bytes = 0;
    for (weight_slice & s : b.slices) {
        if (s.tensor->data != nullptr) {
            const bool converts = pimpl->find(s.tensor)->converts;
            s.at = add_range(b, s.memory_bytes, s.source, converts);
            b.bytes += round_up(s.memory_bytes, page) + (converts ? 0 : page); // the same for all: room for any head
        }
    }
}

// How many experts there are of each size.
std::map<size_t, size_t> weight_store::expert_sizes() const {
    std::map<size_t, size_t> sizes;
    for (const weight_block & b : all_blocks) {
        if (b.expert >= 0) {
            sizes[b.bytes]++;
        }
    }
    return sizes;
}

bool weight_store::owns(const ggml_context * ctx) const {
    return pimpl->contexts.count(ctx) > 0;
}

int32_t weight_store::n_experts(const ggml_tensor * t) const {
    const weight_held * h = pimpl->find(t);
    return h != nullptr ? h->n_experts : 0;
}

const std::vector<uint32_t> & weight_store::pieces_of(const ggml_tensor * t) const {
    static const std::vector<uint32_t> none;
    const weight_held * h = pimpl->find(t);
    return h != nullptr ? h->pieces : none;
}

const ggml_tensor * weight_store::named_in_pieces(const std::string & name) const {
    const auto it = pimpl->names_in_pieces.find(name);
    return it == pimpl->names_in_pieces.end() ? nullptr : it->second;
}

const ggml_tensor * weight_store::named(const std::string & name) const {
    const auto it = pimpl->names.find(name);
    return it == pimpl->names.end() ? nullptr : it->second;
}

int32_t weight_store::block_of(const ggml_tensor * t, int32_t expert) const {
    const weight_held * h = pimpl->find(t);
    if (h == nullptr || (h->role != weight_role::streamed && h->role != weight_role::experts)) {
        return -1;
    }
    return h->role == weight_role::streamed ? (int32_t) h->block
                                            : (int32_t) pimpl->expert_blocks.at({ h->layer, expert });
}

size_t weight_store::bytes_on_disk() const {
    size_t bytes = 0;
    for (const weight_held & h : pimpl->held) {
        bytes += ggml_nbytes(h.tensor);
    }
    return bytes;
}

std::vector<weight_tensor> weight_store::tensors() const {
    std::vector<weight_tensor> result;
    for (const weight_held & h : pimpl->held) {
        if (h.role != weight_role::by_row) {
            result.push_back({ h.tensor, h.source, h.layer });
        }
    }
    return result;
}

bool weight_store::is_by_row(const ggml_tensor * t) const {
    const weight_held * h = pimpl->find(t);
    return h != nullptr && h->role == weight_role::by_row;
}

bool weight_store::is_partial(const ggml_tensor * t) const {
    const weight_held * h = pimpl->find(t);
    return h != nullptr && (h->role == weight_role::by_row || h->role == weight_role::by_piece);
}

bool weight_store::is_resident(const ggml_tensor * t) const {
    const weight_held * h = pimpl->find(t);
    return h != nullptr && h->role == weight_role::resident && h->there;
}

bool weight_store::is_plain(const ggml_tensor * t) const {
    const weight_held * h = pimpl->find(t);
    return h != nullptr && !h->converts;
}

size_t weight_store::memory_of_first(const ggml_tensor * t, size_t file_bytes) const {
    const weight_held & h = *pimpl->find(t);
    return memory_of(&h.host, h.buffer->buft, file_bytes);
}

bool weight_store::is_here(const ggml_tensor * t) const {
    const weight_held * h = pimpl->find(t);
    return h != nullptr && h->tensor->buffer == h->buffer;
}

} // namespace superllama
