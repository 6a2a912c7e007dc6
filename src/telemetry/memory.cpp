// Why not psutil or a library: the sample is taken between ubatches in C++, and has to honour cgroups.

#include "telemetry/memory.h"

#include "telemetry/cgroup.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
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

memory_telemetry::memory_telemetry(std::string root) : root(std::move(root)) {
    const cgroup_path path = find_cgroup(this->root, "memory");
    for (const std::string & folder : path.folders) {
        cgroup_level level = {};
        level.limits = path.v2 ? std::vector<std::string>{ folder + "memory.max", folder + "memory.high" }
                               : std::vector<std::string>{ folder + "memory.limit_in_bytes" };
        level.usage = folder + (path.v2 ? "memory.current" : "memory.usage_in_bytes");
        level.stat = folder + "memory.stat";
        level.prefix = path.v2 ? "" : "total_";
        if (access(level.limits[0].c_str(), R_OK) == 0) { // the root of v2 has none
            cgroups.push_back(level);
        }
    }
}

struct superllama_memory memory_telemetry::sample() const {
    struct superllama_memory m = {};

    const std::string meminfo = read_small_file(root + "/proc/meminfo");
    m.machine_total = line_value(meminfo, "MemTotal:") * 1024;
    m.machine_available = line_value(meminfo, "MemAvailable:") * 1024;
    m.swap_total = line_value(meminfo, "SwapTotal:") * 1024;
    m.swap_free = line_value(meminfo, "SwapFree:") * 1024;

    if (m.machine_total == 0 && root.empty()) { // no /proc: what is free, page cache left out
        const auto page = (uint64_t) sysconf(_SC_PAGESIZE);
        m.machine_total = (uint64_t) sysconf(_SC_PHYS_PAGES) * page;
        m.machine_available = (uint64_t) sysconf(_SC_AVPHYS_PAGES) * page;
    }
    m.host_total = m.machine_total;
    m.host_available = m.machine_available;

    uint64_t tightest_left = UINT64_MAX;
    for (const cgroup_level & level : cgroups) {
        uint64_t limit = m.machine_total;
        for (const std::string & file : level.limits) { // v1 writes "no limit" as a number near 2^63, v2 as "max"
            const uint64_t bytes = strtoull(read_small_file(file).c_str(), nullptr, 10);
            limit = bytes > 0 ? std::min(limit, bytes) : limit;
        }
        if (limit >= m.machine_total) {
            continue;
        }
        // page cache goes before anything else does, what was read twice too; memory of tmpfs is no part of these lists
        const std::string stat = read_small_file(level.stat);
        const uint64_t cache = line_value(stat, (level.prefix + "inactive_file ").c_str()) +
                               line_value(stat, (level.prefix + "active_file ").c_str());
        const uint64_t usage = strtoull(read_small_file(level.usage).c_str(), nullptr, 10);
        const uint64_t used = usage - std::min(usage, cache);
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
    if (sscanf(read_small_file(root + "/proc/self/statm").c_str(), "%lu %lu %lu", &size, &resident, &shared) == 3) {
        m.resident = resident * page;
        m.resident_file = shared * page;
        m.resident_anon = m.resident - std::min(m.resident, m.resident_file);
    }

    m.read_bytes = line_value(read_small_file(root + "/proc/self/io"), "read_bytes:");

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
