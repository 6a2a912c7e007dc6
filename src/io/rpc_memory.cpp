#include "io/rpc_memory.h"

#include "ggml-backend-impl.h"
#include "telemetry/memory.h"

namespace superllama {

static void memory_of_processor(ggml_backend_dev_t, size_t * free, size_t * total) {
    static const memory_telemetry telemetry; // one thread serves clients
    const struct superllama_memory memory = telemetry.sample();
    *free = (size_t) memory.host_available;
    *total = (size_t) memory.host_total;
}

void rpc_tell_memory(ggml_backend_dev_t device) {
    const bool is_processor = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    if (is_processor && device == ggml_backend_reg_dev_get(device->reg, 0)) { // not a program's own device, which knows
        device->iface.get_memory = memory_of_processor;
    }
}

} // namespace superllama
