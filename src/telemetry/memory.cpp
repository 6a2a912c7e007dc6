// Why not psutil or a library: the sample is taken between ubatches in C++, and has to honour cgroups.

#include "telemetry/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#    include <fcntl.h>
#    include <sys/resource.h>
#    include <unistd.h>
#elif defined(__APPLE__)
#    include <mach/mach.h>
#    include <sys/resource.h>
#    include <sys/sysctl.h>
#elif defined(_WIN32)
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <windows.h>
// after windows.h
#    include <psapi.h>
#endif

namespace superllama {

std::vector<device_memory> device_memory_sample(const std::vector<ggml_backend_dev_t> & devices) {
    std::vector<device_memory> result;
    for (ggml_backend_dev_t dev : devices) {
        device_memory mem = { 0, 0 };
        ggml_backend_dev_memory(dev, &mem.free, &mem.total);
        result.push_back(mem);
    }
    return result;
}

#if defined(__linux__)

// ------------------------------------------------------------------------------------------------- Linux

// The whole of a small file of /proc or /sys; "" where it cannot be read.
static std::string read_file(const std::string & path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return "";
    }
    std::string text;
    char buf[4096];
    for (ssize_t n; (n = read(fd, buf, sizeof(buf))) > 0;) {
        text.append(buf, (size_t) n);
    }
    close(fd);
    return text;
}

// The number after `key` at the beginning of a line; `fallback` where there is no such line.
static uint64_t line_value(const std::string & text, const char * key, uint64_t fallback = 0) {
    const size_t len = strlen(key);
    for (size_t pos = 0; pos < text.size();) {
        if (text.compare(pos, len, key) == 0) {
            return strtoull(text.c_str() + pos + len, nullptr, 10);
        }
        pos = text.find('\n', pos);
        pos = pos == std::string::npos ? text.size() : pos + 1;
    }
    return fallback;
}

static std::vector<std::string> split(const std::string & text, char separator) {
    std::vector<std::string> parts;
    for (size_t pos = 0; pos <= text.size();) {
        const size_t end = std::min(text.find(separator, pos), text.size());
        parts.push_back(text.substr(pos, end - pos));
        pos = end + 1;
    }
    return parts;
}

memory_telemetry::memory_telemetry(std::string root) : root(std::move(root)) {
    find_cgroups();
}

// Which files hold the limits: /proc/self/cgroup names the group, /proc/self/mountinfo the folder.
// In a container the mount shows the group's own folder as its root, and the name is to be cut accordingly.
void memory_telemetry::find_cgroups() {
    std::string name_v1;
    std::string name_v2;
    for (const std::string & line : split(read_file(root + "/proc/self/cgroup"), '\n')) {
        const size_t a = line.find(':');
        const size_t b = a == std::string::npos ? a : line.find(':', a + 1);
        if (b == std::string::npos) {
            continue;
        }
        const std::string controllers = line.substr(a + 1, b - a - 1);
        if (controllers.empty()) {
            name_v2 = line.substr(b + 1);
        } else {
            for (const std::string & controller : split(controllers, ',')) {
                if (controller == "memory") {
                    name_v1 = line.substr(b + 1);
                }
            }
        }
    }

    for (const std::string & line : split(read_file(root + "/proc/self/mountinfo"), '\n')) {
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) {
            continue;
        }
        const auto before = split(line.substr(0, dash), ' '); // id parent dev root mount-point options ...
        const auto after = split(line.substr(dash + 3), ' '); // type source super-options
        if (before.size() < 5 || after.size() < 3) {
            continue;
        }
        const bool v1 = after[0] == "cgroup" && ("," + after[2] + ",").find(",memory,") != std::string::npos;
        const bool v2 = after[0] == "cgroup2" && name_v1.empty();
        if (!v1 && !v2) {
            continue;
        }
        const std::string & mount_root = before[3];
        std::string name = v1 ? name_v1 : name_v2;
        if (mount_root != "/" && name.compare(0, mount_root.size(), mount_root) == 0) {
            name = name.substr(mount_root.size());
        }
        // the group and its parents, each of which may set the tightest limit
        for (;;) {
            while (!name.empty() && name.back() == '/') {
                name.pop_back();
            }
            const std::string dir = root + before[4] + name + "/";
            if (v1) {
                cgroups.push_back({ dir + "memory.limit_in_bytes", dir + "memory.usage_in_bytes", dir + "memory.stat",
                                    "total_inactive_file " });
            } else {
                cgroups.push_back(
                    { dir + "memory.max", dir + "memory.current", dir + "memory.stat", "inactive_file " });
            }
            if (name.empty()) {
                break;
            }
            name = name.substr(0, name.rfind('/'));
        }
        break;
    }

    // levels without a readable limit file (the root of v2) say nothing, now or later
    cgroups.erase(std::remove_if(cgroups.begin(), cgroups.end(),
                                 [](const cgroup_level & level) { return access(level.limit.c_str(), R_OK) != 0; }),
                  cgroups.end());
}

struct superllama_memory memory_telemetry::sample() const {
    struct superllama_memory m = {};

    const std::string meminfo = read_file(root + "/proc/meminfo");
    m.machine_total = line_value(meminfo, "MemTotal:") * 1024;
    m.machine_available = line_value(meminfo, "MemAvailable:") * 1024;
    m.swap_total = line_value(meminfo, "SwapTotal:") * 1024;
    m.swap_free = line_value(meminfo, "SwapFree:") * 1024;

