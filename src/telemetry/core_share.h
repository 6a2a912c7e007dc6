// How many cores other processes leave to this one, while it computes.
//
// Kernels wait for each other after every node of a graph: where one of their threads has no core, all of them wait for
// its next time slice, and more threads compute less. So the threads follow the cores that are left.
#pragma once

#include "telemetry/cores.h"

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace superllama {

// What went on between two looks, in cores: 1.0 is one of them all the time.
struct core_use {
    int cores;     // that this process may run on
    double others; // kept busy by other processes, as far as they compute: the kernel's own work is not told apart
    double waited; // threads of this process that were ready, and had no core; below 0: not known
    double quota;  // CPUs' time that its cgroups allow; 0: no limit
};

// For how many threads there is a core. Fewer as soon as threads wait; more where it stayed quiet, so that a process
// that works now and then does not change it at every look.
class thread_rule {
  public:
    int next(const core_use & use);

  private:
    int n = 0; // 0: nothing was seen yet
    double free_before = 0;
};

class core_share {
  public:
    static core_share & of_process();

    // `root` as in find_cgroup().
    explicit core_share(const std::string & root = "") : root(root), groups(root) {}

    // Of `most` threads, those for which there is a core. To be asked before each graph: looks at most every 250 ms.
    int threads(int most);

    int64_t waited_us(); // threads of this process waited for a core, together, as long as threads() was asked
    int64_t throttled_us() const { return groups.throttled_us(); }

  private:
    struct look {
        int64_t t_us = 0;
        int cores = 0;     // 0: nothing is known
        double busy_s = 0; // of the cores, computing in any process
        double own_s = 0;
    };
    look take(int64_t now_us) const;
    double count_waits();

    std::mutex mutex;
    const std::string root;
    const cpu_groups groups;
    look last;
    thread_rule rule;
    int n_free = 0;                           // 0: not known
    std::map<std::string, uint64_t> waits_ns; // by thread
    uint64_t waited_ns = 0;
};

// How long each thread of this process was ready and had no core, since it began; empty where the kernel does not tell.
std::map<std::string, uint64_t> thread_waits_ns(const std::string & root = "");

} // namespace superllama
