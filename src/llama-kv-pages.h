// The pages of a KV cache: which are in memory and which in the spill file, within a byte budget.
// A page is `page_cells` neighbouring cells of one stream, over all layers' K and V; a slice is one layer of it.
// Knows addresses, not models. One thread at a time, except where noted.
#pragma once

#include "llama-kv-spill.h"

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

class llama_prefetcher;

// The cells of K or of V of one layer, all streams in order.
struct llama_kv_rows {
    uint8_t * base;
    size_t row_bytes; // of one cell
};

struct llama_kv_geometry {
    std::vector<std::vector<llama_kv_rows>> layers; // [layer][K, V]

    uint32_t n_streams;
    uint32_t n_cells; // of one stream
    uint32_t page_cells;
};

struct llama_kv_counters {
    std::atomic<int64_t> pages_cpu{ 0 };
    std::atomic<int64_t> pages_disk{ 0 };
    std::atomic<int64_t> resident_bytes{ 0 };
    std::atomic<int64_t> resident_peak_bytes{ 0 };
    std::atomic<int64_t> evicted_clean{ 0 };
    std::atomic<int64_t> evicted_dirty{ 0 };
    std::atomic<int64_t> dropped{ 0 };
    std::atomic<int64_t> restored{ 0 };
    std::atomic<int64_t> prefetched{ 0 };
    std::atomic<int64_t> prefetched_used{ 0 };
    std::atomic<int64_t> prefetched_wasted{ 0 };
    std::atomic<int64_t> bytes_read{ 0 };
    std::atomic<int64_t> bytes_written{ 0 };
    std::atomic<int64_t> stall_us{ 0 };
};

class llama_kv_pages {
  public:
    using page_id = uint32_t; // stream * pages_per_stream + page of the stream

    struct usage {
        bool live;         // a sequence has a cell in it
        int64_t last_used; // the smaller, the earlier it is evicted
    };
    using inspect_fn = std::function<usage(page_id)>;

    // `pool` may be null: then nothing is read ahead. `inspect` is asked when a page may be evicted.
    llama_kv_pages(llama_kv_geometry geometry, uint64_t budget_bytes, std::unique_ptr<llama_kv_spill> spill,
                   llama_prefetcher * pool, inspect_fn inspect);
    ~llama_kv_pages(); // waits for reads under way

    static size_t record_bytes(const llama_kv_geometry & geometry);
    static size_t bounce_bytes(const llama_kv_geometry & geometry); // of one thread that reads or writes

    uint32_t n_layers() const { return (uint32_t) geometry.layers.size(); }
    uint32_t n_pages() const { return (uint32_t) pages.size(); }
    uint32_t pages_per_stream() const { return n_per_stream; }
    page_id page_of(uint32_t stream, uint32_t cell) const { return stream * n_per_stream + cell / geometry.page_cells; }
    uint32_t stream_of(page_id p) const { return p / n_per_stream; }
    uint32_t first_cell(page_id p) const { return p % n_per_stream * geometry.page_cells; } // in its stream
    uint32_t n_cells_of(page_id p) const;

    // memory that a page or a slice may hold: whole pages of the system where slices share them
    uint64_t page_charge() const { return sum_charge; }
    uint64_t layer_charge(uint32_t layer) const { return charges[layer]; }
    uint64_t layer_charge_max() const;
    uint64_t budget_bytes() const { return budget; }

    bool is_empty(page_id p) const { return pages[p].n_resident == 0 && pages[p].n_disk == 0; }
    bool on_disk(page_id p) const { return pages[p].n_disk > 0; } // at least one slice
    bool in_memory(page_id p) const { return pages[p].n_resident == n_layers(); }
    uint32_t n_resident(page_id p) const { return pages[p].n_resident; }
    bool needs_restore(page_id p) const { return pages[p].n_disk > 0 || pages[p].n_loading > 0 || pages[p].ahead; }

    // Pinned pages are not evicted to make room.
    void pin(page_id p) { pages[p].pinned = pin_epoch; }
    void unpin_all() { pin_epoch++; }

