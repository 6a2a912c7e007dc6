// The ring of streamed blocks against a simple model of it: places, limits, and memory that really comes and goes.

#include "check.h"
#include "io/address_space.h"
#include "weights/ring.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <random>

#include <sys/mman.h>

using namespace superllama;

struct place {
    uint8_t * at;
    size_t bytes;
};

// Blocks of several sizes come and go while the limit moves; what is in a place stays its block's.
static void test_random(size_t page, size_t n_pages) {
    const size_t small = system_page();
    stream_ring ring(n_pages * page, page);
    std::map<uint32_t, place> where;
    std::mt19937 random(11);
    size_t limit = 0, n_refused = 0, n_compacted = 0, n_beyond = 0;
    uint8_t * base = nullptr;
    for (uint32_t step = 0; step < 6000; ++step) {
        switch (random() % 8) {
            case 0:
                limit = random() % (n_pages + 2) * page + random() % page;
                ring.limit(limit);
                limit = std::min(round_down(limit, page), n_pages * page);
                break;
            case 1:
            case 2:
            case 3:
                if (!where.empty()) {
                    const auto p = std::next(where.begin(), (ptrdiff_t) (random() % where.size()));
                    ring.give_back(p->second.at);
                    where.erase(p);
                }
                break;
            case 4:
                if (random() % 8 == 0) {
                    ring.compact([&](uint32_t block, uint8_t * to) {
                        CHECK(to < where[block].at);
                        where[block].at = to;
                    });
                    n_compacted++;
                    size_t used = 0;
                    for (const auto & p : where) {
                        used += p.second.bytes;
                    }
                    CHECK(used >= limit || ring.has_room(limit - used)); // in one piece
                }
                break;
            default: {
                const size_t bytes = (1 + random() % 40) * small;
                if (!ring.has_room(bytes)) {
                    n_refused++;
                    break;
                }
                uint8_t * at = ring.take(step, bytes);
                base = where.empty() && base == nullptr ? at : base; // the first one begins it
                for (const auto & p : where) {
                    CHECK(at + bytes <= p.second.at || p.second.at + p.second.bytes <= at);
                }
                CHECK(at >= base && (size_t) (at - base) + bytes <= limit);
                memset(at, (int) (step % 255 + 1), bytes);
                where[step] = { at, bytes };
            }
        }
        size_t end = 0;
        for (const auto & p : where) {
            const auto value = (uint8_t) (p.first % 255 + 1);
            const uint8_t * at = p.second.at;
            CHECK(at[0] == value && at[p.second.bytes / 2] == value && at[p.second.bytes - 1] == value);
            end = std::max(end, (size_t) (at - base) + p.second.bytes);
        }
        CHECK(ring.has_room(0) == (end <= limit));
        CHECK(ring.memory_bytes() <= round_up(std::max(end, limit), page));
        n_beyond += end > limit ? 1 : 0;
    }
    CHECK(n_refused > 100 && n_compacted > 50 && n_beyond > 50);
}

// In the order of streaming no byte of memory is new after the first round.
static void test_round() {
    const size_t page = system_page();
    stream_ring ring(100 * page, page);
    ring.limit(30 * page);
    uint8_t * at[3] = { ring.take(0, 10 * page), ring.take(1, 10 * page), ring.take(2, 10 * page) };
    CHECK(at[1] == at[0] + 10 * page && at[2] == at[1] + 10 * page && !ring.has_room(page));
    for (uint32_t i = 3; i < 300; ++i) {
        ring.give_back(at[i % 3]);
        CHECK(ring.take(i, 10 * page) == at[i % 3]);
        CHECK(ring.memory_bytes() == 30 * page);
    }
}

static bool has_memory(uint8_t * page) {
    unsigned char resident = 0;
    CHECK(mincore(page, system_page(), &resident) == 0);
    return resident & 1;
}

static void test_memory_goes_back() {
    const size_t page = system_page();
    stream_ring ring(100 * page, page);
    ring.limit(100 * page);
    uint8_t * first = ring.take(0, 10 * page);
    uint8_t * second = ring.take(1, 10 * page);
    memset(first, 1, 10 * page);
    memset(second, 2, 10 * page);
    ring.give_back(first);
    ring.limit(0);
    CHECK(ring.memory_bytes() == 10 * page && !has_memory(first) && second[0] == 2);
    ring.give_back(second);
    CHECK(ring.memory_bytes() == 0 && !has_memory(second) && ring.has_room(0) && !ring.has_room(page));
}

int main() {
    test_random(system_page(), 300);
    test_random(huge_page, 3);
    test_round();
    test_memory_goes_back();
    puts("ok");
    return 0;
}
