#include "io/temporary.h"

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#ifndef _WIN32
#    include <fcntl.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifndef _WIN32

static std::vector<std::string> candidates(const std::string & folder) {
    if (!folder.empty()) {
        return { folder };
    }
    const char * tmp = getenv("TMPDIR");
    return { tmp != nullptr && tmp[0] != '\0' ? tmp : "/tmp", "/var/tmp" };
}

static std::runtime_error cannot_make(const char * what, const std::string & folder) {
    return std::runtime_error(std::string("cannot make ") + what + " in " + folder + ": " + file_error(errno) +
                              "; name a folder that exists and is writable with --spill-dir");
}

static descriptor open_unnamed(const std::string & folder) {
#    ifdef O_TMPFILE
    const int fd = open_at(AT_FDCWD, folder.c_str(), O_TMPFILE | O_RDWR, 0600);
    if (fd >= 0) {
        return descriptor(fd);
    }
#    endif
    std::string path = folder + "/superllama-XXXXXX";
    const int named = mkostemp(&path[0], O_CLOEXEC); // mode 0600
    if (named >= 0) {
        unlink(path.c_str());
    }
    return descriptor(named);
}

descriptor unnamed_file(std::string & folder, const char * what) {
    descriptor file;
    for (const std::string & candidate : candidates(folder)) { // the last one decides where none is on a disk
        descriptor opened = open_unnamed(candidate);
        if (!file || (opened && !is_memory(opened.get()))) {
            folder = candidate;
            file = std::move(opened);
        }
        if (file && !is_memory(file.get())) {
            break;
        }
    }
    if (!file) {
        throw cannot_make(what, folder);
    }
    return file;
}

temporary_folder::temporary_folder(const std::string & folder, const char * what) {
    std::string chosen = folder;
    unnamed_file(chosen, what); // which of the folders can be written to, and is on a disk
    path = chosen + "/superllama-XXXXXX";
    if (mkdtemp(&path[0]) == nullptr) { // mode 0700
        throw cannot_make(what, chosen);
    }
}

#else // _WIN32

descriptor unnamed_file(std::string & folder, const char * what) {
    throw std::runtime_error(std::string(what) + " cannot be made on this system, in " + folder);
}

temporary_folder::temporary_folder(const std::string & folder, const char * what) {
    std::string chosen = folder;
    unnamed_file(chosen, what);
}

#endif

temporary_folder::~temporary_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
}

} // namespace superllama
