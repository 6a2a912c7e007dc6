// Pages against a plain array: random writes, reads, evictions, copies and faults, with and without readers ahead.

#include "check.h"
#include "io/address_space.h"
#include "kv/pages.h"
#include "io/readers.h"

#include <cerrno>
#include <cstring>
#include <map>
#include <new>
#include <random>

using namespace superllama;

// The buffers for reading and writing come from here.
static std::atomic<bool> no_memory{ false };

void * operator new[](size_t size, const std::nothrow_t &) noexcept {
    return no_memory ? nullptr : ::operator new[](size);
}

struct faulty : file_calls {
    std::atomic<int> write_errno{ 0 };
    std::atomic<int> read_errno{ 0 };

    int64_t read(int fd, void * data, size_t size, int64_t offset) override {
        if (read_errno != 0) {
            errno = read_errno;
            return -1;
        }
        return file_calls::read(fd, data, size, offset);
    }
    int64_t write(int fd, const void * data, size_t size, int64_t offset) override {
        if (write_errno != 0) {
            errno = write_errno;
            return -1;
        }
        return file_calls::write(fd, data, size, offset);
    }
};

struct cache {
    kv_geometry g;
    std::vector<std::pair<uint8_t *, size_t>> memory;
    faulty sys;
    std::unique_ptr<readers> pool;
    std::unique_ptr<page_table> pages;
    std::vector<page_table::usage> use;
    int64_t tick = 0;

    cache(size_t row_bytes, uint32_t page_cells, double budget_pages, bool ahead, bool spills = true) {
        g.n_streams = 3;
        g.n_cells = 100; // the last page of a stream is a part
        g.page_cells = page_cells;
        for (int il = 0; il < 4; ++il) {
            std::vector<kv_rows> rows;
            for (int i = 0; i < (il == 2 ? 1 : 2); ++i) {
                const size_t size = (g.n_streams * g.n_cells * row_bytes / 4096 + 1) * 4096;
                memory.push_back({ address_reserve(size), size });
                CHECK(memory.back().first != nullptr);
                address_commit(memory.back().first, size, page_kind::small);
                rows.push_back({ memory.back().first, row_bytes });
            }
            g.layers.push_back(rows);
        }
        std::string why;
        pool = ahead ? readers::create(2, &why) : nullptr;
        const auto make = [&](uint64_t budget) {
            const size_t record = kv_layout(g).record_bytes();
            auto spill = spills ? std::make_unique<kv_spill>("", record, &sys) : nullptr;
            return std::make_unique<page_table>(g, budget, std::move(spill), pool.get(),
                                                [this](page_table::page_id p) { return use[p]; });
        };
        pages = make(0);
        pages = make((uint64_t) (budget_pages * (double) pages->page_charge()));
        use.resize(pages->n_pages(), { true, 0 });
    }
    ~cache() {
        pages.reset();
        for (const auto & m : memory) {
            address_release(m.first, m.second);
        }
    }

    void used(page_table::page_id p) {
        use[p].live = true;
        use[p].last_used = ++tick;
    }
};

