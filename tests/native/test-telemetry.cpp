// The parsers of /proc and of cgroups v1 and v2, on captured files; then one look at this machine.

#include "check.h"
#include "telemetry/core_share.h"
#include "telemetry/cores.h"
#include "telemetry/memory.h"
#include "telemetry/pressure.h"

#include <map>
#include <string>

using namespace superllama;

static const uint64_t KiB = 1024, GiB = 1024 * 1024 * 1024;

#ifdef __linux__
static struct superllama_memory captured(const char * folder) {
    return memory_telemetry(std::string(DATA_DIR "/") + folder).sample();
}

static void test_no_cgroup() {
    const auto m = captured("none");
    CHECK(m.machine_total == 32768000 * KiB);
    CHECK(m.machine_available == 24576000 * KiB);
    CHECK(m.host_total == m.machine_total && m.host_available == m.machine_available);
    CHECK(m.cgroup_limit == 0 && m.cgroup_used == 0);
    CHECK(m.swap_total == 2097152 * KiB && m.swap_free == 1048576 * KiB);
    CHECK(m.resident > 0 && m.resident == 4 * m.resident_file);
    CHECK(m.resident_anon == m.resident - m.resident_file);
    CHECK(m.read_bytes == 987654321);
}

static void test_v1_limit_of_parent() {
    const auto m = captured("v1");
    CHECK(m.cgroup_limit == 8 * GiB);
    CHECK(m.cgroup_used == 3 * GiB); // 4 in use, 1 of it page cache, half of that read twice
    CHECK(m.host_total == 8 * GiB && m.host_available == 5 * GiB);
}

static void test_v2_high_below_max() {
    const auto m = captured("v2");
    CHECK(m.cgroup_limit == 3 * GiB / 2);
    CHECK(m.cgroup_used == GiB);
    CHECK(m.host_total == 3 * GiB / 2 && m.host_available == GiB / 2);
}

static void test_container() {
    const auto m = captured("container");
    CHECK(m.cgroup_limit == GiB);
    CHECK(m.host_available == GiB - GiB / 4);
}

static void test_cpu_quota() {
    CHECK(cpu_groups(DATA_DIR "/v1").quota() == 2);
    CHECK(cpu_groups(DATA_DIR "/v2").quota() == 1.5); // of a group above; the own one has "max"
    CHECK(cpu_groups(DATA_DIR "/none").quota() == 0);
    CHECK(usable_cores(1) == 1 && usable_cores(1 << 20) < 1 << 20);
}

static void test_throttled() {
    CHECK(cpu_groups(DATA_DIR "/v1").throttled_us() == 2500);
    CHECK(cpu_groups(DATA_DIR "/v2").throttled_us() == 70000); // the most of all groups
    CHECK(cpu_groups(DATA_DIR "/none").throttled_us() == 0);
}

static void test_thread_waits() {
    const std::map<std::string, uint64_t> waits = { { "70", 1000 }, { "71", 52000 } };
    CHECK(thread_waits_ns(DATA_DIR "/v2") == waits); // the process's own file, behind "..", is that of its main thread
    CHECK(thread_waits_ns(DATA_DIR "/none").empty());
}

static void test_share_of_this_machine() {
    core_share share;
    CHECK(share.threads(4) == 4); // one look tells nothing
    CHECK(share.waited_us() == 0);
    core_share nothing(DATA_DIR "/none");
    CHECK(nothing.threads(3) == 3);
}

static void test_missing_files() {
    const auto m = captured("no-such-folder");
    CHECK(m.machine_total == 0 && m.host_available == 0 && m.resident == 0);
}
#endif

static void test_this_machine() {
    const auto m = memory_telemetry().sample();
    CHECK(m.host_total > 0 && m.host_total <= m.machine_total);
    CHECK(m.host_available <= m.host_total);
    CHECK(m.resident > 0 && m.resident_peak > 0);
}

// Between the marks nothing moves; growing ends below the high mark.
static void test_pressure() {
    const pressure_marks marks = { 0.85, 0.70, 0.01 };
    const auto is = [&marks](double available, double change) {
        const double differs = marks.change(1000, available) - change;
        CHECK(differs < 1e-6 && differs > -1e-6);
    };
    is(150, 0);   // on the high mark
    is(300, 0);   // on the low one
    is(200, 0);   // between
    is(100, -50); // 0.90: back to 0.85
    is(0, -150);
    is(-100, -250); // more was promised than there is
    is(400, 240);   // 0.60: up to 0.84
    is(1000, 840);
}

// Fewer threads as soon as they wait, more where two looks agree.
static void test_thread_rule() {
    const core_use alone = { 2, 0.05, 0, 0 };
    const core_use beside = { 2, 1.0, 0.5, 0 };
    const core_use in_turn = { 2, 1.0, 0, 0 }; // the other one has its core, ours has the other
    thread_rule rule;
    CHECK(rule.next(alone) == 2);
    CHECK(rule.next(beside) == 1);
    CHECK(rule.next(in_turn) == 1);
    CHECK(rule.next(alone) == 1); // may be for a moment
    CHECK(rule.next(beside) == 1);
    CHECK(rule.next(alone) == 1);
    CHECK(rule.next(alone) == 2);

    thread_rule polite; // what runs with a low priority is busy, and takes nothing
    CHECK(polite.next(in_turn) == 2);
    CHECK(polite.next(in_turn) == 2);

    thread_rule blind; // no number of the scheduler
    CHECK(blind.next({ 2, 1.0, -1, 0 }) == 1);

    thread_rule wide;
    CHECK(wide.next({ 16, 0, 0, 0 }) == 16);
    CHECK(wide.next({ 16, 7.8, 3, 0 }) == 12);
    CHECK(wide.next({ 16, 7.8, 3, 0 }) == 8);
    CHECK(wide.next({ 16, 20, 3, 0 }) == 2); // of which the first look knew less
    CHECK(wide.next({ 16, 20, 3, 0 }) == 1);
    CHECK(wide.next({ 4, 0, 0, 0 }) == 1);
    CHECK(wide.next({ 4, 0, 0, 0 }) == 4);

    thread_rule limited;
    CHECK(limited.next({ 4, 0, 0, 1.5 }) == 1);
    CHECK(limited.next({ 4, 0, 0, 0.5 }) == 1);
    CHECK(limited.next({ 4, 0, 0, 3 }) == 3);
    CHECK(limited.next({ 4, 0, 0, 0 }) == 4);
}

int main() {
    test_thread_rule();
    test_pressure();
#ifdef __linux__
    test_no_cgroup();
    test_v1_limit_of_parent();
    test_v2_high_below_max();
    test_container();
    test_cpu_quota();
    test_throttled();
    test_thread_waits();
    test_share_of_this_machine();
    test_missing_files();
#endif
    test_this_machine();
    printf("ok\n");
}
