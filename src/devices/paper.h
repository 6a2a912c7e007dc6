// Devices on paper: what an RPC server with so much memory would be to the library, without a server. They have sizes
// and no memory, take every operation and compute none; a plan places layers on them.
#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <memory>
#include <vector>

namespace superllama {

class paper_devices {
  public:
    explicit paper_devices(size_t n);
    ~paper_devices(); // after every model and context on them

    size_t size() const { return entries.size(); }
    ggml_backend_dev_t device(size_t i) const;
    std::vector<ggml_backend_dev_t> list() const; // with a null at its end, as llama_model_params has it

  private:
    struct entry;
    std::vector<std::unique_ptr<entry>> entries;
};

} // namespace superllama
