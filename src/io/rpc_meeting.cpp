#include "io/rpc_meeting.h"

#include "ggml-impl.h"
#include "io/rpc_link.h"
#include "io/rpc_memory.h"
#include "io/rpc_messages.h"
#include "io/rpc_units.h"
#include "io/rpc_weights.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
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
    std::map<std::string, rpc_link_speed> links;
    std::map<std::string, std::string> secrets; // by endpoint; "": of all others
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
    rpc_wait(rpc_waits::for_answers); // of whatever this thread asks next
    return ok;
}

static std::string secret_for(const std::string & endpoint) {
    const std::lock_guard<std::mutex> lock(servers().mutex);
    const auto & secrets = servers().secrets;
    const auto own = secrets.find(endpoint);
    const auto found = own != secrets.end() ? own : secrets.find("");
    return found != secrets.end() ? found->second : "";
}

std::string rpc_meet(const std::string & endpoint, const rpc_wire & wire, uint8_t features, uint8_t & version) {
    const std::string secret = secret_for(endpoint);
    if ((features & RPC_FEATURE_SECRET) != 0) {
        version = (uint8_t) (version & ~rpc_version_with_secret);
        const std::string why = prove_to_server(wire, secret);
        if (!why.empty()) {
            return why;
        }
    } else if (!secret.empty()) {
        return "it asks for no secret, and one was given here: it is not used, for it could be anybody; start the "
               "server "
               "with the same secret";
    }
    const std::lock_guard<std::mutex> lock(servers().mutex);
    servers().features[endpoint] = features;
    return "";
}

bool rpc_meet_now(const rpc_wire & wire, uint8_t features, uint8_t & version) {
    const std::string why = rpc_meet(met != nullptr ? *met : "", wire, features, version);
    if (!why.empty()) {
        GGML_LOG_ERROR("RPC server %s: %s\n", met != nullptr ? met->c_str() : "", why.c_str());
    }
    return why.empty();
}

static const char * set_secret(const char * endpoint, const char * path) {
    static thread_local std::string error;
    try {
        const std::string secret = path != nullptr ? read_rpc_secret(path) : "";
        const std::lock_guard<std::mutex> lock(servers().mutex);
        servers().secrets.erase(endpoint != nullptr ? endpoint : "");
        if (!secret.empty()) {
            servers().secrets[endpoint != nullptr ? endpoint : ""] = secret;
        }
        return nullptr;
    } catch (const std::exception & e) {
        error = e.what();
        return error.c_str();
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

void rpc_set_link_speed(const std::string & endpoint, const rpc_link_speed & speed) {
    const std::lock_guard<std::mutex> lock(servers().mutex);
    servers().links[endpoint] = speed;
}

static double crossing_s(ggml_backend_dev_t device, double bytes) {
    const std::lock_guard<std::mutex> lock(servers().mutex);
    const auto it = servers().links.find(ggml_backend_dev_description(device));
    return it == servers().links.end() ? 0 : it->second.round_trip_s + bytes / it->second.bytes_per_s;
}

void * rpc_function(const char * name, bool (*lost)(ggml_backend_t)) {
    if (strcmp(name, "ggml_backend_rpc_lost") == 0) {
        return (void *) lost;
    }
    if (strcmp(name, "superllama_rpc_has_weights") == 0) {
        return (void *) device_has_weights;
    }
    if (strcmp(name, "superllama_rpc_crossing_s") == 0) {
        return (void *) (rpc_crossing_s) crossing_s;
    }
    if (strcmp(name, "superllama_rpc_secret") == 0) {
        return (void *) (rpc_set_secret) set_secret;
    }
    return nullptr;
}

// ------------------------------------------------------------------------------------------------ a server

static std::string own_secret; // set before clients are served, by one thread

bool rpc_begin_to_serve(ggml_backend_dev_t * devices, size_t n_devices) {
    try {
        if (const char * path = getenv("SUPERLLAMA_RPC_SECRET")) { // from the program's --rpc-secret
            own_secret = read_rpc_secret(path);
            printf("  shared secret  : %s\n", path);
        }
        rpc_open_weights();
        std::for_each(devices, devices + n_devices, rpc_tell_memory);
        return true;
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\n", e.what());
        return false;
    }
}

uint8_t rpc_own_features() {
    return (uint8_t) ((rpc_has_weights() ? RPC_FEATURE_WEIGHTS : 0) | (own_secret.empty() ? 0 : RPC_FEATURE_SECRET));
}

bool rpc_challenge(const rpc_wire & wire) {
    bool left = false;
    const std::string why = challenge_client(wire, own_secret, &left);
    if (!why.empty() && !left) {
        GGML_LOG_ERROR("RPC: a client at %s is refused: %s\n", rpc_client_name(), why.c_str());
    }
    return why.empty();
}

} // namespace superllama
