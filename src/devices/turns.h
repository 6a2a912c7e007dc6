// ggml's backends are for one thread at a time, and two may want those of a context: its own, and one that moves layers
// and waits for what was begun there. With Vulkan, two that wait at once take each other's signal. How they wait is
// device_wait's.
#pragma once

#include "ggml-backend.h"

#include <vector>

namespace superllama {

// While it lives, calls of these backends, whoever makes them, are made one after the other.
class backend_turns {
  public:
    explicit backend_turns(const std::vector<ggml_backend_t> & backends);
    ~backend_turns();
    backend_turns(const backend_turns &) = delete;
    backend_turns & operator=(const backend_turns &) = delete;

  private:
    std::vector<ggml_backend_t> taken;
};

} // namespace superllama
