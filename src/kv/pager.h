// The pager of a llama_kv_cache: says which pages a ubatch needs, and where the data of an operation is.
// Addresses, cells and kernels stay as they are without it, so results are the same, bit for bit.
#pragma once

#include "llama-kv-cache.h"
#include "io/address_space.h"
#include "kv/layer_run.h"
#include "kv/pages.h"

#include "ggml-cpp.h"

#include <functional>
#include <unordered_map>

struct ggml_backend_buffer_i;
struct superllama_kv_pages;
struct superllama_kv_seq_pages;

namespace superllama {

class readers;
class kv_pager;

// What a context offers to the cache that is created for it, and gets back.
struct kv_paging {
    superllama_context_params params; // without paged_kv: memory comes on first use, and all pages may have it
    bool host_only = true;            // no device computes: graphs may be cut between layers
    std::shared_ptr<readers> pool;
    std::function<void()> may_move; // the cache's layers may go to devices from now on, if they are offloaded at all

    // Of the cache that took the offer. Each of the two may go first: a context that cannot be made loses its cache
    // before this, one that is freed keeps it longer.
    kv_pager * pager = nullptr;
    ~kv_paging();
    std::string reason; // why a cache, or a part of it, did not

    // The offer that caches created in this thread see; null = none.
    static kv_paging *& current();
};

class kv_pager {
  public:
    // Null where the cache is not eligible or nothing was offered. Throws std::runtime_error for the user.
    static std::shared_ptr<kv_pager> create(llama_kv_cache & kv, bool offload,
                                            const llama_kv_cache::layer_filter_cb & filter);

    kv_pager(llama_kv_cache & kv, bool offload, kv_paging & offer);
    ~kv_pager();

    ggml_backend_buffer_type_t buffer_type() { return buft.get(); }
    void attach(); // the cache's tensors have their addresses; throws where the budget cannot work

    // False: the call in hand has to fail; superllama_last_error() says why.
    bool prepare(const llama_kv_cache::slot_info & sinfo, const llama_ubatch & ubatch, uint32_t n_kv);
    size_t copy_streams(const llama_kv_cache::stream_copy_info & info); // returns what is left to copy: 0
    bool shift(llama_context * lctx);
    void before_state_write(llama_seq_id seq); // throws
    void before_state_read(llama_seq_id seq);
    void after_state_read();
    bool take_failure(); // of reads and writes of tensors since the last call

    // Layer by layer: a ubatch whose pages are larger than the budget.
    bool is_streaming() const { return streaming != nullptr; }
    bool plan(ggml_cgraph * gf); // false: finish() says why
    bool is_cut(const ggml_tensor * node) const { return streaming->is_cut(node); }
    bool advance() { return streaming->advance(); }
    bool finish(); // after the graph; false = its results are worthless

    // Where the cells of a layer are, by its number in the model: on a device as a whole, or in pages. For who moves
    // layers, in any thread, while nobody uses the cache.
    bool has_layer(int il) const { return index_of.count(il) > 0; }
    size_t device_bytes(int il) const;                         // that it has, or would have
    bool is_at(int il, ggml_backend_buffer_type_t buft) const; // pages: the CPU's
    // False: no memory there, or its pages could not be read or written; then it is where it was.
    bool move(int il, ggml_backend_buffer_type_t to, uint64_t * copied);

    // On devices there is memory for the cells in use, and some more. To be called before `n` are added: true where
    // that is too little now, or far too much, and layers are not where they have to be until they were moved there
    // again.
    bool expect_cells(uint64_t n);
    bool expect_state(uint64_t bytes) { return expect_cells(bytes / bytes_of_cell); } // that is going to be read
    size_t spare_bytes() const;    // of a device, while one layer moves to more memory there
    void show_all_cells(bool all); // to graphs that are not computed: their largest ones refer to all of them

    int prefetch(llama_seq_id seq);
    void count_seq(llama_seq_id seq, struct superllama_kv_seq_pages & out) const;
    void count(struct superllama_kv_pages & out) const;
    page_table * get_pages() { return pages.get(); }

    static bool is_paged(const ggml_tensor * tensor); // its data may be on disk

  private:
    static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size);
    static const struct ggml_backend_buffer_i & buffer_iface();

    std::vector<ggml_tensor *> rows_of(uint32_t layer) const; // K, and V if there is one
    bool send(uint32_t layer, ggml_backend_buffer_type_t to, uint64_t * copied, std::string * error);
    bool fetch(uint32_t layer, uint64_t * copied, std::string * error);
    bool resize(uint32_t layer);
    ggml_backend_buffer_ptr alloc_rows(uint32_t layer, ggml_backend_buffer_type_t buft, std::vector<ggml_tensor> & rows,
                                       uint32_t n_cells) const;
    std::vector<ggml_tensor> rows_on_device(uint32_t layer) const;
    void place_rows(uint32_t layer, const std::vector<ggml_tensor> & rows, ggml_backend_buffer_ptr buffer,
                    uint32_t n_cells);
    void shape_rows(uint32_t layer);

    page_table::usage inspect(page_table::page_id p) const;
    bool has_cells(page_table::page_id p, const llama_ubatch * of) const; // of these sequences, or any
    std::unique_ptr<page_table> spilled_pages(const kv_geometry & g);
    void sweep(uint32_t stream);
    void end_streaming() { streaming.reset(); }
    bool fail(const std::string & text);
    template <typename F>
    bool reach(const F & bytes); // false: what failed is the last error

    friend struct kv_paging;
    kv_paging * offer; // null: it is gone

    llama_kv_cache & kv;
    superllama_context_params params;
    bool host_only;
    bool offload; // the cache is to follow its layers
    std::shared_ptr<readers> pool;

    std::unique_ptr<ggml_backend_buffer_type> buft;
    std::unique_ptr<address_range> range; // of the buffer

    std::unique_ptr<page_table> pages;
    std::unordered_map<const ggml_tensor *, uint32_t> layer_of; // K and V tensors
    std::unordered_map<int, uint32_t> index_of;                 // of a layer of the model
    std::vector<ggml_backend_buffer_ptr> on_device;             // [layer], null: in pages
    std::vector<uint32_t> cells_on_device;                      // [layer], of one stream
    uint32_t device_cells = 0;                                  // that a layer is to have there
    uint64_t bytes_of_cell = 0;                                 // over all layers
    uint64_t bytes_of_cell_max = 0;                             // of one layer
    bool shows_all = false;
    ggml_backend_buffer_t in_pages = nullptr; // the buffer of all others
    bool moving = false;                      // by a thread that may not look at cells

    int64_t tick = 0;
    std::vector<int64_t> seq_used;     // tick of each sequence's last ubatch
    std::vector<int64_t> page_used;    // of each page, where something else than a ubatch used it
    std::vector<uint32_t> n_used;      // cells of each stream, as last seen
    std::vector<std::string> broken;   // streams whose data is lost, and why
    std::vector<uint32_t> copy_source; // streams that copies under way read
    bool failed = false;
    std::atomic<int64_t> n_streamed{ 0 };

    std::unique_ptr<kv_layer_run> streaming;
};

} // namespace superllama
