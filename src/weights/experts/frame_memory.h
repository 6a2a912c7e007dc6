// Where frames of experts lie: side by side, memory comes and goes at the end.
#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace superllama {

class frame_memory {
  public:
    virtual ~frame_memory() = default;

    virtual uint8_t * at(size_t i) const = 0;
    virtual void grow(size_t i) = 0;   // all before frame i have memory. Throws where there is none
    virtual void shrink(size_t i) = 0; // frame i is the last

    // Pages of this process's own; or, with a buffer type of a device for host memory, what that device reads well,
    // which is page-locked where the system allows it, and comes in slabs. Throws where there is no address space.
    static std::unique_ptr<frame_memory> create(size_t frame_bytes, size_t n_max, ggml_backend_buffer_type_t locked);
    // Of memory, at most, that frames have taken and do not fill.
    static size_t slack(size_t frame_bytes, size_t n_max, bool locked);
};

} // namespace superllama
