// What goes to a device by way of page-locked memory arrives, at any place and of any size. The device is the
// processor.

#include "devices/locked_staging.h"

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml-cpp.h"

#include <cstring>
#include <random>
#include <vector>

using namespace superllama;

int main() {
    ggml_backend_device device = {};
    device.iface.get_name = [](ggml_backend_dev_t) { return "device"; };
    device.iface.get_host_buffer_type = [](ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); };
    const auto staging = locked_staging::create(&device);
    CHECK(staging != nullptr);

    ggml_backend_device none = device;
    none.iface.get_host_buffer_type = nullptr;
    CHECK(locked_staging::create(&none) == nullptr);

    const size_t most = 5 * locked_staging::half_bytes() / 2;
    ggml_context_ptr ctx(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, (int64_t) most);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    std::vector<uint8_t> data(most), expected(most);
    std::mt19937 random(5);
    for (uint8_t & b : data) {
        b = (uint8_t) random();
    }
    memset(t->data, 0, most);
    for (int round = 0; round < 40; ++round) {
        const size_t at = round == 0 ? 0 : random() % most;
        const size_t bytes = round == 0 ? most : random() % (round % 2 == 0 ? 10000 : most - at) % (most - at);
        const size_t from = random() % (most - bytes + 1);
        staging->send(t, at, data.data() + from, bytes);
        memcpy(expected.data() + at, data.data() + from, bytes);
        CHECK(memcmp(t->data, expected.data(), most) == 0);
    }
    printf("ok\n");
    return 0;
}
