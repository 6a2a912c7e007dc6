#include "telemetry/core_share.h"

#include "telemetry/cgroup.h"
#include "telemetry/cores.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

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
    return use.quota > 0 ? std::max(1, std::min(n, (int) use.quota)) : n;
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
        look here;
        here.t_us = now;
        if (!take(here)) {
            return most;
        }
        const double waited = wait_s();
        const double seconds = (double) (now - last.t_us) / 1e6;
        if (last.t_us > 0 && here.cores == last.cores) {
            const double others = (here.busy_s - last.busy_s) - (here.own_s - last.own_s);
            const core_use use = { here.cores, std::max(0.0, others / seconds), waited < 0 ? -1 : waited / seconds,
                                   cpu_quota(root) };
            n_free = rule.next(use);
            if (now - last.t_us > long_ago_us) {
                n_free = rule.next(use);
            }
        }
        last = here;
    }
    return n_free > 0 ? std::min(most, n_free) : most;
}

int64_t core_share::waited_us() {
    const std::lock_guard<std::mutex> lock(mutex);
    return (int64_t) (waited_ns / 1000);
}

#ifdef __linux__

bool core_share::take(look & out) const {
    cpu_set_t allowed;
    struct rusage own;
    const std::string text = read_small_file(root + "/proc/stat");
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || getrusage(RUSAGE_SELF, &own) != 0) {
        return false;
    }
    double ticks = 0;
    for (size_t begin = 0; begin < text.size(); begin = text.find('\n', begin) + 1) {
        int cpu = 0;
        unsigned long long user = 0, nice = 0;
        if (sscanf(text.c_str() + begin, "cpu%d %llu %llu", &cpu, &user, &nice) == 3 && cpu < CPU_SETSIZE &&
            CPU_ISSET(cpu, &allowed)) {
            ticks += (double) (user + nice);
            out.cores++;
        }
        if (text.find('\n', begin) == std::string::npos) {
            break;
        }
    }
    out.busy_s = ticks / (double) sysconf(_SC_CLK_TCK);
    out.own_s = (double) own.ru_utime.tv_sec + (double) own.ru_utime.tv_usec / 1e6;
    return out.cores > 0;
}

double core_share::wait_s() {
    const std::string folder = root + "/proc/self/task/";
    DIR * tasks = opendir(folder.c_str());
    if (tasks == nullptr) {
        return -1;
    }
    std::map<std::string, uint64_t> seen;
    uint64_t sum = 0;
    while (const dirent * task = readdir(tasks)) {
        unsigned long long ran = 0, waited = 0;
        const std::string text = read_small_file(folder + task->d_name + "/schedstat");
        if (sscanf(text.c_str(), "%llu %llu", &ran, &waited) == 2) {
            const auto before = waits_ns.find(task->d_name);
            const uint64_t base = before != waits_ns.end() ? before->second : 0;
            sum += waited >= base ? waited - base : waited; // less than before: another thread has the number now
            seen[task->d_name] = waited;
        }
    }
    closedir(tasks);
    const bool known = !seen.empty();
    const bool first = waits_ns.empty();
    waits_ns = std::move(seen);
    if (!known || first) {
        return -1;
    }
    waited_ns += sum;
    return (double) sum / 1e9;
}

int64_t throttled_us(const std::string & root) {
    uint64_t most = 0; // a group counts its own quota, and several may hold a process back at once
    const cgroup_path path = find_cgroup(root, "cpu");
    for (const std::string & folder : path.folders) {
        const std::string text = read_small_file(folder + "cpu.stat");
        const uint64_t us = path.v2 ? line_value(text, "throttled_usec") : line_value(text, "throttled_time") / 1000;
        most = std::max(most, us);
    }
    return (int64_t) most;
}

#else

bool core_share::take(look &) const {
    return false;
}

double core_share::wait_s() {
    return -1;
}

int64_t throttled_us(const std::string &) {
    return 0;
}

#endif

} // namespace superllama
