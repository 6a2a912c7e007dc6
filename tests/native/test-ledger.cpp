// The ledger: what owners have by tag, what is lent, and that it is all given back.

#include "base/ledger.h"
#include "check.h"

#include <string>
#include <thread>
#include <vector>

using namespace superllama;

static void test_charges() {
    ledger l;
    {
        charge kv(l, memory_tag::kv);
        charge other(l, memory_tag::kv);
        kv.set(10, 20, 100);
        other.set(5);
        CHECK(l.used(memory_tag::kv) == 15);
        CHECK(l.granted() == 25);
        CHECK(l.lent() == 80);
        kv.use(18);
        CHECK(l.used(memory_tag::kv) == 23);
        CHECK(l.granted() == 25);
        kv.set(0, 0, 40); // less is taken off
        CHECK(l.used(memory_tag::kv) == 5);
        CHECK(l.granted() == 5);
        CHECK(l.lent() == 40);
    }
    CHECK(l.used(memory_tag::kv) == 0);
    CHECK(l.granted() == 0);
    CHECK(l.lent() == 0);
}

static void test_names() {
    for (size_t i = 0; i < n_memory_tags; ++i) {
        for (size_t k = 0; k < i; ++k) {
            CHECK(std::string(name_of((memory_tag) i)) != name_of((memory_tag) k));
        }
    }
}

// Owners in several threads, and one that reads the sums.
static void test_threads() {
    ledger l;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&l] {
            for (uint64_t i = 0; i < 1000; ++i) {
                charge c(l, memory_tag::compute);
                c.set(i, i, i + 1);
            }
        });
    }
    for (int i = 0; i < 1000; ++i) {
        (void) l.used(memory_tag::compute);
    }
    for (std::thread & t : threads) {
        t.join();
    }
    CHECK(l.granted() == 0);
    CHECK(l.lent() == 0);
}

int main() {
    test_charges();
    test_names();
    test_threads();
    printf("ok\n");
}
