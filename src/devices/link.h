// The ways to devices: those of RPC servers have a length, which was measured when the server became known.
#pragma once

#include "ggml-backend.h"

#include <cstddef>

struct llama_model;

namespace superllama {

// What crosses for a token that is computed in part on a device: its state there, and back.
size_t token_state_bytes(const llama_model & model);

// Seconds that so many bytes take on their way, with one round trip; 0: next to none.
double crossing_s(ggml_backend_dev_t device, size_t bytes);

} // namespace superllama
