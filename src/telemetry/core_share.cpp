#include "telemetry/core_share.h"

#include "telemetry/cgroup.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <sstream>
#include <utility>

#ifdef __linux__
#    include <dirent.h>
#    include <sched.h>
#    include <sys/resource.h>
#    include <unistd.h>
#endif

namespace superllama {

static const int64_t interval_us = 250 * 1000;
static const int64_t long_ago_us = 2 * 1000 * 1000; // a look that old is of a pause, and tells enough alone

// A core that others use for less than that of the time is worth a thread; one that was given up comes back where they
// use less than `quiet` of it.
static const double busy = 0.35, quiet = 0.15;
static const double waiting = 0.05; // below it threads find their cores, whatever others do

int thread_rule::next(const core_use & use) {
    const double free = (double) use.cores - use.others;
    const double before = n > 0 ? free_before : free;
    free_before = free;
    n = n > 0 ? std::min(n, use.cores) : use.cores;

    const double mean = (free + before) / 2;
    const double least = std::min(free, before);
    if (mean < n - busy && !(use.waited >= 0 && use.waited < waiting)) {
        n = std::max(1, (int) std::floor(mean + busy));
    } else if (least >= n + 1 - quiet) {
        n = (int) std::floor(least + quiet);
    }
    return within_quota(n, use.quota);
}

core_share & core_share::of_process() {
    static core_share * share = new core_share; // threads may ask until the process has ended
    return *share;
}

int core_share::threads(int most) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto since_start = std::chrono::steady_clock::now().time_since_epoch();
    const int64_t now = std::chrono::duration_cast<std::chrono::microseconds>(since_start).count();
    if (now - last.t_us >= interval_us) {
        const look here = take(now);
        const double seconds = (double) (now - last.t_us) / 1e6;
        const double waited = count_waits();
        if (here.cores > 0 && here.cores == last.cores) {
            const double others = (here.busy_s - last.busy_s) - (here.own_s - last.own_s);
            const core_use use = { here.cores, std::max(0.0, others / seconds), waited < 0 ? -1 : waited / seconds,
                                   groups.quota() };
            n_free = rule.next(use);
            if (now - last.t_us > long_ago_us) {
                n_free = rule.next(use);
            }
        }
        last = here;
    }
    return n_free > 0 ? std::min(most, n_free) : most;
}

// Since the last call, in seconds; below 0: not known.
double core_share::count_waits() {
    const std::map<std::string, uint64_t> before = std::move(waits_ns);
    waits_ns = thread_waits_ns(root);
    if (before.empty() || waits_ns.empty()) {
        return -1;
    }
    uint64_t sum = 0;
    for (const auto & thread : waits_ns) {
        const auto known = before.find(thread.first);
        const uint64_t base = known != before.end() && known->second <= thread.second ? known->second : 0;
        sum += thread.second - base; // from 0 where it is new, also under the number of one that has ended
    }
    waited_ns += sum;
    return (double) sum / 1e9;
}

int64_t core_share::waited_us() {
    const std::lock_guard<std::mutex> lock(mutex);
    return (int64_t) (waited_ns / 1000);
}

#ifdef __linux__

// Time in user space only: what the kernel does for others, and for our reads, is one sum there.
core_share::look core_share::take(int64_t now_us) const {
    look here = {};
    here.t_us = now_us;
    cpu_set_t allowed; // too small for machines of more than 1024 CPUs, where the call fails
    struct rusage own;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || getrusage(RUSAGE_SELF, &own) != 0) {
        return here;
    }
    std::istringstream lines(read_small_file(root + "/proc/stat"));
    double ticks = 0;
    for (std::string line; std::getline(lines, line) && line.compare(0, 3, "cpu") == 0;) {
        int cpu = 0;
        unsigned long long user = 0, nice = 0;
        if (sscanf(line.c_str(), "cpu%d %llu %llu", &cpu, &user, &nice) == 3 && cpu < CPU_SETSIZE &&
            CPU_ISSET(cpu, &allowed)) {
            ticks += (double) (user + nice);
            here.cores++;
        }
    }
    here.busy_s = ticks / (double) sysconf(_SC_CLK_TCK);
    here.own_s = (double) own.ru_utime.tv_sec + (double) own.ru_utime.tv_usec / 1e6;
    return here;
}

std::map<std::string, uint64_t> thread_waits_ns(const std::string & root) {
    std::map<std::string, uint64_t> waits;
    const std::string folder = root + "/proc/self/task/";
    DIR * tasks = opendir(folder.c_str());
    while (const dirent * task = tasks != nullptr ? readdir(tasks) : nullptr) {
        unsigned long long ran = 0, waited = 0;
        if (task->d_name[0] == '.') { // ".." has a schedstat too, once more that of the main thread
            continue;
        }
        const std::string text = read_small_file(folder + task->d_name + "/schedstat");
        if (sscanf(text.c_str(), "%llu %llu", &ran, &waited) == 2) {
            waits[task->d_name] = waited;
        }
    }
    if (tasks != nullptr) {
        closedir(tasks);
    }
    return waits;
}

#else

core_share::look core_share::take(int64_t) const {
    return {}; // no cores: not known
}

std::map<std::string, uint64_t> thread_waits_ns(const std::string &) {
    return {};
}

#endif

} // namespace superllama
