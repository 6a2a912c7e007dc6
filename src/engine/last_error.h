// The text behind superllama_engine_error(): one per thread.
#pragma once

#include <string>

namespace superllama {

inline thread_local std::string engine_error;

} // namespace superllama
