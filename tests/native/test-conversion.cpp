// Which buffer types of the CPU can be streamed: known by what their conversion does, with types that this test makes.

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "llama-impl.h"
#include "weights/store_impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

using namespace superllama;

void llama_log_internal(ggml_log_level, const char *, ...) {} // of libllama, which is not linked

// What a conversion does with the rows that it is given; `rows` is where they go.
using conversion = void (*)(uint8_t * rows, const uint8_t * data, size_t n_rows, size_t row);

struct type_of_test {
    conversion convert;
    size_t extra_per_row;
    size_t extra;
};

static size_t alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * t) {
    const auto & self = *(const type_of_test *) buft->context;
    return (size_t) ggml_nrows(t) * (ggml_row_size(t->type, t->ne[0]) + self.extra_per_row) + self.extra;
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = [](ggml_backend_buffer_t b) { free(b->context); };
    iface.get_base = [](ggml_backend_buffer_t b) { return b->context; };
    iface.set_tensor = [](ggml_backend_buffer_t b, ggml_tensor * t, const void * data, size_t, size_t) {
        const auto & self = *(const type_of_test *) b->buft->context;
        self.convert((uint8_t *) t->data, (const uint8_t *) data, (size_t) ggml_nrows(t),
                     ggml_row_size(t->type, t->ne[0]));
    };
    return ggml_backend_buffer_init(buft, iface, aligned_alloc(64, (size + 63) / 64 * 64), size);
}

static bool can_be_streamed(type_of_test what, ggml_type type, int64_t n_rows) {
    ggml_backend_buffer_type buft = {};
    buft.iface.get_name = [](ggml_backend_buffer_type_t) { return "test"; };
    buft.iface.alloc_buffer = alloc_buffer;
    buft.iface.get_alignment = [](ggml_backend_buffer_type_t) { return (size_t) 64; };
    buft.iface.get_alloc_size = alloc_size;
    buft.device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    buft.context = &what;
    const ggml_context_ptr ctx(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
    ggml_new_tensor_2d(ctx.get(), type, 256, n_rows);
    return converts_by_rows(ctx.get(), &buft);
}

static void backwards(uint8_t * rows, const uint8_t * data, size_t n_rows, size_t row) {
    for (size_t i = 0; i < n_rows; ++i) {
        std::reverse_copy(data + i * row, data + (i + 1) * row, rows + i * row);
    }
}

static void in_sixteens(uint8_t * rows, const uint8_t * data, size_t n_rows, size_t row) {
    for (size_t i = 0; i < n_rows; i += 16) { // bytes of 16 rows take turns
        for (size_t k = 0; k < row * 16; ++k) {
            rows[i * row + k] = data[i * row + k % 16 * row + k / 16];
        }
    }
}

static void transposed(uint8_t * rows, const uint8_t * data, size_t n_rows, size_t row) {
    for (size_t i = 0; i < n_rows; ++i) {
        for (size_t k = 0; k < row; ++k) {
            rows[k * n_rows + i] = data[i * row + k];
        }
    }
}

static void with_sums(uint8_t * rows, const uint8_t * data, size_t n_rows, size_t row) {
    for (size_t i = 0; i < n_rows; ++i) { // four bytes more for each row
        uint8_t * to = rows + i * (row + 4);
        memcpy(to, data + i * row, row);
        memset(to + row, data[i * row] ^ data[i * row + row - 1], 4);
    }
}

int main() {
    CHECK(can_be_streamed({ backwards, 0, 0 }, GGML_TYPE_F32, 64));
    CHECK(can_be_streamed({ backwards, 0, 0 }, GGML_TYPE_Q4_0, 96));
    CHECK(can_be_streamed({ in_sixteens, 0, 0 }, GGML_TYPE_Q8_0, 1024));
    CHECK(can_be_streamed({ with_sums, 4, 0 }, GGML_TYPE_Q4_K, 128)); // larger than in the file, as AMX
    CHECK(!can_be_streamed({ transposed, 0, 0 }, GGML_TYPE_F32, 64)); // a part of it cannot be converted alone
    CHECK(!can_be_streamed({ backwards, 0, 64 }, GGML_TYPE_F32, 64)); // a head: sizes do not add up

    // a type of another device is not the host's to stream
    const ggml_context_ptr ctx(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
    ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 256, 64);
    ggml_backend_buffer_type elsewhere = {};
    CHECK(!converts_by_rows(ctx.get(), &elsewhere));
    CHECK(!keeps_layout(&elsewhere));

    // but what a device offers for weights on the host is plain memory
    static ggml_backend_buffer_type locked = {};
    ggml_backend_device device = {};
    device.iface.get_host_buffer_type = [](ggml_backend_dev_t) { return &locked; };
    locked.device = elsewhere.device = &device;
    CHECK(keeps_layout(&locked) && keeps_layout(ggml_backend_cpu_buffer_type()));
    CHECK(!keeps_layout(&elsewhere));
    printf("ok\n");
}
