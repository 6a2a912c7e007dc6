// The text behind superllama_last_error(): one per thread.
#pragma once

#include <string>

namespace superllama {

void set_error(const std::string & text);
const char * error_text(); // valid until the next call of set_error() in this thread

} // namespace superllama
