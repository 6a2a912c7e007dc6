// Requests of the engine and the threads that work for them: pieces in order, time-outs, an end that everyone hears.

#include "check.h"
#include "engine/request.h"
#include "engine/workers.h"

#include <atomic>
#include <future>
#include <memory>
#include <thread>

using superllama::request;
using superllama::workers;

static void test_pieces() {
    request asked("GET", "/health", "");
    const char * data = nullptr;
    size_t size = 0;
    CHECK(asked.next(0, &data, &size) == -1 && asked.status() == 0);
    asked.give(200, "one");
    asked.give(200, std::string("t\0wo", 4));
    asked.end(500); // the status is that of the pieces
    CHECK(asked.next(-1, &data, &size) == 1 && std::string(data, size) == "one");
    CHECK(asked.next(-1, &data, &size) == 1 && std::string(data, size) == std::string("t\0wo", 4));
    CHECK(asked.next(-1, &data, &size) == 0 && asked.next(0, &data, &size) == 0 && asked.status() == 200);

    request nothing("GET", "/health", "");
    nothing.end(499);
    CHECK(nothing.next(-1, &data, &size) == 0 && nothing.status() == 499);
}

// a reader for each request, who sees all pieces in order, or stops by himself
static void test_many() {
    const int n_requests = 200, n_pieces = 50;
    workers pool;
    std::atomic<int> heard{ 0 };
    std::vector<std::thread> readers;
    for (int i = 0; i < n_requests; i++) {
        const auto asked = std::make_shared<request>("POST", std::to_string(i), "");
        pool.run([asked, &heard] {
            for (int k = 0; k < n_pieces && !asked->cancelled(); k++) {
                asked->give(200, std::to_string(k));
            }
            heard += asked->cancelled();
            asked->end(200);
        });
        readers.emplace_back([asked, i] {
            const char * data = nullptr;
            size_t size = 0;
            int k = 0;
            for (int found; (found = asked->next(i % 3 == 0 ? 1 : -1, &data, &size)) != 0;) {
                if (found == 1) {
                    CHECK(std::string(data, size) == std::to_string(k));
                    k++;
                }
                if (i % 5 == 0 && k == 3) {
                    asked->cancel();
                }
            }
            CHECK(k == n_pieces || i % 5 == 0);
        });
    }
    for (auto & reader : readers) {
        reader.join();
    }
    CHECK(heard <= n_requests / 5);
}

// a job that waits for another one does not keep it from running; finish() runs what waits
static void test_each_has_a_thread() {
    std::promise<void> first, second;
    std::atomic<int> ran{ 0 };
    workers pool;
    pool.run([&] { second.get_future().wait(), first.set_value(), ran++; });
    pool.run([&] { second.set_value(), first.get_future().wait(), ran++; });
    for (int i = 0; i < 100; i++) {
        pool.run([&] { ran++; });
    }
    pool.finish();
    CHECK(ran == 102);
    pool.finish();
}

int main() {
    test_pieces();
    test_many();
    test_each_has_a_thread();
    printf("ok\n");
    return 0;
}
