#include "io/cache_folder.h"

#include <cstdlib>

#ifndef _WIN32
#    include <pwd.h>
#    include <unistd.h>
#endif

namespace superllama {

static std::string variable(const char * name) {
    const char * value = getenv(name);
    return value != nullptr ? value : "";
}

#ifdef _WIN32

std::vector<cache_place> cache_places() {
    if (!variable("SUPERLLAMA_CACHE").empty()) {
        return { { variable("SUPERLLAMA_CACHE"), true } };
    }
    if (variable("LOCALAPPDATA").empty()) {
        return {};
    }
    return { { variable("LOCALAPPDATA") + "\\superllama\\Cache", false } };
}

#else

static bool is_absolute(const std::string & path) {
    return !path.empty() && path[0] == '/';
}

// As the environment has it, else as the system's list of users does; "" where neither knows a whole path.
static std::string home() {
    const std::string named = variable("HOME");
    if (is_absolute(named)) {
        return named;
    }
    std::vector<char> text(16384);
    struct passwd entry = {};
    struct passwd * found = nullptr;
    if (getpwuid_r(geteuid(), &entry, text.data(), text.size(), &found) != 0 || found == nullptr ||
        found->pw_dir == nullptr || !is_absolute(found->pw_dir)) {
        return "";
    }
    return found->pw_dir;
}

// What somebody wrote where no shell expands it.
static std::string expanded(const std::string & path) {
    if (path != "~" && path.compare(0, 2, "~/") != 0) {
        return path;
    }
    const std::string user = home();
    return user.empty() ? "" : user + path.substr(1);
}

std::vector<cache_place> cache_places() {
    const std::string named = expanded(variable("SUPERLLAMA_CACHE"));
    if (!named.empty()) {
        return { { named, true } };
    }
    std::vector<cache_place> places;
#    ifdef __APPLE__
    const std::string in_home = "/Library/Caches";
    const std::string own;
#    else
    const std::string in_home = "/.cache";
    const std::string own = variable("XDG_CACHE_HOME");
#    endif
    if (is_absolute(own)) {
        places.push_back({ own + "/superllama", false });
    } else if (!home().empty()) {
        places.push_back({ home() + in_home + "/superllama", false });
    }
    const std::string temporary = is_absolute(variable("TMPDIR")) ? variable("TMPDIR") : "/tmp";
    places.push_back({ temporary + "/superllama-" + std::to_string(geteuid()), false });
    return places;
}

#endif

} // namespace superllama
