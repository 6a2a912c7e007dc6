// Waiting for what a backend computes: asleep where that takes long. Of one thread at a time.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>

namespace superllama {

class device_wait {
  public:
    // After what it was just given: a graph, or copies.
    void begin(ggml_backend_t backend, ggml_cgraph * graph);
    void begin(ggml_backend_t backend);

    void wait(ggml_backend_t backend, void (*synchronize)(ggml_backend_t));

  private:
    ggml_backend_event_ptr event; // null: none was needed, or the device has none
    bool has_tried = false;       // to make it
    bool has_begun = false;       // something, since it was last waited for
    bool has_mark = false;        // the event comes after it
    int64_t usual_us = 0;         // that it takes
};

} // namespace superllama
