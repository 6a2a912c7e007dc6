#include "telemetry/cores.h"

#include <algorithm>
#include <cstdio>

#ifdef __linux__
#    include <sched.h>
#endif

namespace superllama {

double cpu_groups::quota() const {
    double least = 0;
    for (const std::string & folder : path.folders) {
        const std::string limit =
            path.v2 ? read_small_file(folder + "cpu.max")
                    : read_small_file(folder + "cpu.cfs_quota_us") + read_small_file(folder + "cpu.cfs_period_us");
        long long quota = 0; // "max", or -1: none
        long long period = 0;
        if (sscanf(limit.c_str(), "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
            const double cpus = (double) quota / (double) period;
            least = least > 0 ? std::min(least, cpus) : cpus;
        }
    }
    return least;
}

int64_t cpu_groups::throttled_us() const {
    uint64_t most = 0; // a group counts its own quota, and several may hold a process back at once
    for (const std::string & folder : path.folders) {
        const std::string text = read_small_file(folder + "cpu.stat");
        const uint64_t us = path.v2 ? line_value(text, "throttled_usec") : line_value(text, "throttled_time") / 1000;
        most = std::max(most, us);
    }
    return (int64_t) most;
}

int within_quota(int n, double quota) {
    return quota > 0 ? std::max(1, std::min(n, (int) quota)) : n;
}

int usable_cores(int n) {
#ifdef __linux__
    cpu_set_t allowed; // too small for machines of more than 1024 CPUs, where the call fails
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        n = std::min(n, CPU_COUNT(&allowed));
    }
#endif
    return within_quota(n, cpu_groups().quota());
}

} // namespace superllama
