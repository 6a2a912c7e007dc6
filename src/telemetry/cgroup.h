// The control groups that this process is in, and what is written in small files of /proc and /sys.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace superllama {

struct cgroup_path {
    bool v2;
    std::vector<std::string> folders; // from the process's own group up to the root, each of which may set a limit
};

// Where the limits of one controller ("memory", "cpu") are; no folders where there are none. `root` is put before every
// path: tests pass a folder with captured files.
cgroup_path find_cgroup(const std::string & root, const std::string & controller);

// The whole of a small file; "" where it cannot be read.
std::string read_small_file(const std::string & path);

// The number after `key` at the beginning of a line; `fallback` where there is no such line.
uint64_t line_value(const std::string & text, const char * key, uint64_t fallback = 0);

} // namespace superllama
