#include "io/rpc_meeting.h"

#include "io/rpc_units.h"
#include "io/rpc_weights.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>

namespace superllama {

// ------------------------------------------------------------------------------------------------ a client

namespace {

struct known_servers {
    std::mutex mutex;
    std::map<std::string, uint8_t> features; // by endpoint, as it said last
};

known_servers & servers() {
    static auto * all = new known_servers; // outlives the threads that still talk when the process ends
    return *all;
}

thread_local const std::string * met = nullptr; // by the handshake of this thread

} // namespace

bool rpc_handshake(const std::string & endpoint, const std::function<bool()> & hello) {
    met = &endpoint;
    const bool ok = hello();
    met = nullptr;
    return ok;
}

void rpc_remember(uint8_t features) {
    if (met != nullptr) {
        const std::lock_guard<std::mutex> lock(servers().mutex);
        servers().features[*met] = features;
    }
}

static bool has_weights(const std::string & endpoint) {
    const std::lock_guard<std::mutex> lock(servers().mutex);
    const auto it = servers().features.find(endpoint);
    return it != servers().features.end() && (it->second & RPC_FEATURE_WEIGHTS) != 0;
}

size_t rpc_hash_threshold(const std::string & endpoint, size_t upstream) {
    return has_weights(endpoint) ? rpc_unit_least - 1 : upstream;
}

// The description of an RPC device is its server's endpoint.
static bool device_has_weights(ggml_backend_dev_t device) {
    return has_weights(ggml_backend_dev_description(device));
}

void * rpc_function(const char * name, bool (*lost)(ggml_backend_t)) {
    if (strcmp(name, "ggml_backend_rpc_lost") == 0) {
        return (void *) lost;
    }
    if (strcmp(name, "superllama_rpc_has_weights") == 0) {
        return (void *) device_has_weights;
    }
    return nullptr;
}

// ------------------------------------------------------------------------------------------------ a server

bool rpc_begin_to_serve() {
    try {
        rpc_open_weights();
        return true;
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\n", e.what());
        return false;
    }
}

uint8_t rpc_own_features() {
    return rpc_has_weights() ? RPC_FEATURE_WEIGHTS : 0;
}

} // namespace superllama
