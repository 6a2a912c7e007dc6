#include "devices/paper.h"

#include "ggml-backend-impl.h"

#include <string>

namespace superllama {

struct paper_devices::entry {
    std::string name;
    ggml_backend_reg reg;
    ggml_backend_device device;
    ggml_backend_buffer_type buft;
};

// A place that nothing is ever read from or written to: buffers begin there.
static void * const nowhere = (void *) (uintptr_t) 4096;

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_i none = {};
    none.get_base = [](ggml_backend_buffer_t) { return nowhere; };
    none.memset_tensor = [](ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t) {};
    none.set_tensor = [](ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {};
    none.get_tensor = [](ggml_backend_buffer_t, const ggml_tensor *, void *, size_t, size_t) {};
    none.clear = [](ggml_backend_buffer_t, uint8_t) {};
    return ggml_backend_buffer_init(buft, none, nullptr, size);
}

// What upstream's client of RPC answers, of a server that computes with its processor.
paper_devices::paper_devices(size_t n) {
    for (size_t i = 0; i < n; ++i) {
        entries.push_back(std::make_unique<entry>());
        entry & e = *entries.back();
        e.name = "node" + std::to_string(i);

        e.buft = {};
        e.buft.iface.get_name = [](ggml_backend_buffer_type_t buft) { return ((entry *) buft->context)->name.c_str(); };
        e.buft.iface.alloc_buffer = alloc_buffer;
        e.buft.iface.get_alignment = [](ggml_backend_buffer_type_t) {
            return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
        };
        e.buft.device = &e.device;
        e.buft.context = &e;

        e.reg = {};
        e.reg.api_version = GGML_BACKEND_API_VERSION;
        e.reg.iface.get_name = [](ggml_backend_reg_t) { return "paper"; };
        e.reg.iface.get_device_count = [](ggml_backend_reg_t) { return (size_t) 1; };
        e.reg.iface.get_device = [](ggml_backend_reg_t reg, size_t) -> ggml_backend_dev_t {
            return &((entry *) reg->context)->device;
        };
        e.reg.context = &e;

        e.device = {};
        ggml_backend_device_i & d = e.device.iface;
        d.get_name = [](ggml_backend_dev_t dev) { return ((entry *) dev->context)->name.c_str(); };
        d.get_description = d.get_name;
        d.get_memory = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; };
        d.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
        d.get_props = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
            *props = {};
            props->name = props->description = ((entry *) dev->context)->name.c_str();
            props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
            props->caps.async = true;
            props->caps.events = true;
        };
        d.init_backend = [](ggml_backend_dev_t dev, const char *) -> ggml_backend_t {
            static ggml_guid guid = { 0x73, 0x75, 0x70, 0x65, 0x72, 0x6c, 0x6c, 0x61,
                                      0x6d, 0x61, 0x70, 0x61, 0x70, 0x65, 0x72, 0x00 };
            auto * backend = new ggml_backend{};
            backend->guid = &guid;
            backend->device = dev;
            backend->iface.get_name = [](ggml_backend_t b) { return ggml_backend_dev_name(b->device); };
            backend->iface.free = [](ggml_backend_t b) { delete b; };
            backend->iface.synchronize = [](ggml_backend_t) {};
            backend->iface.graph_compute = [](ggml_backend_t, ggml_cgraph *) { return GGML_STATUS_FAILED; };
            backend->iface.event_record = [](ggml_backend_t, ggml_backend_event_t) {};
            backend->iface.event_wait = [](ggml_backend_t, ggml_backend_event_t) {};
            return backend;
        };
        d.get_buffer_type = [](ggml_backend_dev_t dev) { return &((entry *) dev->context)->buft; };
        d.supports_op = [](ggml_backend_dev_t, const ggml_tensor *) { return true; };
        d.supports_buft = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
            return buft == &((entry *) dev->context)->buft;
        };
        d.event_new = [](ggml_backend_dev_t dev) { return new ggml_backend_event{ dev, nullptr }; };
        d.event_free = [](ggml_backend_dev_t, ggml_backend_event_t event) { delete event; };
        d.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t) {};
        e.device.reg = &e.reg;
        e.device.context = &e;
    }
}

paper_devices::~paper_devices() = default;

ggml_backend_dev_t paper_devices::device(size_t i) const {
    return &entries[i]->device;
}

std::vector<ggml_backend_dev_t> paper_devices::list() const {
    std::vector<ggml_backend_dev_t> devices;
    for (size_t i = 0; i < size(); ++i) {
        devices.push_back(device(i));
    }
    devices.push_back(nullptr);
    return devices;
}

} // namespace superllama
