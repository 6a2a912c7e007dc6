#include "base/error.h"

#include <exception>

namespace superllama {

static thread_local std::string last_error;

void set_error(const std::string & text) {
    last_error = text;
}

bool tried(const std::function<void()> & work) {
    try {
        work();
        return true;
    } catch (const std::exception & e) {
        set_error(e.what());
    } catch (...) {
        set_error("unknown error");
    }
    return false;
}

const char * error_text() {
    return last_error.c_str();
}

} // namespace superllama
