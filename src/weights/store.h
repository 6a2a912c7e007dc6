// The memory of a model's host weights and the files that they come from.
//
// Every tensor has reserved address space, its home, where memory is committed when its block is read to stay and given
// back when it is dropped. Blocks that are streamed lie in a ring instead, and tensors point there while they are used;
// experts lie in frames, and their tensors have a table of addresses instead of data. File offset and address agree
// modulo the page size, so that O_DIRECT reads land where the kernels look. No policy here: the scheduler says what to
// read and to drop.
#pragma once

#include "ggml-backend.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace superllama {

static const int64_t group_rows = 32;              // are converted together: kernels interleave 16 at most
static const size_t piece_result_bytes = 1u << 20; // of a product with a part of a piece, before it is where it belongs

struct weight_source {
    int file; // index from add_file()
    uint64_t offset;
};

// Bytes of one tensor: all of it, or one expert's share.
struct weight_slice {
    ggml_tensor * tensor;
    size_t bytes; // in the file
    weight_source source;
    size_t memory_bytes; // as kernels want it: not the same where the buffer type converts
    size_t at = 0;       // from the beginning of the block
};

// Whole pages of a block and where their content lies.
struct weight_range {
    size_t at; // from the beginning of the block
    size_t bytes;
    int file; // -1: content is made from the slices by the buffer's own conversion (repacking)
    uint64_t offset;
};

// Where the converted content of a block lies on disk too.
struct weight_copy {
    int file = -1; // none
    uint64_t offset = 0;
    uint64_t checksum = 0;
};

// The unit of residency: neighbouring matrices of one layer, one expert of one layer, or a piece of a matrix too large
// to be there at once, so many rows of it.
struct weight_block {
    int32_t layer = -1;
    int32_t expert = -1;
    int64_t first_row = -1; // of a piece

    std::vector<weight_slice> slices;
    std::vector<weight_range> ranges;

    size_t bytes = 0; // of memory: of the ranges, or of an expert's frame

    uint8_t * home = nullptr; // of an expert: none
    uint8_t * addr = nullptr; // where it is, or is being read to: its home, the ring, a frame; null: nowhere

    weight_copy copy;
    bool verified = false; // what can be said about its content was looked at, and is good
};

struct weight_tensor {
    ggml_tensor * tensor;
    weight_source source;
    int32_t layer; // -1: none
};

// A piece of a block for one read job.
struct weight_part {
    uint32_t block;
    uint32_t index; // of the range, or of the slice where the block is converted
    size_t first;
    size_t bytes;
};

struct weight_held;

class weight_store {
  public:
    explicit weight_store(int n_readers);
    ~weight_store();

    // Opens the file behind fd once more, with O_DIRECT where the filesystem allows it. Throws.
    int add_file(int fd);

    // Takes over the tensors of ctx, if their buffer type is one of the CPU's: the plain one, or one that converts what
    // is set and does so in groups of rows, one after the other. Else returns null, and what is in host memory counts
    // as resident.
    // `source` finds a tensor's bytes, `by_row` says whether it is looked up by rows, as far as is known before a
    // graph, and `by_piece` the layer whose matrix it is, if it is multiplied with a piece at a time; -1: it is not.
    ggml_backend_buffer_t alloc(ggml_context * ctx, ggml_backend_buffer_type_t buft,
                                const std::function<weight_source(const ggml_tensor *)> & source,
                                const std::function<bool(const ggml_tensor *)> & by_row,
                                const std::function<int32_t(const ggml_tensor *)> & by_piece);

    bool owns(const ggml_context * ctx) const;

    const std::vector<weight_block> & blocks() const { return all_blocks; }

    // The block of a tensor (of one expert of it); -1 where it is always resident, or none of ours.
    int32_t n_experts(const ggml_tensor * t) const; // 0: not a tensor of experts
    int32_t block_of(const ggml_tensor * t, int32_t expert = 0) const;

    const std::vector<uint32_t> & pieces_of(const ggml_tensor * t) const; // by rows; empty: it has none
    // Where the tensor is for kernels: all its pieces at their homes, or rows of it.
    void point_to_pieces(const ggml_tensor * t, bool all);

    // Experts of which kernels asked for the matrix in this tensor since the last call. No kernel runs.
    void take_asked(const ggml_tensor * t, const std::function<void(int32_t expert)> & visit);

    const ggml_tensor * named(const std::string & name) const; // null: none of ours
    const ggml_tensor * named_in_pieces(const std::string & name) const;
    std::vector<weight_tensor> tensors() const; // all that we hold, token embeddings by row left out

    // Bytes that are resident whatever the budget.
    size_t resident_bytes() const { return n_resident; }
    size_t row_bytes_max() const { return n_row_max; } // of tensors that are looked up by rows, while few of them stay
    size_t row_bytes_now() const { return n_row_now; }
    size_t row_bytes_all() const { return n_row_all; }
    size_t row_bytes_more() const; // than row_bytes_max(): what is kept, or may be
    size_t staging_bytes() const;  // by way of which small pages are read, and blocks converted
    size_t bytes_on_disk() const;  // of the model's tensors that we hold

    // All of these fail with a message and may be called again. read_part() may run in any thread.
    bool load_resident(std::string * error); // what is not there yet
    std::vector<weight_part> parts(uint32_t block, size_t part_bytes) const;
    bool read_part(const weight_part & part, std::string * error) const;
    bool unchanged(std::string * error); // the files are as they were

    // Bytes as they are in the file. `staging` begins a page and has room for two more than `bytes` needs; null on
    // failure.
    const uint8_t * read(const weight_source & from, size_t bytes, uint8_t * staging, std::string * error) const;

