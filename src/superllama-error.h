// The text behind superllama_last_error(): one per thread.
#pragma once

#include <string>

void superllama_set_error(const std::string & text);
