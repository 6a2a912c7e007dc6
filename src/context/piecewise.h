// A product with a matrix of which one piece is in memory at a time. Every number of it is that of the whole product:
// rows of a matrix are multiplied for themselves.
#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

namespace superllama {

struct weight_piece;

// The part of a MUL_MAT node that rows of its matrix make, computed where the node would have been.
class piecewise {
  public:
    ggml_status multiply(ggml_backend_t backend, const ggml_tensor * node, const weight_piece & piece);

  private:
    ggml_status multiply_rows(ggml_backend_t backend, const ggml_tensor * node, const uint8_t * matrix, int64_t n_rows,
                              float * result) const;

    std::vector<float> part; // of several tokens: kernels want their results side by side
};

} // namespace superllama
