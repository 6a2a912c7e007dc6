// How many cores this process may keep busy: more threads than that only wait for each other.
#pragma once

#include <string>

namespace superllama {

// CPUs' time that its cgroups allow, by the tightest limit; 0 = no limit. `root` as in find_cgroup().
double cpu_quota(const std::string & root = "");

// Of `n` cores those that this process may run on, all of the time.
int usable_cores(int n);

} // namespace superllama