static void test_random(size_t row_bytes, uint32_t page_cells, bool ahead, unsigned seed) {
    cache c(row_bytes, page_cells, 5, ahead);
    page_table & pages = *c.pages;
    std::mt19937 rng(seed);
    std::string error;
    // what every byte should be
    const size_t tensor_bytes = c.g.n_streams * c.g.n_cells * row_bytes;
    std::map<const uint8_t *, std::vector<uint8_t>> want;
    for (const auto & layer : c.g.layers) {
        for (const auto & rows : layer) {
            want[rows.base].resize(tensor_bytes);
        }
    }
    const auto check_page = [&](page_table::page_id p) { // through memory, as a kernel reads
        const size_t begin = ((size_t) pages.stream_of(p) * c.g.n_cells + pages.first_cell(p)) * row_bytes;
        const size_t size = pages.n_cells_of(p) * row_bytes;
        for (const auto & entry : want) {
            CHECK(memcmp(entry.first + begin, entry.second.data() + begin, size) == 0);
        }
    };
    for (int step = 0; step < 1500; ++step) {
        const page_table::page_id p = rng() % pages.n_pages(), q = rng() % pages.n_pages();
        pages.unpin_all();
        switch (rng() % 10) {
            case 0:
            case 1:
            case 2: { // a ubatch
                pages.pin(p);
                c.used(p);
                CHECK(pages.restore({ p }, &error));
                check_page(p);
                CHECK(pages.write(p, &error));
                const size_t cell =
                    (size_t) pages.stream_of(p) * c.g.n_cells + pages.first_cell(p) + rng() % pages.n_cells_of(p);
                for (auto & entry : want) {
                    const int value = (int) (rng() % 255);
                    memset(entry.second.data() + cell * row_bytes, value, row_bytes);
                    memset(const_cast<uint8_t *>(entry.first) + cell * row_bytes, value, row_bytes);
                }
                break;
            }
            case 3: // several pages at once
                pages.pin(p);
                pages.pin(q);
                c.used(p);
                c.used(q);
                if (p != q) {
                    CHECK(pages.restore({ p, q }, &error));
                    check_page(p);
                    check_page(q);
                }
                break;
            case 4:
                CHECK(pages.prefetch({ p, q }, -1, true) >= 0);
                break;
            case 5:
                CHECK(pages.evict(p, &error));
                break;
            case 6: { // state save and load
                const auto & rows = c.g.layers[rng() % 4][0];
                const size_t begin = rng() % tensor_bytes,
                             size = 1 + rng() % std::min<size_t>(tensor_bytes - begin, 5000);
                std::vector<uint8_t> out(size);
                CHECK(pages.read_bytes(rows.base + begin, size, out.data(), &error));
                CHECK(memcmp(out.data(), want[rows.base].data() + begin, size) == 0);
                for (auto & byte : out) {
                    byte = (uint8_t) rng();
                }
                CHECK(pages.write_bytes(rows.base + begin, size, out.data(), 0, &error));
                memcpy(want[rows.base].data() + begin, out.data(), size);
                break;
            }
            case 7:
                if (pages.n_cells_of(p) == pages.n_cells_of(q) && p != q) {
                    CHECK(pages.copy(p, q, &error));
                    const size_t from = ((size_t) pages.stream_of(p) * c.g.n_cells + pages.first_cell(p)) * row_bytes;
                    const size_t to = ((size_t) pages.stream_of(q) * c.g.n_cells + pages.first_cell(q)) * row_bytes;
                    for (auto & entry : want) {
                        memcpy(entry.second.data() + to, entry.second.data() + from, pages.n_cells_of(p) * row_bytes);
                    }
                }
                break;
            case 8: // layer by layer, more pages than fit
                for (uint32_t il = 0; il < pages.n_layers(); ++il) {
                    std::vector<page_table::page_id> all;
                    for (page_table::page_id i = 0; i < 8 && i < pages.n_pages(); ++i) {
                        all.push_back(i);
                        if (il == 0) {
                            CHECK(pages.evict(i, &error));
                        }
                        pages.pin(i);
                    }
                    CHECK(pages.restore_layer(all, il, &error));
                    pages.prefetch(all, (int) ((il + 1) % pages.n_layers()), false);
                    for (page_table::page_id i : all) {
                        const size_t begin =
                            ((size_t) pages.stream_of(i) * c.g.n_cells + pages.first_cell(i)) * row_bytes;
                        for (const auto & rows : c.g.layers[il]) {
                            CHECK(memcmp(rows.base + begin, want[rows.base].data() + begin,
                                         pages.n_cells_of(i) * row_bytes) == 0);
                        }
                    }
                    CHECK(pages.evict_layer(all, il, &error));
                }
                break;
            default:
                if (rng() % 8 == 0) { // nobody uses it any more
                    c.use[p].live = false;
                    CHECK(pages.evict(p, &error));
                    c.use[p].live = true;
                    if (pages.is_empty(p)) {
                        const size_t begin =
                            ((size_t) pages.stream_of(p) * c.g.n_cells + pages.first_cell(p)) * row_bytes;
                        for (auto & entry : want) {
                            memset(entry.second.data() + begin, 0, pages.n_cells_of(p) * row_bytes);
                        }
                    }
                }
                break;
        }
        const kv_counters & count = pages.count();
        CHECK((uint64_t) count.resident_peak_bytes <= pages.budget_bytes());
    }
    CHECK(pages.count().evicted_dirty > 0 && pages.count().restored > 0);
}

