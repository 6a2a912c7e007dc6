#include "devices/lost.h"

namespace superllama {

using backend_lost = bool (*)(ggml_backend_t);

static backend_lost question(ggml_backend_reg_t reg) {
    return (backend_lost) ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_lost");
}

static backend_lost question(ggml_backend_t backend) {
    return question(ggml_backend_dev_backend_reg(ggml_backend_get_device(backend)));
}

bool may_be_lost(ggml_backend_t backend) {
    return question(backend) != nullptr;
}

bool is_lost(ggml_backend_t backend) {
    const backend_lost lost = question(backend);
    return lost != nullptr && lost(backend);
}

void survive_lost_devices() {
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        if (const backend_lost lost = question(ggml_backend_reg_get(i))) {
            lost(nullptr);
        }
    }
}

} // namespace superllama
