#include "base/error.h"

#include <new>

namespace superllama {

static thread_local std::string last_error;

void keep_text(std::string & in, const char * text) {
    try {
        in = text;
    } catch (const std::bad_alloc &) {
        in = "out of memory"; // so short that it needs none
    }
}

void set_error(const char * text) {
    keep_text(last_error, text);
}

const char * error_text() {
    return last_error.c_str();
}

} // namespace superllama