static void test_order() {
    cache c(64, 64, 3, false);
    std::string error;
    for (page_table::page_id p = 0; p < 3; ++p) {
        c.used(p);
        CHECK(c.pages->write(p, &error));
    }
    c.used(0); // now 1 was used longest ago
    CHECK(c.pages->write(3, &error));
    CHECK(c.pages->in_memory(0) && !c.pages->in_memory(1) && c.pages->in_memory(2));
    c.use[0].live = false; // a page without use goes first, and without a write
    const int64_t written = c.pages->count().bytes_written;
    CHECK(c.pages->write(4, &error));
    CHECK(c.pages->is_empty(0) && c.pages->count().bytes_written == written && c.pages->count().dropped == 1);
    // clean pages are not written again
    CHECK(c.pages->restore({ 1 }, &error));
    const int64_t before = c.pages->count().bytes_written;
    CHECK(c.pages->evict(1, &error));
    CHECK(c.pages->count().bytes_written == before && c.pages->count().evicted_clean == 1);
    // more than the budget at once: refused with the numbers, nothing lost
    for (page_table::page_id p = 0; p < c.pages->n_pages(); ++p) {
        c.pages->pin(p);
    }
    CHECK(c.pages->write(5, &error)); // two were in memory
    CHECK(!c.pages->write(0, &error));
    CHECK(error.find("--kv-budget") != std::string::npos);
}

static void test_faults(bool ahead) {
    cache c(64, 64, 2, ahead);
    std::string error;
    for (page_table::page_id p = 0; p < 2; ++p) {
        c.used(p);
        CHECK(c.pages->write(p, &error));
        memset(c.g.layers[0][0].base + p * 64 * 64, 7 + (int) p, 64);
    }
    c.sys.write_errno = ENOSPC; // nothing can leave: the new page is refused, the old ones stay as they are
    CHECK(!c.pages->write(2, &error));
    CHECK(error.find(strerror(ENOSPC)) != std::string::npos);
    CHECK(c.pages->in_memory(0) && c.pages->in_memory(1) && c.g.layers[0][0].base[0] == 7);
    c.sys.write_errno = 0;
    CHECK(c.pages->write(2, &error));
    CHECK(c.pages->on_disk(0));

    c.sys.read_errno = EIO; // page 0 cannot come; it can once the disk is well
    CHECK(!c.pages->restore({ 0 }, &error));
    CHECK(error.find(strerror(EIO)) != std::string::npos);
    CHECK(c.pages->on_disk(0));
    c.pages->prefetch({ 0 }, -1, true);
    char byte = 0;
    CHECK(!c.pages->read_bytes(c.g.layers[0][0].base, 1, &byte, &error));
    c.sys.read_errno = 0;
    CHECK(c.pages->restore({ 0 }, &error));
    CHECK(c.g.layers[0][0].base[0] == 7);

    CHECK(c.pages->write(0, &error) && c.pages->evict(1, &error));
    no_memory = true; // neither way; all stays where it is
    CHECK(!c.pages->restore({ 1 }, &error) && c.pages->on_disk(1));
    CHECK(error.find("no memory for a buffer") != std::string::npos);
    const uint8_t * in_page_1 = c.g.layers[0][0].base + 64 * 64;
    CHECK(!c.pages->read_bytes(in_page_1, 1, &byte, &error));
    CHECK(!c.pages->evict(0, &error) && c.pages->in_memory(0));
    no_memory = false;
    CHECK(c.pages->read_bytes(in_page_1, 1, &byte, &error) && byte == 8);
}

