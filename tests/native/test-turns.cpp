// Backends that two threads call are called by one at a time, and are as they were when the turns are over.

#include "devices/turns.h"

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

// What a backend that is for one thread at a time would take harm from; no atomics, so that ThreadSanitizer sees it
// too.
struct calls {
    int inside = 0;
    int most = 0;
    int n = 0;
};

static void called(ggml_backend_t backend) {
    auto & c = *(calls *) backend->context;
    c.most = std::max(c.most, ++c.inside);
    c.n++;
    std::this_thread::yield();
    c.inside--;
}

static void synchronize(ggml_backend_t backend) {
    called(backend);
}

static ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph *) {
    called(backend);
    return GGML_STATUS_SUCCESS;
}

// Of the one that gets the copy: who gives it may be the processor, which has no turns.
static bool copy(ggml_backend_t from, ggml_backend_t to, const ggml_tensor *, ggml_tensor *) {
    CHECK(from != to);
    called(to);
    return true;
}

static ggml_backend_device device_of_type(enum ggml_backend_dev_type (*type)(ggml_backend_dev_t)) {
    ggml_backend_device device = {};
    device.iface.get_type = type;
    return device;
}

int main() {
    ggml_backend_device card = device_of_type([](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; });
    ggml_backend_device host = device_of_type([](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_CPU; });
    calls counted;
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(ggml_init({ 1 << 20, nullptr, true }), ggml_free);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_backend backend = {}, processor = {};
    backend.device = &card;
    backend.context = &counted;
    backend.iface.synchronize = synchronize;
    backend.iface.graph_compute = graph_compute;
    backend.iface.cpy_tensor_async = copy;
    processor.device = &host;
    processor.iface.graph_compute = graph_compute;
    {
        const superllama::backend_turns turns({ &backend, &processor });
        CHECK(processor.iface.graph_compute == graph_compute);
        CHECK(backend.iface.get_tensor_async == nullptr); // what a backend cannot do, it still cannot
        std::atomic<int> ready{ 0 };
        const auto work = [&](bool computes) {
            for (ready++; ready < 2;) {
            }
            for (int i = 0; i < 2000; ++i) {
                if (computes) {
                    CHECK(backend.iface.graph_compute(&backend, graph) == GGML_STATUS_SUCCESS);
                    CHECK(backend.iface.cpy_tensor_async(&processor, &backend, nullptr, nullptr));
                } else {
                    backend.iface.synchronize(&backend);
                }
            }
        };
        std::thread other(work, false);
        work(true);
        other.join();
    }
    CHECK(counted.n == 6000);
    CHECK(counted.most == 1);
    CHECK(backend.iface.synchronize == synchronize && backend.iface.cpy_tensor_async == copy);
    printf("ok\n");
    return 0;
}
