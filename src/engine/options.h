// The flags of superllama-server as parameters, where a wrong one is an error and not the end of the process.
#pragma once

#include "common.h"

#include <string>
#include <vector>

namespace superllama {

// Throws std::invalid_argument that names the flag.
common_params params_of(const std::vector<std::string> & arguments);

// One line for each flag: its names, "=" after those that take a value.
std::string list_of_flags();

} // namespace superllama
