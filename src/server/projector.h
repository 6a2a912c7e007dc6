// The projector of a server, which makes tokens of images and sounds: upstream loads it beside the model, and its
// memory lies in the model's budget.
#pragma once

#include <cstdint>
#include <string>

struct common_params;

namespace superllama {

// What a projector takes of the host's memory: its weights, and the buffers of the image that mtmd warms it up with.
// Throws std::runtime_error where the file cannot be read.
uint64_t projector_bytes(const common_params & params);

// Before the model is loaded, in each load of it: the budget has to hold both.
void count_projector(common_params & params);

} // namespace superllama
