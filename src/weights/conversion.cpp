// Buffer types of the CPU whose kernels want weights in a layout of their own (CPU_REPACK, AMX, KleidiAI): known by
// what they do, not by name. One of them can be streamed where rows are converted in groups, one after the other, so
// that a block, or a part of it, is converted by itself.

#include "weights/store_impl.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <set>

namespace superllama {

ggml_tensor rows_of(const ggml_tensor * t, size_t file_bytes) {
    ggml_tensor rows = *t;
    rows.ne[1] = (int64_t) (file_bytes / ggml_row_size(t->type, t->ne[0]));
    rows.ne[2] = rows.ne[3] = 1;
    rows.nb[2] = rows.nb[3] = rows.nb[1] * (size_t) rows.ne[1];
    return rows;
}

size_t memory_of(const ggml_tensor * t, ggml_backend_buffer_type_t buft, size_t file_bytes) {
    if (file_bytes == 0) {
        return 0;
    }
    const ggml_tensor rows = rows_of(t, file_bytes);
    return ggml_backend_buft_get_alloc_size(buft, &rows);
}

bool is_of_cpu(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    return dev != nullptr && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool keeps_layout(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    return buft == ggml_backend_cpu_buffer_type() || (dev != nullptr && buft == ggml_backend_dev_host_buffer_type(dev));
}

size_t bytes_of(const ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    size_t bytes = 0;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, t), ggml_backend_buft_get_alignment(buft));
    }
    return bytes;
}

// The bytes that a conversion of random weights makes, `step` rows at a time; empty where their sizes do not add up.
static std::vector<uint8_t> convert(const ggml_tensor * like, ggml_backend_buffer_type_t buft, int64_t n_rows,
                                    int64_t step) {
    const ggml_context_ptr ctx(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), like->type, like->ne[0], n_rows);
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    if (buffer == nullptr) {
        return {};
    }
    std::mt19937 random(1);
    std::vector<uint8_t> weights(ggml_nbytes(t));
    std::generate(weights.begin(), weights.end(), [&random] { return (uint8_t) random(); });

    const size_t memory = ggml_backend_buft_get_alloc_size(buft, t);
    memset(t->data, 0, memory);
    const size_t row = ggml_row_size(t->type, t->ne[0]);
    for (int64_t i = 0; i < n_rows; i += step) {
        ggml_tensor rows = rows_of(t, (size_t) step * row);
        const size_t at = memory_of(t, buft, (size_t) i * row);
        if (at + memory_of(t, buft, (size_t) step * row) > memory) {
            return {};
        }
        rows.data = (uint8_t *) t->data + at;
        buffer->iface.set_tensor(buffer.get(), &rows, weights.data() + (size_t) i * row, 0, (size_t) step * row);
    }
    const auto * made = (const uint8_t *) t->data;
    return std::vector<uint8_t>(made, made + memory);
}

bool converts_by_rows(const ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    if (!is_of_cpu(buft)) {
        return false;
    }
    std::set<std::pair<ggml_type, int64_t>> seen;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        if (!seen.insert({ t->type, t->ne[0] }).second) {
            continue;
        }
        const int64_t n_rows = 2 * group_rows;
        const auto whole = convert(t, buft, n_rows, n_rows);
        const auto in_groups = convert(t, buft, n_rows, group_rows);
        const size_t n_groups = (size_t) ggml_nrows(t) / (size_t) group_rows;
        const size_t row = ggml_row_size(t->type, t->ne[0]);
        const bool adds_up =
            (size_t) ggml_nrows(t) % (size_t) group_rows != 0 ||
            ggml_backend_buft_get_alloc_size(buft, t) == n_groups * memory_of(t, buft, (size_t) group_rows * row);
        if (whole.empty() || whole != in_groups || !adds_up) {
            LLAMA_LOG_WARN("superllama: weights of type %s in buffers of type %s cannot be streamed: they are not "
                           "converted row by row; they are all resident, and count\n",
                           ggml_type_name(t->type), ggml_backend_buft_name(buft));
            return false;
        }
    }
    return true;
}

} // namespace superllama
