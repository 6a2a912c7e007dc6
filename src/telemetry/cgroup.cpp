#include "telemetry/cgroup.h"

#include "base/stream.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace superllama {

std::string read_small_file(const std::string & path) {
    std::string text;
    FILE * file = open_stream(path, 'r');
    if (file == nullptr) {
        return text;
    }
    char buf[4096];
    for (size_t n; (n = fread(buf, 1, sizeof(buf), file)) > 0;) {
        text.append(buf, n);
    }
    fclose(file);
    return text;
}

uint64_t line_value(const std::string & text, const char * key, uint64_t fallback) {
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

static bool contains(const std::vector<std::string> & list, const std::string & entry) {
    return std::find(list.begin(), list.end(), entry) != list.end();
}

// The name of this process's group in the hierarchy of a controller (v1) and in the common one (v2).
static void read_names(const std::string & root, const std::string & controller, std::string * v1, std::string * v2) {
    for (const std::string & line : split(read_small_file(root + "/proc/self/cgroup"), '\n')) {
        const size_t a = line.find(':');
        const size_t b = a == std::string::npos ? a : line.find(':', a + 1);
        if (b == std::string::npos) {
            continue;
        }
        const std::string controllers = line.substr(a + 1, b - a - 1);
        if (controllers.empty()) {
            *v2 = line.substr(b + 1);
        } else if (contains(split(controllers, ','), controller)) {
            *v1 = line.substr(b + 1);
        }
    }
}

// /proc/self/cgroup names the group, /proc/self/mountinfo the folder. In a container the mount shows the group's own
// folder as its root, and the name is to be cut accordingly.
cgroup_path find_cgroup(const std::string & root, const std::string & controller) {
    std::string name_v1;
    std::string name_v2;
    read_names(root, controller, &name_v1, &name_v2);
    cgroup_path path = {};
    for (const std::string & line : split(read_small_file(root + "/proc/self/mountinfo"), '\n')) {
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) {
            continue;
        }
        const auto before = split(line.substr(0, dash), ' '); // id parent dev root mount-point options ...
        const auto after = split(line.substr(dash + 3), ' '); // type source super-options
        if (before.size() < 5 || after.size() < 3) {
            continue;
        }
        const bool v1 = after[0] == "cgroup" && contains(split(after[2], ','), controller);
        path.v2 = after[0] == "cgroup2" && name_v1.empty();
        if (!v1 && !path.v2) {
            continue;
        }
        const std::string & mount_root = before[3];
        std::string name = v1 ? name_v1 : name_v2;
        if (mount_root != "/" && name.compare(0, mount_root.size(), mount_root) == 0) {
            name = name.substr(mount_root.size());
        }
        for (;;) {
            while (!name.empty() && name.back() == '/') {
                name.pop_back();
            }
            path.folders.push_back(root + before[4] + name + "/");
            if (name.empty()) {
                return path;
            }
            name = name.substr(0, name.rfind('/'));
        }
    }
    return path;
}

} // namespace superllama
