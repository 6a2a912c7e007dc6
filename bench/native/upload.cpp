// Plain upload bandwidth of a device. For every line on standard input four uploads from memory of this process, which
// is page-locked where the device has such memory: in messages of 8 MiB and of 256 KiB, each into a buffer that is
// there and was written before, then into buffers of the given size that are allocated now and freed afterwards, as
// layers are. Prints bytes per second of each.
//
//   upload MiB BUFFER_BYTES [HOST:PORT]

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

using clock_type = std::chrono::steady_clock;

static const size_t large_step = 8u << 20;
static const size_t small_step = 256u << 10;

static double rate(size_t bytes, clock_type::time_point begin) {
    return (double) bytes / std::chrono::duration<double>(clock_type::now() - begin).count();
}

static void send(ggml_tensor * t, const char * data, size_t step) {
    for (size_t first = 0; first < ggml_nbytes(t); first += step) {
        ggml_backend_tensor_set(t, data + first, first, std::min(step, ggml_nbytes(t) - first));
    }
}

static void wait_for(const ggml_tensor * t) { // all of it has arrived
    char last = 0;
    ggml_backend_tensor_get(t, &last, ggml_nbytes(t) - 1, 1);
}

static double upload(ggml_tensor * t, const char * data, size_t step) {
    const auto begin = clock_type::now();
    send(t, data, step);
    wait_for(t);
    return rate(ggml_nbytes(t), begin);
}

static double upload_fresh(ggml_backend_buffer_type_t buft, const char * data, size_t bytes, size_t buffer_bytes,
                           size_t step) {
    struct piece {
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buffer;
    };
    std::vector<piece> pieces;
    const auto begin = clock_type::now();
    ggml_tensor * t = nullptr;
    for (size_t first = 0; first + buffer_bytes <= bytes; first += buffer_bytes) {
        ggml_context * ctx = ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true });
        t = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, (int64_t) buffer_bytes);
        pieces.push_back(
            { ggml_context_ptr(ctx), ggml_backend_buffer_ptr(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft)) });
        send(t, data + first, step);
    }
    wait_for(t);
    return rate(pieces.size() * buffer_bytes, begin);
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: upload MiB BUFFER_BYTES [HOST:PORT]\n");
        return 2;
    }
    ggml_backend_load_all();
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (argc > 3) {
        using add_server = ggml_backend_reg_t (*)(const char *);
        ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
        dev = ggml_backend_reg_dev_get(
            ((add_server) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"))(argv[3]), 0);
    }
    if (dev == nullptr) {
        fprintf(stderr, "upload: no GPU; name an RPC server\n");
        return 1;
    }
    const size_t bytes = (size_t) atoi(argv[1]) << 20;
    const size_t buffer_bytes = std::min<size_t>(bytes, strtoull(argv[2], nullptr, 10));
    ggml_backend_buffer_type_t locked = ggml_backend_dev_host_buffer_type(dev);
    ggml_backend_buffer_ptr host(
        ggml_backend_buft_alloc_buffer(locked != nullptr ? locked : ggml_backend_cpu_buffer_type(), bytes));
    if (host == nullptr) {
        fprintf(stderr, "upload: no %zu MiB of host memory\n", bytes >> 20);
        return 1;
    }
    ggml_backend_buffer_clear(host.get(), 1);
    const char * data = (const char *) ggml_backend_buffer_get_base(host.get());
    ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(dev);
    ggml_context * ctx = ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true });
    ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, (int64_t) bytes);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
    if (buffer == nullptr) {
        fprintf(stderr, "upload: no %zu MiB on the device\n", bytes >> 20);
        return 1;
    }
    ggml_backend_buffer_clear(buffer, 0);
    while (getchar() != EOF) {
        const double large = upload(t, data, large_step);
        const double small = upload(t, data, small_step);
        // those that count take memory that was freed a moment ago, as moves do
        upload_fresh(buft, data, bytes, buffer_bytes, small_step);
        const double large_fresh = upload_fresh(buft, data, bytes, buffer_bytes, large_step);
        const double small_fresh = upload_fresh(buft, data, bytes, buffer_bytes, small_step);
        printf("%.0f %.0f %.0f %.0f\n", large, small, large_fresh, small_fresh);
        fflush(stdout);
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return 0;
}
