// The state of llama_weight_store, which three files share: layout, memory, reads.
#pragma once

#include "llama-address-space.h"
#include "llama-expert-frames.h"
#include "llama-expert-table.h"
#include "llama-read-staging.h"
#include "llama-stream-ring.h"
#include "llama-weight-file.h"
#include "llama-weight-store.h"

#include <atomic>
#include <map>
#include <memory>
#include <unordered_set>
#include <vector>

static const size_t llama_weight_row_bytes_cap = 4u << 20; // pages of row tensors that may stay between two ubatches

enum llama_weight_role {
    LLAMA_WEIGHT_RESIDENT,
    LLAMA_WEIGHT_BY_ROW,
    LLAMA_WEIGHT_STREAM,
    LLAMA_WEIGHT_EXPERTS,
};

struct llama_weight_held {
    ggml_tensor * tensor;
    llama_weight_role role;
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

struct llama_weight_store::impl {
    explicit impl(int n_readers) : staging(n_readers) {}

    std::vector<std::unique_ptr<llama_weight_file>> files;
    std::vector<std::unique_ptr<llama_address_range>> arenas; // homes
    std::unordered_set<const ggml_context *> contexts;

    std::vector<llama_weight_held> held;
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

    const llama_weight_held * find(const ggml_tensor * t) const {
        const auto it = index.find(t);
        return it == index.end() ? nullptr : &held[it->second];
    }
};
