#include "io/rpc_serving.h"

#include "base/assert_guard.h"
#include "ggml-impl.h"
#include "io/rpc_messages.h"

#include <cstring>
#include <exception>

namespace superllama {

// The files in which a message is taken apart and bytes are copied: this thread alone is there.
static bool takes_messages_apart(const char * file) {
    return strcmp(file, "ggml-rpc.cpp") == 0 || strcmp(file, "ggml-backend.cpp") == 0;
}

void rpc_serve(const std::function<void()> & serve) {
    try {
        const assert_guard guard("a message contradicts itself", takes_messages_apart);
        serve();
    } catch (const std::exception & e) {
        GGML_LOG_ERROR("RPC: the connection of %s ends: %s\n", rpc_client_name(), e.what());
    }
}

} // namespace superllama
