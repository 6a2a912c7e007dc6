// The pages of a KV cache: which are in memory and which in the spill file, within a byte budget.
// Knows addresses, not models. One thread at a time, except where noted.
#pragma once

#include "kv/layout.h"
#include "kv/spill.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace superllama {

class readers;

struct kv_counters {
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

class page_table : public kv_layout {
  public:
    struct usage {
        bool live;         // a sequence has a cell in it
        int64_t last_used; // the smaller, the earlier it is evicted
    };
    using inspect_fn = std::function<usage(page_id)>;

    // `pool` may be null: then nothing is read ahead; `spill` too where the budget holds all pages. `inspect` is asked
    // when a page may be evicted.
    page_table(kv_layout layout, uint64_t budget_bytes, std::unique_ptr<kv_spill> spill, readers * pool,
               inspect_fn inspect);
    ~page_table(); // waits for reads under way

    uint64_t budget_bytes() const { return budget; }
    // Called with the bytes that are going to be in memory, before they are.
    void before_growth(std::function<void(uint64_t)> fn) { growth = std::move(fn); }

    bool is_empty(page_id p) const { return pages[p].n_resident == 0 && pages[p].n_disk == 0 && !pages[p].elsewhere; }
    bool on_disk(page_id p) const { return pages[p].n_disk > 0; } // at least one slice
    bool in_memory(page_id p) const { return pages[p].n_resident == n_here(); }
    uint32_t n_resident(page_id p) const { return pages[p].n_resident; }
    uint64_t resident_bytes(page_id p) const;
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

    // A layer leaves for a device, or comes back: `copy` takes or fills `n` bytes of K or V at `offset`, for each page
    // that is not empty. After a failure it is where it was.
    using take_fn = std::function<void(size_t i, size_t offset, const uint8_t * data, size_t n)>;
    using fill_fn = std::function<void(size_t i, size_t offset, uint8_t * data, size_t n)>;
    bool send_layer(uint32_t layer, const take_fn & copy, std::string * error);
    bool fetch_layer(uint32_t layer, const fill_fn & copy, std::string * error);
    void written_elsewhere(page_id p) { pages[p].elsewhere = n_here() < n_layers(); } // past the pages

    // Starts reading, as much as fits without evicting pinned pages; layer -1 is all. Returns the number of pages.
    int prefetch(const std::vector<page_id> & list, int layer, bool count_use);

    // Bytes of tensors, wherever they are now; `at` is an address in the rows. Beyond the rows: false.
    bool read_bytes(const uint8_t * at, size_t size, void * out, std::string * error);
    bool write_bytes(uint8_t * at, size_t size, const void * in, int value, std::string * error); // in null: memset

    // Each range of memory that belongs to a slice which is on disk only.
    void for_each_evicted(const std::function<void(uint8_t * at, size_t size)> & visit) const;

    kv_spill & spill_file() { return *spill; }
    const kv_counters & count() const { return counters; } // from any thread

  private:
    enum flag : uint8_t { RESIDENT = 1, SAVED = 2, LOADING = 4 };

    struct page {
        uint64_t pinned = 0;
        int64_t record = -1;
        uint32_t n_resident = 0; // slices
        uint32_t n_disk = 0;     // slices that are on disk only
        uint32_t n_loading = 0;
        bool ahead = false;     // prefetched, not used yet
        bool elsewhere = false; // it may have content in layers that are away
    };
    struct slice {
        page_id p;
        uint32_t first, last; // layers, both included
        int64_t record;
    };
    struct read_job;
    struct pin_guard;

    // Counts the time that the context's thread spends here.
    struct stall_timer {
        std::atomic<int64_t> & us;
        std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();

        explicit stall_timer(std::atomic<int64_t> & us) : us(us) {}
        ~stall_timer() {
            const auto spent = std::chrono::steady_clock::now() - begin;
            us += std::chrono::duration_cast<std::chrono::microseconds>(spent).count();
        }
    };

    const uint8_t & flags(page_id p, uint32_t layer) const { return states[(size_t) p * n_layers() + layer]; }
    void set_flags(page_id p, uint32_t layer, uint8_t value);
    void release(page_id p, uint32_t layer);
    bool read_slice(const slice & s, std::string * error) const;
    bool write_slices(page_id p, uint32_t first, uint32_t last, std::string * error);
    bool save(page_id p, uint32_t first, uint32_t last, std::string * error);
    void free_record(page_id p);
    void empty_layer(uint32_t layer, bool goes);
    bool evict_some(uint64_t bytes, std::string * error);

    std::vector<slice> on_disk_slices(page_id p, uint32_t first, uint32_t last) const;
    std::shared_ptr<read_job> start(std::vector<slice> slices);
    bool finish(const std::shared_ptr<read_job> & job, std::string * error);
    bool wait_for(page_id p, std::string * error);
    bool load(const std::vector<slice> & slices, std::string * error);
    bool read_record(int64_t record, size_t offset, size_t size, uint8_t * out, std::string * error);

    uint64_t budget;
    std::unique_ptr<kv_spill> spill;
    readers * pool;
    inspect_fn inspect;
    std::function<void(uint64_t)> growth;

    uint64_t resident = 0;
    uint64_t pin_epoch = 1;

    std::vector<page> pages;
    std::vector<uint8_t> states; // [page][layer]
    std::vector<std::shared_ptr<read_job>> jobs;
    mutable kv_counters counters;
};

} // namespace superllama