    // Whether a resident tensor is one: false gives the memory of a larger one back, true charges it again for
    // load_resident(). Other tensors are left as they are.
    void hold_resident(const ggml_tensor * t, bool held);
    bool is_resident(const ggml_tensor * t) const; // one that is, and whose bytes are there
    bool is_plain(const ggml_tensor * t) const;    // in memory as in the file
    bool is_locked(const ggml_tensor * t) const;   // its experts lie in memory that a device reads well
    bool is_here(const ggml_tensor * t) const;     // ours, and on the host now
    // Of its first bytes in the file: so much memory do they take on the host.
    size_t memory_of_first(const ggml_tensor * t, size_t file_bytes) const;

    // All rows that are read stay, and their neighbours come along; or few do. Between graphs.
    void keep_rows(bool all);
    // Reads the rows of a by_row tensor that `ids` name. One thread at a time.
    bool is_by_row(const ggml_tensor * t) const;
    bool read_rows(const ggml_tensor * t, const int32_t * ids, size_t n, std::string * error);

    // Before a block is read: a place in the ring, a frame for an expert, or else its home.
    void place(uint32_t block, bool streamed);
    void publish(uint32_t expert, size_t slice); // its bytes are there, kernels that wait for them go on. Any thread
    int64_t waited_us() const;                   // of kernels, for experts
    void point(uint32_t block);                  // its tensors to where it is, for kernels. Not for experts
    const uint8_t * data(uint32_t block, size_t slice) const;             // where it is in memory
    uint8_t * place_of(uint32_t block, const weight_slice & slice) const; // the same, of one that has its memory
    size_t slice_of(uint32_t block, const ggml_tensor * t) const;
    void drop(uint32_t block); // its place or frame is free, the memory of its home goes back

    // A tensor of which only rows or pieces are there, and which is read as a whole: from now on it is resident, for
    // load_resident() to read. Nothing is in its pieces. Between two graphs only.
    bool is_partial(const ggml_tensor * t) const;
    void hold_whole(const ggml_tensor * t);

    // The ring of streamed blocks.
    size_t ring_page() const; // its size is a multiple of this
    void reserve_ring();      // once all tensors are here, so that nothing has to be reserved while they stream. Throws
    void limit_ring(size_t bytes);
    bool has_ring_room(size_t bytes) const; // in one piece; for 0 bytes: whether nothing lies beyond the limit
    void compact_ring(const std::function<void(uint32_t)> & moved); // while nobody reads or writes in it
    size_t ring_memory() const;
    bool in_ring(uint32_t block) const;

    // Before any is read: experts lie in host memory of this type, which a device reads well.
    void lock_experts(ggml_backend_buffer_type_t buft);
    // Memory of experts, spare frames included. Frames of one size cannot serve another.
    size_t expert_memory() const;
    bool has_frame(uint32_t block, size_t limit) const; // for an expert, with no more memory than this
    void trim_experts(size_t limit, const std::function<bool(uint32_t)> & may_move);

    // For the sidecar: where the content of a converted block lies too. `proven`: it was made from these very bytes of
    // the model. Else the block is converted once more when it is first needed, and compared; when all were,
    // `all_proven` is called, in any thread. `fd` is the sidecar, which is opened again. Throws.
    bool converts(uint32_t block) const;
    uint64_t checksum(uint32_t block) const; // of what is in memory
    void set_copies(int fd, const std::vector<weight_copy> & copies, bool proven, std::function<void()> all_proven);

    // After all parts of a block were read for the first time: are they what they should be? Where a copy is not, the
    // block is read again, from the model. Any thread.
    bool verify(uint32_t block, std::string * error);
    bool verified(uint32_t block) const; // there is nothing to look at, or it was

    // Every tensor is looked through for invalid numbers when it is first read.
    void check_tensors(bool on);
    bool check_tensor(const ggml_tensor * t, const weight_source & source, std::string * error) const; // reads it, once

    // What the files are: equal for copies of them; and which files, as they were written last.
    uint64_t fingerprint() const;
    uint64_t identity() const;

    uint64_t bytes_read() const;

  private:
    bool keeps_rows_of(const weight_held & h) const;
    void trim_rows(const ggml_tensor * t);
    void drop_rows(const weight_held & h);
    std::pair<uint8_t *, uint8_t *> pages_of_home(const weight_block & b) const;
    size_t lay_out(std::vector<weight_held> & mine, ggml_backend_buffer_type_t buft);
    bool joins_last_block(const weight_held & h, const weight_held * previous) const;
    void add_experts(weight_held & h);
    void take_over(const weight_held & h);
    void add_pieces(weight_held & h, ggml_backend_buffer_type_t buft);
    void lay_out_dense(weight_block & b);
    void lay_out_piece(weight_block & b);
    void lay_out_expert(weight_block & b);
    void count_slack();
    std::map<size_t, size_t> expert_sizes() const;
    size_t huge_bytes(const weight_block & block) const;
    void set_frame(uint32_t expert, uint8_t * frame); // null: none
    bool take_samples(std::string * error);
    void read_from(weight_block & block, bool copy);
    bool read_again(uint32_t block, std::string * error);

    struct impl;
    std::unique_ptr<impl> pimpl;

    std::vector<weight_block> all_blocks;

    std::atomic<size_t> n_resident{ 0 };
    size_t n_row_max = 0;
    size_t n_row_all = 0;
    std::atomic<size_t> n_row_now{ 0 };
    size_t n_dense = 0; // bytes of blocks that are no experts
};

} // namespace superllama
