// How fast bytes are on this machine, as far as placement asks: to a card, and within the host's memory.
#pragma once

#include "ggml-backend.h"

#include <cstddef>

namespace superllama {

// From page-locked memory, so many bytes at a time; 0: not known.
double upload_bytes_per_s(ggml_backend_dev_t device, size_t bytes);
// Read by threads on half of the processors. Measured once in a process, in a buffer of that size; 0: that could not
// be.
double memory_bytes_per_s(size_t buffer_bytes);

// The speed of the way there, of that of the memory: what decides whether experts that a token chose and a device lacks
// are sent there, or computed where they are. SUPERLLAMA_EXPERTS says it instead: a number, or send or stay; throws
// where it says anything else. That may be used to find out: `device_bytes` there, `buffer_bytes` here.
double link_share(ggml_backend_dev_t device, size_t device_bytes, size_t buffer_bytes);

} // namespace superllama
