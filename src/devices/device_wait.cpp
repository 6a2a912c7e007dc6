#include "devices/device_wait.h"

#include "base/views.h"

namespace superllama {

// Backends look all the time whether a device is done. That is the sooner known, and takes a processor from whoever
// computes meanwhile: other programs, or the device itself where it is one with the processor. To be woken takes some
// fifty microseconds, which is little of so long a wait.
static const int64_t asleep_min_us = 4000;

static bool is_work(const ggml_tensor * node) {
    return !is_view(node) && !ggml_is_empty(node) && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
}

// Else nothing is to be waited for, and no mark is worth its submission.
static bool has_work(ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (is_work(ggml_graph_node(graph, i))) {
            return true;
        }
    }
    return false;
}

void device_wait::begin(ggml_backend_t backend, ggml_cgraph * graph) {
    if (has_work(graph)) {
        begin(backend);
    }
}

void device_wait::begin(ggml_backend_t backend) {
    has_begun = true;
    has_mark = false;
    if (usual_us < asleep_min_us) {
        return;
    }
    if (!has_tried) {
        event.reset(ggml_backend_event_new(ggml_backend_get_device(backend)));
        has_tried = true;
    }
    if (event != nullptr) {
        ggml_backend_event_record(event.get(), backend);
        has_mark = true;
    }
}

void device_wait::wait(ggml_backend_t backend, void (*synchronize)(ggml_backend_t)) {
    const int64_t t_begin_us = ggml_time_us();
    if (has_mark) {
        ggml_backend_event_synchronize(event.get());
    }
    synchronize(backend);
    if (has_begun) {
        usual_us += (ggml_time_us() - t_begin_us - usual_us) / 8;
    }
    has_begun = has_mark = false;
}

} // namespace superllama
