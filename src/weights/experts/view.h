// A tensor of experts in parts.
#pragma once

#include "ggml.h"

#include <cstdint>

namespace superllama {

// So many experts of a tensor that has its place.
inline ggml_tensor experts_in(const ggml_tensor & t, int64_t first, int64_t n) {
    ggml_tensor some = t;
    some.ne[2] = n;
    some.nb[3] = (size_t) n * some.nb[2];
    some.data = (uint8_t *) t.data + (size_t) first * t.nb[2];
    return some;
}

} // namespace superllama
