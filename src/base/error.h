// The text behind superllama_last_error(): one per thread.
#pragma once

#include <exception>
#include <string>

namespace superllama {

void set_error(const char * text);                   // or that there is no memory for it; throws nothing
void keep_text(std::string & in, const char * text); // the same
const char * error_text();                           // valid until the next call of set_error() in this thread

inline void set_error(const std::string & text) {
    set_error(text.c_str());
}

// Whether `work` ran without an exception; the text of one becomes the last error. For the C API and destructors, which
// none may leave. Allocates nothing.
template <typename F>
bool tried(const F & work) {
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

} // namespace superllama
