// Waiting for what a device computes: asleep where that takes long.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>

namespace superllama {

class device_wait {
  public:
    // Until all that the backend was given is done; of what it has yet to be given, nothing is waiting.
    void wait(ggml_backend_t backend);

  private:
    ggml_backend_event_ptr event; // null: none was needed, or the device has none
    bool has_tried = false;       // to make it
    int64_t usual_us = 0;         // that a wait takes
};

} // namespace superllama
