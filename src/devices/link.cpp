#include "devices/link.h"

#include "llama-model.h"

namespace superllama {

size_t token_state_bytes(const llama_model & model) {
    return 2 * sizeof(float) * model.hparams.n_embd;
}

double crossing_s(ggml_backend_dev_t device, size_t bytes) {
    using rpc_crossing_s = double (*)(ggml_backend_dev_t device, double bytes);
    const auto of_rpc = (rpc_crossing_s) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device),
                                                                           "superllama_rpc_crossing_s");
    return of_rpc != nullptr ? of_rpc(device, (double) bytes) : 0;
}

} // namespace superllama
