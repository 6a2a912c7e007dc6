// RPC servers as the devices of a test.
#pragma once

#include "ggml-backend-impl.h"

// A large batch goes to the device, and the weights that it needs are copied there for it.
inline bool computes_with_host_weights(ggml_backend_dev_t, const ggml_tensor * op) {
    return (op->op == GGML_OP_MUL_MAT && op->ne[1] >= 32) || (op->op == GGML_OP_MUL_MAT_ID && op->ne[2] >= 32);
}

inline void add_rpc_device(const char * endpoint) {
    using add_server = ggml_backend_reg_t (*)(const char *);
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    ggml_backend_reg_t server =
        ((add_server) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"))(endpoint);
    ggml_backend_register(server);
    for (size_t d = 0; d < ggml_backend_reg_dev_count(server); ++d) { // as GPUs do
        ggml_backend_reg_dev_get(server, d)->iface.offload_op = computes_with_host_weights;
    }
}
