// Sizes in the messages of a model's budget.
#pragma once

#include <cmath>
#include <cstdint>

namespace superllama {

static const double MiB = 1024.0 * 1024.0;

// The least that works is rounded up: what a message names has to work as typed.
static inline double mib_up(uint64_t bytes) {
    return std::ceil((double) bytes / MiB);
}

} // namespace superllama
