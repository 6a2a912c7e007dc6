#include "base/error.h"

namespace superllama {

static thread_local std::string last_error;

void set_error(const std::string & text) {
    last_error = text;
}

const char * error_text() {
    return last_error.c_str();
}

} // namespace superllama
