#include "context/piecewise.h"

#include "ggml-cpp.h"
#include "ggml-impl.h"
#include "weights/scheduler.h"

#include <algorithm>
#include <cstring>

namespace superllama {

ggml_status piecewise::multiply(ggml_backend_t backend, const ggml_tensor * node, const weight_piece & piece) {
    const int64_t n_tokens = ggml_nrows(node);
    auto * out = (float *) node->data + piece.first_row;
    if (n_tokens == 1) {
        return multiply_rows(backend, node, piece.data, piece.n_rows, out);
    }
    const auto part_max = (int64_t) (piece_result_bytes / sizeof(float)); // the store counts them
    const int64_t step = std::max<int64_t>(1, part_max / n_tokens / group_rows) * group_rows;
    for (int64_t first = 0; first < piece.n_rows; first += step) {
        const int64_t n_rows = std::min(step, piece.n_rows - first);
        part.resize((size_t) (n_rows * n_tokens));
        const uint8_t * matrix = piece.data + (size_t) (first / group_rows) * piece.group_bytes;
        const ggml_status status = multiply_rows(backend, node, matrix, n_rows, part.data());
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        for (int64_t t = 0; t < n_tokens; ++t) {
            memcpy(out + t * node->ne[0] + first, part.data() + t * n_rows, (size_t) n_rows * sizeof(float));
        }
    }
    return GGML_STATUS_SUCCESS;
}

// The node as a graph of its own, with other rows and another place for its result.
ggml_status piecewise::multiply_rows(ggml_backend_t backend, const ggml_tensor * node, const uint8_t * matrix,
                                     int64_t n_rows, float * result) const {
    const ggml_context_ptr ctx(ggml_init({ ggml_graph_overhead_custom(1, false), nullptr, true }));
    ggml_tensor rows = *node->src[0];
    rows.data = const_cast<uint8_t *>(matrix);
    rows.ne[1] = n_rows;
    rows.nb[2] = rows.nb[3] = rows.nb[1] * (size_t) n_rows;
    ggml_tensor input = *node->src[1];
    input.op = GGML_OP_NONE; // it is computed already
    std::fill(std::begin(input.src), std::end(input.src), nullptr);
    ggml_tensor product = *node;
    product.flags |= GGML_TENSOR_FLAG_COMPUTE;
    product.src[0] = &rows;
    product.src[1] = &input;
    product.data = result;
    product.ne[0] = n_rows;
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        product.nb[i] = product.nb[i - 1] * (size_t) product.ne[i - 1];
    }
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 1, false);
    ggml_graph_add_node(gf, &product);
    return ggml_backend_graph_compute(backend, gf);
}

} // namespace superllama
