// How many cores this process may keep busy: more threads than that only wait for each other.
#pragma once

#include "telemetry/cgroup.h"

#include <cstdint>
#include <string>

namespace superllama {

// The groups that limit this process's time on CPUs. `root` as in find_cgroup().
class cpu_groups {
  public:
    explicit cpu_groups(const std::string & root = "") : path(find_cgroup(root, "cpu")) {}

    double quota() const;         // CPUs' time, by the tightest limit; 0 = no limit
    int64_t throttled_us() const; // what they took from this process so far, because it had used its quota up

  private:
    cgroup_path path;
};

// Of `n` threads those that a quota keeps busy, at least one; 0 = no limit.
int within_quota(int n, double quota);

// Of `n` cores those that this process may run on, all of the time.
int usable_cores(int n);

} // namespace superllama
