// Frames of experts against a simple model of them, and the table in which kernels wait for experts.

#include "check.h"
#include "io/address_space.h"
#include "weights/experts/frames.h"
#include "weights/experts/table.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

using namespace superllama;

// Experts come and go, some of them in use and so in place; what is in a frame stays with its expert.
static void test_frames(size_t bytes, size_t n, ggml_backend_buffer_type_t locked = nullptr) {
    expert_frames frames(bytes, n, locked);
    std::map<uint32_t, uint8_t *> where;
    std::set<uint32_t> in_use;
    std::mt19937 random(7);
    const auto whole = [&](uint32_t block, const uint8_t * at) {
        const uint8_t value = (uint8_t) (block + 1);
        return at[0] == value && at[bytes / 2] == value && at[bytes - 1] == value;
    };
    size_t n_shrunk = 0, n_moved = 0, n_refused = 0;
    for (int step = 0; step < 4000; ++step) {
        const uint32_t block = random() % n;
        const auto found = where.find(block);
        switch (random() % 4) {
            case 0:
            case 1:
                if (found == where.end()) {
                    const size_t before = frames.memory_bytes();
                    const bool had_free = frames.has_free();
                    uint8_t * at = frames.take(block);
                    CHECK(frames.memory_bytes() == before + (had_free ? 0 : bytes));
                    memset(at, (int) block + 1, bytes);
                    where[block] = at;
                    if (random() % 8 == 0) {
                        in_use.insert(block);
                    }
                }
                break;
            case 2:
                if (found != where.end()) {
                    frames.give_back(found->second);
                    where.erase(found);
                    in_use.erase(block);
                }
                break;
            default: {
                const size_t before = frames.memory_bytes();
                const bool ok = frames.shrink([&](uint32_t b) { return in_use.count(b) == 0; },
                                              [&](uint32_t b, uint8_t * to) {
                                                  CHECK(to != where[b]);
                                                  where[b] = to;
                                                  n_moved++;
                                              });
                CHECK(frames.memory_bytes() == before - (ok ? bytes : 0));
                (ok ? n_shrunk : n_refused)++;
                if (!ok && before > 0 && locked == nullptr) { // no hole, or the last one may not move
                    uint8_t * last = std::max_element(where.begin(), where.end(), [](const auto & a, const auto & b) {
                                         return a.second < b.second;
                                     })->second;
                    CHECK(!frames.has_free() ||
                          std::any_of(in_use.begin(), in_use.end(), [&](uint32_t b) { return where[b] == last; }));
                }
            }
        }
        CHECK(frames.memory_bytes() >= where.size() * bytes);
        CHECK(std::all_of(where.begin(), where.end(), [&](const auto & e) { return whole(e.first, e.second); }));
    }
    CHECK(n_shrunk > 100 && n_moved > 50 && n_refused > 10);
}

static void test_slack() {
    CHECK(frame_memory::slack(8192, 64, false) == 0);
    CHECK(frame_memory::slack(3u << 20, 64, false) == huge_page - system_page());
    CHECK(frame_memory::slack(3u << 20, 64, true) == 64 * system_page()); // each is a slab of its own
    CHECK(frame_memory::slack(16384, 64 * 16, true) == 15 * 16384 + 64 * system_page());
}

// Two kernels ask for experts that arrive in another order.
static void test_table() {
    const size_t n = 64;
    expert_waiters waiters;
    std::vector<uint64_t> memory(expert_table::bytes(n) / sizeof(uint64_t) + 1);
    std::vector<uint8_t> matrices(n);
    expert_table * table = expert_table::create(memory.data(), n, waiters);
    using function = const char * (*) (void *, int64_t);
    const auto kernel = [&] {
        for (size_t e = 0; e < n; ++e) { // as the patched kernels do
            const char * at = (*(function *) memory.data())(memory.data(), (int64_t) e);
            CHECK(at == (const char *) &matrices[e] && *at == (char) (e + 1));
        }
    };
    std::thread a(kernel), b(kernel);
    for (size_t i = 0; i < n; ++i) {
        const size_t e = i * 37 % n;
        matrices[e] = (uint8_t) (e + 1);
        table->set((int32_t) e, &matrices[e]);
        if (i % 16 == 0) {
            std::this_thread::yield();
        }
    }
    a.join();
    b.join();
    CHECK(waiters.n_waiting == 0);
    table->set(5, nullptr);
    std::thread c([&] { CHECK((*(function *) memory.data())(memory.data(), 5) == (const char *) &matrices[6]); });
    std::this_thread::yield();
    table->set(5, &matrices[6]);
    c.join();
}

static void test_asked() {
    const size_t n = 5;
    expert_waiters waiters;
    std::vector<uint64_t> memory(expert_table::bytes(n) / sizeof(uint64_t) + 1);
    const uint8_t matrix = 1;
    expert_table * table = expert_table::create(memory.data(), n, waiters);
    std::vector<int32_t> asked;
    const auto take = [&] {
        asked.clear();
        table->take_asked([&](int32_t e) { asked.push_back(e); });
        return asked;
    };
    for (size_t e = 0; e < n; ++e) {
        table->set((int32_t) e, &matrix);
    }
    CHECK(take().empty());
    using function = const char * (*) (void *, int64_t);
    for (int64_t e : { 3, 0, 3 }) {
        (*(function *) memory.data())(memory.data(), e);
    }
    CHECK(take() == std::vector<int32_t>({ 0, 3 }));
    CHECK(take().empty());
}

int main() {
    test_frames(4096, 40);
    test_frames(4096, 400, ggml_backend_cpu_buffer_type());
    test_frames(12288, 100);
    test_frames((2u << 20) + 4096, 33);
    test_slack();
    test_table();
    test_asked();
    puts("ok");
    return 0;
}
