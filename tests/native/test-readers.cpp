// Order, promotion, cancellation and shutdown of the reader pool.

#include "check.h"
#include "io/readers.h"

#include <atomic>
#include <chrono>
#include <future>
#include <random>

using namespace superllama;

static void test_order() {
    std::vector<int> order;
    std::promise<void> gate, done;
    readers pool(1);
    pool.submit(0, [&](bool) {
        gate.get_future().wait();
        return true;
    });
    pool.submit(5, [&](bool) { return order.push_back(5), true; });
    pool.submit(1, [&](bool) { return order.push_back(1), true; });
    pool.submit(5, [&](bool) { return order.push_back(6), true; });
    const auto last = pool.submit(9, [&](bool) { return order.push_back(9), true; });
    const auto out = pool.submit(2, [&](bool run) { return order.push_back(run ? 2 : -2), true; });
    pool.submit(100, [&](bool) { return done.set_value(), false; });
    CHECK(pool.promote(last, 0));
    CHECK(pool.cancel(out));
    CHECK(!pool.cancel(out));
    CHECK(!pool.promote(out, 0));
    gate.set_value();
    done.get_future().wait();
    CHECK(order == (std::vector<int>{ -2, 9, 1, 5, 6 }));
    while (pool.count().pending > 0) {
        std::this_thread::yield();
    }
    CHECK(pool.count().completed == 5 && pool.count().failed == 1);
}

// every job is called exactly once, whatever happens
static void test_storm() {
    const int n_jobs = 2000;
    std::atomic<int> ran{ 0 }, cancelled{ 0 };
    {
        readers pool(3);
        std::vector<std::thread> users;
        for (int u = 0; u < 4; ++u) {
            users.emplace_back([&, u] {
                std::mt19937 rng((unsigned) u);
                for (int i = 0; i < n_jobs / 4; ++i) {
                    const auto id = pool.submit((int64_t) (rng() % 10), [&](bool run) {
                        (run ? ran : cancelled)++;
                        return true;
                    });
                    if (rng() % 3 == 0) {
                        pool.cancel(id);
                    } else if (rng() % 3 == 0) {
                        pool.promote(id, -1);
                    }
                }
            });
        }
        for (auto & user : users) {
            user.join();
        }
    } // the destructor cancels the rest
    CHECK(ran + cancelled == n_jobs);
}

int main() {
    test_order();
    for (int i = 0; i < 20; ++i) {
        test_storm();
    }
    printf("ok\n");
}
