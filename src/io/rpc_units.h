// In which parts weights go to an RPC server that has them in files of its own. Both sides count alike: what a client
// names by its hash is what a server has looked through.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace superllama {

const size_t rpc_unit_bytes = 4u << 20;  // of a unit at most; units begin where their slice of a tensor does
const size_t rpc_unit_least = 16u << 10; // below, the bytes themselves are sent sooner than a hash is answered

// Of a message beside its data, at most: the command and its length, the tensor, where in it; and of an answer to it.
const size_t rpc_message_bytes = 321;
const size_t rpc_answer_bytes = 9;

// Experts come one by one: each matrix of a tensor of several is a slice.
inline size_t rpc_slices(const ggml_tensor * t) {
    const auto n = (size_t) (t->ne[2] * t->ne[3]);
    return n > 1 && ggml_nbytes(t) % n == 0 && ggml_nbytes(t) / n >= rpc_unit_least ? n : 1;
}

} // namespace superllama