// Layers go to a device and come back, while pages are written and evicted; one that cannot stays where it is.
static void test_layers_away(bool ahead, unsigned seed) {
    const size_t row_bytes = 204;
    cache c(row_bytes, 16, 5, ahead);
    page_table & pages = *c.pages;
    std::mt19937 rng(seed);
    std::string error;
    std::vector<std::vector<std::vector<uint8_t>>> want, there; // [layer][K, V], of all bytes
    for (const auto & layer : c.g.layers) {
        want.emplace_back(layer.size(), std::vector<uint8_t>(c.g.n_streams * c.g.n_cells * row_bytes));
    }
    there = want;
    const auto at = [&](uint32_t il, size_t i) {
        return pages.is_away(il) ? there[il][i].data() : c.g.layers[il][i].base;
    };
    const auto move = [&](uint32_t il) {
        if (!pages.is_away(il)) {
            return pages.send_layer(
                il,
                [&](size_t i, size_t offset, const uint8_t * data, size_t n) {
                    memcpy(there[il][i].data() + offset, data, n);
                },
                &error);
        }
        return pages.fetch_layer(
            il,
            [&](size_t i, size_t offset, uint8_t * data, size_t n) { memcpy(data, there[il][i].data() + offset, n); },
            &error);
    };
    int n_failed = 0;
    for (int step = 0; step < 1500; ++step) {
        const page_table::page_id p = rng() % pages.n_pages();
        const auto il = (uint32_t) (rng() % pages.n_layers());
        const size_t begin = ((size_t) pages.stream_of(p) * c.g.n_cells + pages.first_cell(p)) * row_bytes;
        const size_t size = pages.n_cells_of(p) * row_bytes;
        pages.unpin_all();
        switch (rng() % 8) {
            case 0:
                CHECK(move(il));
                break;
            case 1: {
                const bool was_away = pages.is_away(il);
                c.sys.read_errno = EIO;
                c.sys.write_errno = ENOSPC;
                const bool moved = move(il);
                c.sys.read_errno = 0;
                c.sys.write_errno = 0;
                CHECK(pages.is_away(il) == (moved != was_away));
                n_failed += !moved;
                break;
            }
            case 2:
                CHECK(pages.evict(p, &error));
                break;
            case 3:
                pages.drop(p);
                for (uint32_t l = 0; l < pages.n_layers(); ++l) {
                    for (size_t i = 0; i < want[l].size(); ++i) { // what was on a device means nothing any more
                        memset(want[l][i].data() + begin, 0, size);
                        memset(there[l][i].data() + begin, 0, size);
                    }
                }
                break;
            default:
                pages.pin(p);
                c.used(p);
                CHECK(pages.restore({ p }, &error));
                for (uint32_t l = 0; l < pages.n_layers(); ++l) {
                    for (size_t i = 0; i < want[l].size(); ++i) {
                        CHECK(memcmp(at(l, i) + begin, want[l][i].data() + begin, size) == 0);
                    }
                }
                CHECK(pages.write(p, &error));
                for (uint32_t l = 0; l < pages.n_layers(); ++l) {
                    for (size_t i = 0; i < want[l].size(); ++i) {
                        const int value = (int) (rng() % 255);
                        memset(want[l][i].data() + begin, value, row_bytes);
                        memset(at(l, i) + begin, value, row_bytes);
                    }
                }
                break;
        }
        CHECK((uint64_t) pages.count().resident_peak_bytes <= pages.budget_bytes());
        uint64_t charged = 0;
        for (uint32_t l = 0; l < pages.n_layers(); ++l) {
            charged += pages.layer_charge(l);
            CHECK(!pages.is_away(l) || pages.layer_charge(l) == 0);
        }
        CHECK(charged == pages.page_charge() && charged <= pages.page_charge_max());
    }
    CHECK(n_failed > 0 && pages.count().evicted_dirty > 0);
}

// Pages that only come on first use, and go when they are empty: without a spill file.
static void test_without_spill() {
    cache c(204, 16, 21, false, false);
    page_table & pages = *c.pages;
    CHECK(pages.budget_bytes() == pages.n_pages() * pages.page_charge());
    uint64_t grown = 0;
    pages.before_growth([&grown](uint64_t bytes) { grown = bytes; });
    const auto first_byte = [&c, &pages](page_table::page_id p) -> uint8_t & {
        return c.g.layers[0][0].base[((size_t) pages.stream_of(p) * c.g.n_cells + pages.first_cell(p)) * 204];
    };
    std::string error;
    for (page_table::page_id p = 0; p < pages.n_pages(); ++p) {
        CHECK(pages.write(p, &error));
        CHECK(grown == (p + 1) * pages.page_charge());
        first_byte(p) = (uint8_t) (p + 1);
        c.used(p);
    }
    pages.drop(3);
    CHECK(pages.is_empty(3) && first_byte(3) == 0 && first_byte(2) == 3 && first_byte(4) == 5);
    CHECK(pages.copy(4, 3, &error) && first_byte(3) == 5); // full again, and nothing had to leave
    CHECK((uint64_t) pages.count().resident_bytes == pages.budget_bytes() && pages.count().bytes_written == 0);
    pages.clear();
    for (page_table::page_id p = 0; p < pages.n_pages(); ++p) {
        CHECK(pages.is_empty(p) && first_byte(p) == 0);
    }
    CHECK(pages.count().resident_bytes == 0);
}

int main() {
    test_without_spill();
    test_order();
    for (bool ahead : { false, true }) {
        test_faults(ahead);
        test_random(4096, 16, ahead, 1); // slices of whole pages of the system
        test_random(204, 16, ahead, 2);  // slices smaller than one
        test_random(100, 48, ahead, 3);
        test_layers_away(ahead, 4);
    }
    printf("ok\n");
}
