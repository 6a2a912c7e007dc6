// The text behind superllama_last_error(): one per thread.
#pragma once

#include <functional>
#include <string>

namespace superllama {

void set_error(const std::string & text);
// Whether `work` ran without an exception; the text of one becomes the last error. For the C API, which none may leave.
bool tried(const std::function<void()> & work);
const char * error_text(); // valid until the next call of set_error() in this thread

} // namespace superllama
