// The state of weight_store, which three files share: layout, memory, reads.
#pragma once

#include "io/address_space.h"
#include "weights/experts/frames.h"
#include "weights/experts/table.h"
#include "io/staging.h"
#include "weights/ring.h"
#include "io/weight_file.h"
#include "weights/store.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_set>
#include <vector>

namespace superllama {

static const size_t weight_row_bytes_cap = 4u << 20; // pages of row tensors that may stay between two ubatches
static const size_t row_read_bytes = 256u << 10;     // where all rows may stay, they come with their neighbours

static const size_t convert_bytes = 256u << 10; // converted at a time: the memory of one reader
static const int n_converting = 6;              // readers that are counted, so that a plan knows no threads

// Of a tensor that is looked up by rows: what stays, and what one ubatch adds.
static inline size_t row_bytes(size_t tensor_bytes) {
    return std::min(tensor_bytes, 2 * weight_row_bytes_cap);
}

// So many bytes of the file as a tensor of its own, with the same columns.
ggml_tensor rows_of(const ggml_tensor * t, size_t file_bytes);

// Of the first rows of a tensor: so much memory do so many bytes of the file take. Buffer types that convert may take
// more than there is in the file.
size_t memory_of(const ggml_tensor * t, ggml_backend_buffer_type_t buft, size_t file_bytes);

bool is_of_cpu(ggml_backend_buffer_type_t buft);
// Weights lie there as in the file: the CPU's own memory, or what a device reads well (page-locked).
bool keeps_layout(ggml_backend_buffer_type_t buft);
size_t bytes_of(const ggml_context * ctx, ggml_backend_buffer_type_t buft); // of all its tensors
bool converts_by_rows(const ggml_context * ctx, ggml_backend_buffer_type_t buft);

// How the bytes of a tensor come to be in memory, after the operations that read it.
enum class weight_role {
    resident, // always there
    by_row,   // looked up by rows: only those that a ubatch names are read
    by_piece, // multiplied with, a piece at a time
    streamed, // with its block
    experts,  // one matrix at a time, by way of a table
};

struct weight_held {
    ggml_tensor * tensor;
    weight_role role;
    bool converts; // the buffer type changes the layout of what is set
    weight_source source;
    int32_t layer;
    int32_t piece_layer = -1; // the layer of its pieces; -1: it has none
    int32_t n_experts = 0;
    uint32_t block = 0;           // the first one
    std::vector<uint32_t> pieces; // also of one that is looked up by rows; they follow each other in its memory
    size_t bytes = 0;             // of memory
    size_t addr_off = 0;          // in its arena
    size_t rows_off = 0;          // where it is looked up by rows: apart from its pieces
    uint8_t * addr = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    ggml_tensor host = {}; // as the tensor is on the host, also while it points to a device
    bool held = true;      // of a resident tensor: it is to be in memory
    bool there = false;    // and it is

    uint8_t * rows_addr() const { return addr - addr_off + rows_off; }
};

// Which pages of a tensor that is looked up by rows are in memory.
struct row_pages {
    std::vector<bool> there;
    size_t n = 0;
};

struct weight_store::impl {
    explicit impl(int n_readers) : n_readers(n_readers), staging(n_readers) {}

    int n_readers;

    std::vector<std::unique_ptr<weight_file>> files;
    std::vector<std::unique_ptr<address_range>> arenas; // homes
    std::unordered_set<const ggml_context *> contexts;

    std::vector<weight_held> held;
    std::unordered_map<const ggml_tensor *, size_t> index; // into held
    std::unordered_map<std::string, const ggml_tensor *> names;
    std::unordered_map<std::string, const ggml_tensor *> names_in_pieces;
    std::map<std::pair<int32_t, int32_t>, uint32_t> expert_blocks; // (layer, expert)
    std::unordered_map<const ggml_tensor *, row_pages> rows;       // of tensors that are looked up by rows
    bool keeps_rows = false;

    std::unique_ptr<stream_ring> ring;                       // from the first budget on that streams
    std::map<size_t, std::unique_ptr<expert_frames>> frames; // by the size of an expert
    std::unordered_map<const ggml_tensor *, expert_table *> tables;
    expert_waiters waiters;
    ggml_backend_buffer_type_t locked = nullptr; // of the memory of frames; null: it is our own
    size_t n_frame_slack = 0;                    // of memory that frames do not fill
    staging_buffer staging;

    mutable std::atomic<uint64_t> n_read{ 0 };

    // what is known about the files' content: source.cpp
    bool sampled = false;
    bool checks_tensors = false;
    mutable std::mutex checked_mutex;
    std::set<std::pair<int, uint64_t>> checked;      // where they lie: tensors on their way to a device come and go
    int copy_file = -1;                              // the sidecar
    mutable std::atomic<bool> copy_failed{ false };  // it cannot be read any more
    mutable std::atomic<bool> copy_differs{ false }; // a block of it is not what it should be
    std::atomic<size_t> n_unproven{ 0 };
    std::function<void()> all_proven;

    const weight_held * find(const ggml_tensor * t) const {
        const auto it = index.find(t);
        return it == index.end() ? nullptr : &held[it->second];
    }
};

// Whether so many bytes of a tensor, as they are in the file, are numbers. Else the error names it.
bool weight_is_valid(const ggml_tensor * t, const void * data, size_t bytes, std::string * error);

} // namespace superllama
