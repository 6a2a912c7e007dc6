// An RPC server whose device has little memory and says how much is free; the processor alone says that all of it is.
//
//   limited-server PORT TOTAL_BYTES FILE
//
// FILE holds the bytes that "another program" has on the device; it is read whenever that matters. An allocation for
// which nothing is left fails, as on a card.

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-rpc.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <string>

static size_t total_bytes;
static std::string taken_path;
static std::atomic<size_t> own_bytes{ 0 };
static ggml_backend_device limited; // the processor, but for its memory
static ggml_backend_buffer_type limited_buft;

static size_t free_bytes() {
    std::ifstream file(taken_path);
    size_t taken = 0;
    file >> taken;
    return total_bytes - std::min(total_bytes, taken + own_bytes);
}

static void (*free_plain)(ggml_backend_buffer_t);

static void free_buffer(ggml_backend_buffer_t buffer) {
    own_bytes -= buffer->size;
    free_plain(buffer);
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    if (size > free_bytes()) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    CHECK(buffer != nullptr);
    free_plain = buffer->iface.free_buffer;
    buffer->iface.free_buffer = free_buffer;
    buffer->buft = buft;
    own_bytes += size;
    return buffer;
}

int main(int argc, char ** argv) {
    CHECK(argc == 4);
    total_bytes = strtoull(argv[2], nullptr, 10);
    taken_path = argv[3];

    ggml_backend_load_all();
    limited = *ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    limited.iface.get_memory = [](ggml_backend_dev_t, size_t * free, size_t * total) {
        *free = free_bytes();
        *total = total_bytes;
    };
    limited.iface.init_backend = [](ggml_backend_dev_t, const char *) {
        ggml_backend_t backend = ggml_backend_cpu_init();
        backend->device = &limited;
        return backend;
    };
    limited.iface.get_buffer_type = [](ggml_backend_dev_t) { return &limited_buft; };
    limited_buft = *ggml_backend_cpu_buffer_type();
    limited_buft.iface.alloc_buffer = alloc_buffer;
    limited_buft.device = &limited;

    ggml_backend_dev_t devices[] = { &limited };
    using start_server = decltype(ggml_backend_rpc_start_server) *;
    const auto start = (start_server) ggml_backend_reg_get_proc_address(ggml_backend_reg_by_name("RPC"),
                                                                        "ggml_backend_rpc_start_server");
    start(("127.0.0.1:" + std::string(argv[1])).c_str(), nullptr, 1, 1, devices);
    return 0;
}
