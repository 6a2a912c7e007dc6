// A sample of host and device memory, as this process may use it. Knows nothing of models.
#pragma once

#include "superllama.h"

#include <string>
#include <vector>

namespace superllama {

// Host memory. A sample costs some tens of microseconds; the object may be used by one thread at a time.
class memory_telemetry {
  public:
    // root is put before every path that is read: tests pass a folder with captured files
    explicit memory_telemetry(std::string root = "");

    struct superllama_memory sample() const;

  private:
    std::string root;

#ifdef __linux__
    // one level of the cgroup hierarchy that has a memory limit to look at
    struct cgroup_level {
        std::vector<std::string> limits; // file paths; the least of them holds
        std::string usage;
        std::string stat;
        std::string prefix; // of lines of `stat` that count the groups below too
    };
    std::vector<cgroup_level> cgroups; // from the process's own group up to the root
#endif
};

// Memory of devices that are not the CPU: ggml_backend_dev_memory() of each.
struct device_memory {
    size_t free;
    size_t total;
};
std::vector<device_memory> device_memory_sample(const std::vector<ggml_backend_dev_t> & devices);

} // namespace superllama
