// fopen() of files that no child process inherits.
#pragma once

#include <cstdio>
#include <string>

namespace superllama {

// `mode` is one letter of fopen()'s.
inline FILE * open_stream(const std::string & path, char mode) {
#ifdef _WIN32
    const char text[] = { mode, 'N', 0 };
#else
    const char text[] = { mode, 'e', 0 };
#endif
    return fopen(path.c_str(), text);
}

} // namespace superllama