    // All false with a text on failure; then nothing is lost, and the budget still holds. A list names a page
    // once; one that is larger than the budget fails.
    // restore: slices on disk come back. write: they also get memory where they had none, and lose their
    // copy on disk, for the caller is about to write into them.
    bool restore(const std::vector<page_id> & list, std::string * error);
    bool restore_layer(const std::vector<page_id> & list, uint32_t layer, std::string * error);
    bool write(page_id p, std::string * error);
    bool write_layer(page_id p, uint32_t layer, std::string * error);
    bool evict(page_id p, std::string * error);
    bool evict_layer(const std::vector<page_id> & list, uint32_t layer, std::string * error);
    bool make_room(uint64_t bytes, std::string * error);
    bool copy(page_id src, page_id dst, std::string * error); // after a failure dst holds rubbish

    void drop(page_id p); // its content is not needed any more
    void clear();
    void scrub(page_id p); // memory behind slices that are not resident, after a graph that was cut short

    // Starts reading, as much as fits without evicting pinned pages; layer -1 is all. Returns the number of pages.
    int prefetch(const std::vector<page_id> & list, int layer, bool count_use);

    // Bytes of tensors, wherever they are now; `at` is an address in the rows. Beyond the rows: false.
    bool read_bytes(const uint8_t * at, size_t size, void * out, std::string * error);
    bool write_bytes(uint8_t * at, size_t size, const void * in, int value, std::string * error); // in null: memset

    // Each range of memory that belongs to a slice which is on disk only.
    void for_each_evicted(const std::function<void(uint8_t * at, size_t size)> & visit) const;

    llama_kv_spill & spill_file() { return *spill; }
    const llama_kv_counters & count() const { return counters; } // from any thread

  private:
    enum flag : uint8_t { RESIDENT = 1, SAVED = 2, LOADING = 4 };

    struct page {
        uint64_t pinned = 0;
        int64_t record = -1;
        uint32_t n_resident = 0; // slices
        uint32_t n_disk = 0;     // slices that are on disk only
        uint32_t n_loading = 0;
        bool ahead = false; // prefetched, not used yet
    };
    struct slice {
        page_id p;
        uint32_t first, last; // layers, both included
        int64_t record;
    };
    struct read_job;
    struct pin_guard;

    const uint8_t & flags(page_id p, uint32_t layer) const { return states[(size_t) p * n_layers() + layer]; }
    void set_flags(page_id p, uint32_t layer, uint8_t value);
    void span_of(page_id p, uint32_t layer, size_t span, uint8_t ** at, size_t * size) const;
    void release(page_id p, uint32_t layer);
    void copy_record(page_id p, size_t begin, size_t end, uint8_t * buffer, bool to_memory) const;
    bool read_slice(const slice & s, std::string * error) const;
    bool write_slices(page_id p, uint32_t first, uint32_t last, std::string * error);
    bool save(page_id p, uint32_t first, uint32_t last, std::string * error);
    void free_record(page_id p);

    std::vector<slice> on_disk_slices(page_id p, uint32_t first, uint32_t last) const;
    std::shared_ptr<read_job> start(std::vector<slice> slices);
    bool finish(const std::shared_ptr<read_job> & job, std::string * error);
    bool wait_for(page_id p, std::string * error);
    bool load(const std::vector<slice> & slices, std::string * error);
    bool find(const uint8_t * at, uint32_t * layer, size_t * span, size_t * row) const;

    llama_kv_geometry geometry;
    uint64_t budget;
    std::unique_ptr<llama_kv_spill> spill;
    llama_prefetcher * pool;
    inspect_fn inspect;

    size_t os_page;
    uint32_t n_per_stream;
    std::vector<uint64_t> charges;   // [layer]
    std::vector<size_t> layer_begin; // in a record, n_layers() + 1 of them
    std::vector<std::pair<const uint8_t *, std::pair<uint32_t, size_t>>> by_address;
    uint64_t sum_charge = 0;
    uint64_t resident = 0;
    uint64_t pin_epoch = 1;

    std::vector<page> pages;
    std::vector<uint8_t> states; // [page][layer]
    std::vector<std::shared_ptr<read_job>> jobs;
    mutable llama_kv_counters counters;
};
