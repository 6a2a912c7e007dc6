// The memory of weight_store: homes, the ring, frames of experts.

#include "weights/store_impl.h"

#include <algorithm>

namespace superllama {

static const size_t resident_drop_min = 64u << 10; // smaller resident tensors stay, also while they are elsewhere
static const size_t huge_ring_min = 64u << 20;     // of blocks; of fewer, huge pages would be a large share

weight_store::weight_store(int n_readers) : pimpl(std::make_unique<impl>(n_readers)) {}

weight_store::~weight_store() = default;

int weight_store::add_file(int fd) {
    pimpl->files.push_back(std::make_unique<weight_file>(fd));
    return (int) pimpl->files.size() - 1;
}

size_t weight_store::staging_bytes() const {
    size_t bytes = staging_buffer::bytes();
    // whatever copies there are: a block is converted where its copy turns out to be bad
    if (std::any_of(pimpl->held.begin(), pimpl->held.end(), [](const weight_held & h) { return h.converts; })) {
        bytes += (size_t) std::max(n_converting, pimpl->n_readers) * page_buffer::memory_bytes(convert_bytes);
    }
    bytes += pimpl->names_in_pieces.empty() ? 0 : piece_result_bytes;
    return bytes;
}

// -------------------------------------------------------------------------------------------------- blocks

void weight_store::place(uint32_t block, bool streamed) {
    weight_block & b = all_blocks[block];
    if (pimpl->copy_failed && b.copy.file >= 0) {
        read_from(b, false);
    }
    if (b.expert >= 0) {
        set_frame(block, pimpl->frames.at(b.bytes)->take(block));
    } else {
        if (!streamed) {
            address_commit(b.home, b.bytes, page_kind::huge);
        }
        b.addr = streamed ? pimpl->ring->take(block, b.bytes) : b.home;
    }
}

void weight_store::point(uint32_t block) {
    if (all_blocks[block].first_row >= 0) {
        return; // who multiplies with it asks where it is
    }
    for (size_t i = 0; i < all_blocks[block].slices.size(); ++i) {
        ggml_tensor * t = all_blocks[block].slices[i].tensor;
        if (is_here(t)) {
            t->data = const_cast<uint8_t *>(data(block, i));
        }
    }
}

void weight_store::point_to_pieces(const ggml_tensor * t, bool all) {
    const weight_held & h = *pimpl->find(t);
    h.tensor->data = all ? h.addr : h.rows_addr();
}

size_t weight_store::slice_of(uint32_t block, const ggml_tensor * t) const {
    const auto & slices = all_blocks[block].slices;
    const auto mine = std::find_if(slices.begin(), slices.end(), [t](const weight_slice & s) { return s.tensor == t; });
    return (size_t) (mine - slices.begin());
}

// That no other block at its home needs: pieces of a matrix share a page where one ends and the next begins.
std::pair<uint8_t *, uint8_t *> weight_store::pages_of_home(const weight_block & b) const {
    std::pair<uint8_t *, uint8_t *> pages = { b.home, b.home + b.bytes };
    if (b.first_row < 0) {
        return pages;
    }
    for (uint32_t id : pieces_of(b.slices.front().tensor)) {
        const weight_block & other = all_blocks[id];
        if (other.addr == nullptr || other.addr != other.home) {
            continue;
        }
        if (other.home < b.home) {
            pages.first = std::max(pages.first, other.home + other.bytes);
        } else if (other.home > b.home) {
            pages.second = std::min(pages.second, other.home);
        }
    }
    return pages;
}

void weight_store::drop(uint32_t block) {
    weight_block & b = all_blocks[block];
    if (b.expert >= 0) {
        pimpl->frames.at(b.bytes)->give_back(b.addr);
        set_frame(block, nullptr);
    } else if (b.addr == b.home) {
        const auto pages = pages_of_home(b);
        if (pages.first < pages.second) {
            address_decommit(pages.first, (size_t) (pages.second - pages.first));
        }
    } else {
        pimpl->ring->give_back(b.addr);
    }
    b.addr = nullptr;
}

uint8_t * weight_store::place_of(uint32_t block, const weight_slice & slice) const {
    return all_blocks[block].addr + slice.at;
}

const uint8_t * weight_store::data(uint32_t block, size_t slice) const {
    return place_of(block, all_blocks[block].slices[slice]);
}

// Of a block that is no expert: so many of its first bytes lie on huge pages, where the system has any.
size_t weight_store::huge_bytes(const weight_block & b) const {
    if (b.addr == b.home) {
        return round_down(b.bytes, huge_page);
    }
    return ring_page() == huge_page ? b.bytes : 0;
}

void weight_store::hold_resident(const ggml_tensor * t, bool held) {
    const auto found = pimpl->index.find(t);
    if (found == pimpl->index.end()) {
        return;
    }
    weight_held & h = pimpl->held[found->second];
    const size_t bytes = h.bytes;
    if (h.role != weight_role::resident || h.held == held) {
        return;
    }
    const size_t page = system_page();
    const size_t pages = round_up(h.addr_off % page + bytes, page);
    h.held = held;
    if (bytes < resident_drop_min) {
        return;
    }
    if (held) {
        n_resident += pages;
    } else {
        h.there = false;
        n_resident -= pages;
        address_decommit(h.addr - h.addr_off % page, pages);
    }
}

void weight_store::hold_whole(const ggml_tensor * t) {
    weight_held & h = pimpl->held[pimpl->index.at(t)];
    const size_t page = system_page();
    const size_t pages = round_up(h.addr_off % page + h.bytes, page);
    n_resident += pages;
    if (h.role == weight_role::by_row) {
        n_row_max -= row_bytes(pages);
        n_row_all -= h.pieces.empty() ? pages : 0;
        drop_rows(h);
        pimpl->rows.erase(t);
    }
    h.role = weight_role::resident;
    h.tensor->data = h.addr;
    h.pieces.clear();
    pimpl->names_in_pieces.erase(t->name);
}

size_t weight_store::ring_page() const {
    return n_dense < huge_ring_min ? system_page() : huge_page;
}

void weight_store::reserve_ring() {
    if (n_dense > 0) {
        pimpl->ring = std::make_unique<stream_ring>(n_dense + n_dense / 8, ring_page()); // with holes
    }
}

void weight_store::limit_ring(size_t bytes) {
    if (pimpl->ring != nullptr) {
        pimpl->ring->limit(bytes);
    }
}

bool weight_store::has_ring_room(size_t bytes) const {
    return pimpl->ring != nullptr ? pimpl->ring->has_room(bytes) : bytes == 0;
}

void weight_store::compact_ring(const std::function<void(uint32_t)> & moved) {
    pimpl->ring->compact([&](uint32_t block, uint8_t * to) {
        all_blocks[block].addr = to;
        moved(block);
    });
}

bool weight_store::in_ring(uint32_t block) const {
    const weight_block & b = all_blocks[block];
    return b.expert < 0 && b.addr != nullptr && b.addr != b.home;
}

size_t weight_store::ring_memory() const {
    return pimpl->ring != nullptr ? pimpl->ring->memory_bytes() : 0;
}

void weight_store::set_frame(uint32_t expert, uint8_t * frame) {
    weight_block & b = all_blocks[expert];
    for (const weight_slice & s : b.slices) {
        pimpl->tables.at(s.tensor)->set(b.expert, nullptr);
    }
    b.addr = frame;
}

void weight_store::publish(uint32_t expert, size_t slice) {
    const weight_slice & s = all_blocks[expert].slices[slice];
    pimpl->tables.at(s.tensor)->set(all_blocks[expert].expert, data(expert, slice));
}

void weight_store::take_asked(const ggml_tensor * t, const std::function<void(int32_t)> & visit) {
    pimpl->tables.at(t)->take_asked(visit);
}

int64_t weight_store::waited_us() const {
    const std::lock_guard<std::mutex> lock(pimpl->waiters.mutex);
    return pimpl->waiters.waited_us;
}

size_t weight_store::expert_memory() const {
    size_t bytes = 0;
    for (const auto & entry : pimpl->frames) {
        bytes += entry.second->memory_bytes();
    }
    return bytes;
}

bool weight_store::has_frame(uint32_t block, size_t limit) const {
    const size_t bytes = all_blocks[block].bytes;
    const size_t memory = expert_memory();
    return memory + (pimpl->frames.at(bytes)->has_free() ? 0 : bytes) <= limit;
}

void weight_store::trim_experts(size_t limit, const std::function<bool(uint32_t)> & may_move) {
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

} // namespace superllama
