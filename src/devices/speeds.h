// How fast bytes are on this machine, as far as placement asks: to a card, and within the host's memory.
#pragma once

#include "ggml-backend.h"

#include <cstddef>

namespace superllama {

double upload_bytes_per_s(ggml_backend_dev_t device); // from page-locked memory; 0: not known
// Read by threads on half of the processors. Measured once in a process, in a buffer of that size; 0: that could not
// be.
double memory_bytes_per_s(size_t buffer_bytes);

// Whether experts that a token chose and a device lacks are sent there, or computed where they are. Sending pays where
// the link has two fifths of the memory's speed: of what is there a bank serves more than a placement of whole layers,
// so that with a quarter of the experts there a quarter of those chosen is missing, instead of three quarters.
// SUPERLLAMA_EXPERTS=send or stay decides otherwise; throws where it says anything else. `buffer_bytes`: that may be
// used to find out.
bool sends_experts(ggml_backend_dev_t device, size_t buffer_bytes);

} // namespace superllama
