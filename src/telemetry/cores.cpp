#include "telemetry/cores.h"

#include "telemetry/cgroup.h"

#include <algorithm>
#include <cstdio>

#ifdef __linux__
#    include <sched.h>
#endif

namespace superllama {

double cpu_quota(const std::string & root) {
    const cgroup_path path = find_cgroup(root, "cpu");
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

int usable_cores(int n) {
#ifdef __linux__
    cpu_set_t allowed; // too small for machines of more than 1024 CPUs, where the call fails
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        n = std::min(n, CPU_COUNT(&allowed));
    }
#endif
    const double quota = cpu_quota();
    return quota > 0 ? std::max(1, std::min(n, (int) quota)) : n;
}

} // namespace superllama
