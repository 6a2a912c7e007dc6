#include "devices/lost.h"

namespace superllama {

using backend_lost = bool (*)(ggml_backend_t);

static bool ask(ggml_backend_reg_t reg, ggml_backend_t backend) {
    const auto lost = (backend_lost) ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_lost");
    return lost != nullptr && lost(backend);
}

bool is_lost(ggml_backend_t backend) {
    return ask(ggml_backend_dev_backend_reg(ggml_backend_get_device(backend)), backend);
}

void survive_lost_devices() {
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        ask(ggml_backend_reg_get(i), nullptr);
    }
}

} // namespace superllama
