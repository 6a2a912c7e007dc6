// Order, promotion, cancellation and shutdown of the reader pool.

#include "check.h"
#include "io/readers.h"

#include <atomic>
#include <chrono>
#include <future>
#include <random>
#include <stdexcept>

#ifdef __linux__
#    include <sys/resource.h>
#    include <unistd.h>
#endif

using namespace superllama;

static std::unique_ptr<readers> with_threads(int n) {
    std::string why;
    auto pool = readers::create(n, &why);
    CHECK(pool != nullptr && why.empty());
    return pool;
}

static void test_order() {
    std::vector<int> order;
    std::promise<void> gate, done;
    const auto one = with_threads(1);
    readers & pool = *one;
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
        const auto three = with_threads(3);
        readers & pool = *three;
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

// A job that throws is a job that failed, whoever runs it; the thread goes on.
static void test_jobs_that_throw() {
    const auto one = with_threads(1);
    std::promise<void> gate, done;
    one->submit(0, [&](bool) -> bool {
        gate.get_future().wait();
        throw std::bad_alloc();
    });
    const auto out = one->submit(1, [](bool) -> bool { throw std::runtime_error("cancelled"); });
    one->submit(2, [&](bool) { return done.set_value(), true; });
    CHECK(one->cancel(out));
    gate.set_value();
    done.get_future().wait();
    while (one->count().pending > 0) {
        std::this_thread::yield();
    }
    CHECK(one->count().completed == 1 && one->count().failed == 1);
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// Where the system gives fewer threads than were asked for, those that there are do the work; none is a reason, no end.
static void test_fewer_threads() {
    struct rlimit before = {};
    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    unsigned long pages = 0;
    FILE * statm = fopen("/proc/self/statm", "r");
    if (statm == nullptr) {
        return;
    }
    CHECK(fscanf(statm, "%lu", &pages) == 1);
    fclose(statm);
    const rlim_t now = (rlim_t) pages * (rlim_t) sysconf(_SC_PAGESIZE);
    for (rlim_t room : { (rlim_t) 1 << 20, (rlim_t) 200 << 20 }) { // of a thread's stack: none, some
        struct rlimit limit = { now + room, before.rlim_max };
        CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
        std::string why;
        const auto pool = readers::create(1000, &why);
        CHECK(setrlimit(RLIMIT_AS, &before) == 0);
        CHECK(why.find("ulimit -u") != std::string::npos);
        CHECK(pool != nullptr || room < 100 << 20); // stacks of threads that ended may be used again
        if (pool != nullptr) {
            CHECK(pool->n_threads() > 0 && pool->n_threads() < 1000);
            std::promise<void> done;
            pool->submit(0, [&](bool) { return done.set_value(), true; });
            done.get_future().wait();
        }
    }
}
#else
static void test_fewer_threads() {}
#endif

int main() {
    test_jobs_that_throw();
    test_fewer_threads();
    test_order();
    for (int i = 0; i < 20; ++i) {
        test_storm();
    }
    printf("ok\n");
}
