// Plain upload bandwidth of an RPC device: 8 MiB at a time into a buffer of its own. Prints bytes per second.
//
//   upload HOST:PORT [MiB]

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: upload HOST:PORT [MiB]\n");
        return 2;
    }
    const size_t total = (size_t) (argc > 2 ? atoi(argv[2]) : 256) << 20;
    const size_t step = 8u << 20;
    ggml_backend_load_all();
    using add_server = ggml_backend_reg_t (*)(const char *);
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    ggml_backend_reg_t server =
        ((add_server) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"))(argv[1]);
    ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(ggml_backend_reg_dev_get(server, 0));

    ggml_context * ctx = ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true });
    ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, (int64_t) total);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
    const std::vector<char> data(step, 1);
    double best = 0;
    for (int round = 0; round < 5; ++round) {
        const auto begin = std::chrono::steady_clock::now();
        for (size_t first = 0; first < total; first += step) {
            ggml_backend_tensor_set(t, data.data(), first, std::min(step, total - first));
        }
        char last = 0;
        ggml_backend_tensor_get(t, &last, total - 1, 1); // all of it has arrived
        best = std::max(best, (double) total /
                                  std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
        ggml_backend_buffer_clear(buffer, 0);
    }
    printf("%.0f\n", best);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return 0;
}
