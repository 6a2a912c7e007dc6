// The metrics line, its rates, and the sink under threads and with a disk that fails.

#include "check.h"
#include "telemetry/metrics.h"

#include <atomic>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#ifndef _WIN32
#    include <fcntl.h>
#    include <sys/stat.h>
#    include <sys/wait.h>
#    include <unistd.h>
#endif

using namespace superllama;

static std::string read_all(const std::string & path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

static void test_json() {
    struct superllama_stats s = {};
    s.timestamp_ms = 1700000000123;
    s.token = 3;
    s.ram_used_bytes = 1234567;
    s.cpu_memory_pressure = 1.5;
    metrics_parts parts;
    parts.sequences = { { 3, 2, 5, 1, 0, 64 }, {}, { 1, 0, 0, 0, 0, 0 } };
    parts.devices = { { "GPU\"0", 5, 9, 7, 1 } };
    const std::string json = metrics_json(s, parts, METRICS_FINAL, false);
    CHECK(json.find("{\"timestamp\":\"2023-11-14T22:13:20.123Z\",\"token\":3,") == 0);
    CHECK(json.find("\"ram_used_mb\":1.2,") != std::string::npos);
    CHECK(json.find("\"cpu_memory_pressure\":1.000,") != std::string::npos); // clamped
    CHECK(json.find("\"event\":\"final\",") != std::string::npos);
    CHECK(json.find('\n') == std::string::npos);
    CHECK(json.find("\"sequences\":[{\"sequence\":0,\"prompt_tokens\":3,\"generated_tokens\":2,\"kv_tokens\":5,"
                    "\"kv_pages_cpu\":1,\"kv_pages_disk\":0,\"kv_bytes\":64},{\"sequence\":2,") != std::string::npos);
    CHECK(json.find("\"devices\":[{\"device\":\"GPU_0\",\"bytes\":5,\"budget_bytes\":9,\"bytes_up\":7,"
                    "\"bytes_down\":1}]}") != std::string::npos);
    CHECK(json.find(",\"experts\":null,\"sequences\":[") != std::string::npos);
    const std::string none = metrics_json(s, {}, METRICS_FINAL, false);
    CHECK(none.find("\"sequences\":[],\"devices\":[]}") != std::string::npos);
    CHECK(metrics_json(s, {}, METRICS_FINAL, true).find("\n  \"token\": 3,") != std::string::npos);

    using expert = struct superllama_expert;
    const std::vector<expert> experts = { { 1, 0, SUPERLLAMA_TIER_HOST, nullptr, 8, 5, 1, 1 },
                                          { 1, 1, SUPERLLAMA_TIER_DISK, nullptr, 8, 0, 0, 0 },
                                          { 3, 0, SUPERLLAMA_TIER_DEVICE, "GPU0", 8, 7, 2, 1 } };
    const std::string told = experts_json(experts);
    CHECK(told == "{\"layers\":[1,3],\"uses\":[[5,0],[7]],\"misses\":[[1,0],[2]],\"tier\":[[0,1],[2]]}");
    CHECK(experts_json({}) == "null");
    parts.experts = told;
    CHECK(metrics_json(s, parts, METRICS_FINAL, false).find(",\"experts\":" + told + ",") != std::string::npos);
}

static void test_rates() {
    metrics_rates r;
    r.begin(1000000);
    r.end(2000000, 100, 0); // a prompt takes no generation time
    CHECK(r.average() == 0.0);
    r.begin(2000000);
    r.end(2100000, 0, 1);
    r.begin(2150000); // 50 ms of sampling belong to the token
    r.end(2300000, 0, 1);
    CHECK(r.n_prompt == 100 && r.n_generated == 2);
    CHECK(r.average() > 6.66 && r.average() < 6.67); // 2 tokens in 0.3 s
    r.mark();
    CHECK(r.since_mark() == 0.0);
    r.begin(60000000); // a user who thinks for a minute
    r.end(60500000, 0, 1);
    CHECK(r.since_mark() == 2.0);
    CHECK(r.average() == 3 / 0.8);
}

static void test_threads(const std::string & path) {
    const int n_threads = 4, n_lines = 200;
    {
        auto sink = metrics_sink::open(path);
        std::vector<std::thread> threads;
        for (int t = 0; t < n_threads; ++t) {
            threads.emplace_back([&, t] {
                for (int i = 0; i < n_lines; ++i) {
                    sink->push("{\"line\":\"" + std::to_string(t) + "/" + std::to_string(i) + "\"}");
                }
            });
        }
        for (auto & thread : threads) {
            thread.join();
        }
        CHECK(metrics_sink::open(path) == sink); // shared while in use
        sink->flush();
        CHECK(sink->dropped() == 0);
    }
    std::istringstream text(read_all(path));
    std::set<std::string> lines;
    for (std::string line; std::getline(text, line);) {
        CHECK(line.front() == '{' && line.back() == '}'); // whole lines only
        lines.insert(line);
    }
    CHECK(lines.size() == (size_t) n_threads * n_lines);

    const size_t before = read_all(path).size();
    metrics_sink::open(path)->push("{}"); // a file is continued, whoever wrote it
    CHECK(read_all(path).size() == before + 3);
}

#ifndef _WIN32
static void test_slow_disk(const std::string & path) {
    // a pipe that nobody reads stands for a disk that hangs: push() must neither wait nor grow without end
    CHECK(mkfifo(path.c_str(), 0600) == 0);
    const int reader = open(path.c_str(), O_RDONLY | O_NONBLOCK);
    const int writer = open(path.c_str(), O_WRONLY | O_NONBLOCK);
    std::thread drain;
    {
        metrics_sink sink(writer, "");
        const std::string line(1000, 'x');
        for (int i = 0; i < 5000; ++i) {
            sink.push(line);
        }
        CHECK(sink.dropped() > 0);
        // let it finish
        drain = std::thread([reader] {
            char buf[65536];
            for (ssize_t n = 1; n != 0;) {
                n = read(reader, buf, sizeof(buf));
            }
        });
        sink.flush();
    }
    drain.join(); // the sink closed the pipe
    close(reader);
}

static void test_full_disk() {
    const int full = open("/dev/full", O_WRONLY);
    if (full < 0) {
        return;
    }
    metrics_sink sink(full, "");
    sink.push("{}");
    sink.flush();
    CHECK(sink.dropped() == 1);
}
#endif

#ifndef _WIN32
// A reader that is there and stopped: everything that waits for it is dropped, and half of the pipe stays free.
static void test_stopped_reader(const std::string & path) {
    CHECK(mkfifo(path.c_str(), 0600) == 0);
    check_metrics_path(path); // opens nothing
    const int reader = open(path.c_str(), O_RDONLY | O_NONBLOCK);
    const int n_lines = 1000;
    int64_t n_dropped = 0;
    {
        auto sink = metrics_sink::open(path);
        for (int i = 0; i < n_lines; ++i) {
            sink->push(std::string(999, 'x'));
        }
        sink->flush();
        n_dropped = sink->dropped();
        char buf[65536];
        const ssize_t n = read(reader, buf, sizeof(buf));
        CHECK(n > 0 && n % 1000 == 0); // whole lines
        CHECK(n / 1000 + n_dropped == n_lines);
        CHECK(n <= (ssize_t) sizeof(buf) / 2);

        sink->push("{}"); // it goes on when there is room again
        sink->flush();
        CHECK(read(reader, buf, sizeof(buf)) == 3);
        CHECK(sink->dropped() == n_dropped);
    }
    close(reader);
}

// A FIFO whose reader comes later, or never.
static void test_no_reader(const std::string & path) {
    CHECK(mkfifo(path.c_str(), 0600) == 0);
    auto sink = metrics_sink::open(path);
    sink->push("{}");
    sink->flush();
    const int reader = open(path.c_str(), O_RDONLY | O_NONBLOCK);
    char buf[16];
    CHECK(read(reader, buf, sizeof(buf)) == 3);
    close(reader);
}

// A child of a fork has the sink, but not its thread.
static void test_fork(const std::string & path) {
    auto sink = metrics_sink::open(path);
    const pid_t child = fork();
    if (child == 0) {
        sink->flush();
        sink.reset();
        _exit(7);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
}
#endif

static void test_unwritable() {
    for (const char * path : { "/nonexistent-folder/metrics.jsonl", "/" }) {
        try {
            check_metrics_path(path);
            CHECK(false);
        } catch (const std::exception & e) {
            CHECK(std::string(e.what()).find(path) != std::string::npos);
        }
    }
    try {
        metrics_sink::open("/nonexistent-folder/metrics.jsonl");
        CHECK(false);
    } catch (const std::exception & e) {
        CHECK(std::string(e.what()).find("/nonexistent-folder/metrics.jsonl") != std::string::npos);
    }
}

int main(int argc, char ** argv) {
    CHECK(argc == 2); // a folder to write to
    const std::string dir = argv[1];
    test_json();
    test_rates();
    test_threads(dir + "/threads.jsonl");
    test_unwritable();
#ifndef _WIN32
    test_slow_disk(dir + "/pipe");
    test_full_disk();
    test_stopped_reader(dir + "/stopped");
    test_no_reader(dir + "/alone");
    test_fork(dir + "/fork.jsonl");
#endif
    printf("ok\n");
}
