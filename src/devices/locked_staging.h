// Page-locked memory by way of which weights go to a device: from any other host memory devices read several times more
// slowly. One half is filled, by several threads, while the other is on its way.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "io/readers.h"

#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <vector>

namespace superllama {

class locked_staging {
  public:
    // Null where the device knows no host memory that it reads well, or there is none: then nothing is gained by it.
    static std::unique_ptr<locked_staging> create(ggml_backend_dev_t dev);

    static size_t half_bytes();
    static size_t memory_bytes() { return 2 * half_bytes(); }

    // Of one thread at a time. When it returns, all of it is there.
    void send(ggml_tensor * to, size_t at, const uint8_t * data, size_t bytes);

    uint8_t * half(int i) const { return (uint8_t *) ggml_backend_buffer_get_base(halves[i].get()); }

  private:
    locked_staging() = default;
    std::vector<std::future<void>> fill(int i, const uint8_t * data, size_t bytes); // each waits for a part of it

    ggml_backend_buffer_ptr halves[2];
    std::unique_ptr<readers> threads;
};

} // namespace superllama