    m.host_total = m.machine_total;
    m.host_available = m.machine_available;

    uint64_t tightest_left = UINT64_MAX;
    for (const cgroup_level & level : cgroups) {
        const std::string text = read_file(level.limit);
        const uint64_t limit = strtoull(text.c_str(), nullptr, 10); // "max" reads as 0
        if (limit == 0 || limit >= m.machine_total) {
            continue; // v1 writes "no limit" as a number near 2^63
        }
        const uint64_t usage = strtoull(read_file(level.usage).c_str(), nullptr, 10);
        const uint64_t inactive = line_value(read_file(level.stat), level.inactive_key.c_str());
        const uint64_t used = usage - std::min(usage, inactive);
        const uint64_t left = limit - std::min(limit, used);
        m.host_total = std::min(m.host_total, limit);
        m.host_available = std::min(m.host_available, left);
        if (left < tightest_left) {
            tightest_left = left;
            m.cgroup_limit = limit;
            m.cgroup_used = used;
        }
    }

    // statm: size resident shared(file + shmem) ..., in pages
    const uint64_t page = (uint64_t) sysconf(_SC_PAGESIZE);
    unsigned long size = 0, resident = 0, shared = 0;
    if (sscanf(read_file(root + "/proc/self/statm").c_str(), "%lu %lu %lu", &size, &resident, &shared) == 3) {
        m.resident = resident * page;
        m.resident_file = shared * page;
        m.resident_anon = m.resident - std::min(m.resident, m.resident_file);
    }

    m.read_bytes = line_value(read_file(root + "/proc/self/io"), "read_bytes:");

    struct rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    m.resident_peak = (uint64_t) usage.ru_maxrss * 1024;
    m.faults_minor = (uint64_t) usage.ru_minflt;
    m.faults_major = (uint64_t) usage.ru_majflt;

    struct rlimit locked = {};
    getrlimit(RLIMIT_MEMLOCK, &locked);
    m.locked_limit = locked.rlim_cur == RLIM_INFINITY ? UINT64_MAX : (uint64_t) locked.rlim_cur;

    return m;
}

#elif defined(__APPLE__)

// ------------------------------------------------------------------------------------------------- macOS

memory_telemetry::memory_telemetry(std::string root) : root(std::move(root)) {}

struct superllama_memory memory_telemetry::sample() const {
    struct superllama_memory m = {};

    size_t len = sizeof(m.machine_total);
    sysctlbyname("hw.memsize", &m.machine_total, &len, nullptr, 0);

    vm_statistics64_data_t vm = {};
    mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;
    if (host_statistics64(mach_host_self(), HOST_VM_INFO64, (host_info64_t) &vm, &count) == KERN_SUCCESS) {
        const uint64_t pages = (uint64_t) vm.free_count + vm.inactive_count + vm.purgeable_count;
        m.machine_available = pages * vm_kernel_page_size;
    }

    struct xsw_usage swap = {};
    len = sizeof(swap);
    if (sysctlbyname("vm.swapusage", &swap, &len, nullptr, 0) == 0) {
        m.swap_total = swap.xsu_total;
        m.swap_free = swap.xsu_avail;
    }

    task_vm_info_data_t task = {};
    count = TASK_VM_INFO_COUNT;
    if (task_info(mach_task_self(), TASK_VM_INFO, (task_info_t) &task, &count) == KERN_SUCCESS) {
        m.resident = task.resident_size;
        m.resident_anon = task.internal;
        m.resident_file = task.external;
        m.resident_peak = task.resident_size_peak;
    }

    struct rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    m.faults_minor = (uint64_t) usage.ru_minflt;
    m.faults_major = (uint64_t) usage.ru_majflt;

    m.host_total = m.machine_total;
    m.host_available = m.machine_available;
    m.locked_limit = UINT64_MAX;
    return m;
}

#elif defined(_WIN32)

// ----------------------------------------------------------------------------------------------- Windows

memory_telemetry::memory_telemetry(std::string root) : root(std::move(root)) {}

struct superllama_memory memory_telemetry::sample() const {
    struct superllama_memory m = {};

    MEMORYSTATUSEX status = {};
    status.dwLength = sizeof(status);
    if (GlobalMemoryStatusEx(&status)) {
        m.machine_total = status.ullTotalPhys;
        m.machine_available = status.ullAvailPhys;
        m.swap_total = status.ullTotalPageFile - std::min(status.ullTotalPageFile, status.ullTotalPhys);
        m.swap_free = status.ullAvailPageFile - std::min(status.ullAvailPageFile, status.ullAvailPhys);
    }

    PROCESS_MEMORY_COUNTERS counters = {};
    if (K32GetProcessMemoryInfo(GetCurrentProcess(), &counters, sizeof(counters))) {
        m.resident = counters.WorkingSetSize;
        m.resident_anon = counters.PagefileUsage;
        m.resident_peak = counters.PeakWorkingSetSize;
        m.faults_minor = counters.PageFaultCount; // Windows does not tell soft from hard faults
    }

    IO_COUNTERS io = {};
    if (GetProcessIoCounters(GetCurrentProcess(), &io)) {
        m.read_bytes = io.ReadTransferCount;
    }

    m.host_total = m.machine_total;
    m.host_available = m.machine_available;
    m.locked_limit = UINT64_MAX;
    return m;
}

#else

memory_telemetry::memory_telemetry(std::string root) : root(std::move(root)) {}

struct superllama_memory memory_telemetry::sample() const {
    return {};
}

#endif

} // namespace superllama
