// Who waits for a slow device waits for an event, which is recorded behind copies and graphs that compute something,
// and not behind graphs that only view.

#include "devices/device_wait.h"

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml.h"

#include <chrono>
#include <memory>
#include <thread>

static const std::chrono::milliseconds slow(40); // an eighth of it is long, too

struct calls {
    int n_recorded = 0;
    int n_slept = 0; // for the event
    int n_synchronized = 0;
};

static calls counted;

static void synchronize(ggml_backend_t) {
    counted.n_synchronized++;
    std::this_thread::sleep_for(slow);
}

static ggml_backend_event_t new_event(ggml_backend_dev_t device) {
    return new ggml_backend_event{ device, nullptr };
}

static ggml_backend_device device_with(bool events) {
    ggml_backend_device device = {};
    device.iface.event_new = events ? new_event : nullptr;
    device.iface.event_free = [](ggml_backend_dev_t, ggml_backend_event_t event) { delete event; };
    device.iface.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t) { counted.n_slept++; };
    return device;
}

static ggml_backend backend_of(ggml_backend_device & device) {
    ggml_backend backend = {};
    backend.device = &device;
    backend.iface.event_record = [](ggml_backend_t, ggml_backend_event_t) { counted.n_recorded++; };
    return backend;
}

int main() {
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(ggml_init({ 1 << 20, nullptr, true }), ggml_free);
    ggml_tensor * x = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 4);
    ggml_cgraph * work = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(work, ggml_add(ctx.get(), x, x));
    ggml_cgraph * views = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(views, ggml_view_1d(ctx.get(), x, 2, 0));

    ggml_backend_device card = device_with(true);
    ggml_backend backend = backend_of(card);
    {
        superllama::device_wait wait;
        wait.begin(&backend, work);
        CHECK(counted.n_recorded == 0); // nobody knows yet how long that takes
        wait.wait(&backend, synchronize);
        CHECK(counted.n_slept == 0 && counted.n_synchronized == 1);

        wait.begin(&backend, work);
        CHECK(counted.n_recorded == 1);
        wait.wait(&backend, synchronize);
        CHECK(counted.n_slept == 1 && counted.n_synchronized == 2);
        wait.wait(&backend, synchronize); // nothing has begun since
        CHECK(counted.n_slept == 1 && counted.n_synchronized == 3);

        wait.begin(&backend, views);
        wait.wait(&backend, synchronize);
        CHECK(counted.n_recorded == 1 && counted.n_slept == 1 && counted.n_synchronized == 4);

        wait.begin(&backend); // copies
        wait.wait(&backend, synchronize);
        CHECK(counted.n_recorded == 2 && counted.n_slept == 2 && counted.n_synchronized == 5);
    }

    ggml_backend_device eventless = device_with(false);
    ggml_backend server = backend_of(eventless);
    counted = {};
    superllama::device_wait wait;
    for (int i = 0; i < 3; ++i) {
        wait.begin(&server, work);
        wait.wait(&server, synchronize);
    }
    CHECK(counted.n_recorded == 0 && counted.n_slept == 0 && counted.n_synchronized == 3);
    printf("ok\n");
    return 0;
}
