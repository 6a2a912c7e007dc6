#include "devices/device_wait.h"

namespace superllama {

// Backends look all the time whether a device is done. That is the sooner known, and takes a processor from whoever
// computes meanwhile: other programs, or the device itself where it is one with the processor. To be woken takes some
// fifty microseconds, which is little of so long a wait.
static const int64_t asleep_min_us = 4000;

void device_wait::wait(ggml_backend_t backend) {
    const int64_t t_begin_us = ggml_time_us();
    if (usual_us >= asleep_min_us && !has_tried) {
        event.reset(ggml_backend_event_new(ggml_backend_get_device(backend)));
        has_tried = true;
    }
    if (usual_us >= asleep_min_us && event != nullptr) {
        ggml_backend_event_record(event.get(), backend);
        ggml_backend_event_synchronize(event.get());
    }
    ggml_backend_synchronize(backend); // also ends what a backend does by itself after a wait
    usual_us += (ggml_time_us() - t_begin_us - usual_us) / 8;
}

} // namespace superllama
