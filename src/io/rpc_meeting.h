// The first words of an RPC connection, beyond upstream's: what a server says of itself in a byte of its HELLO that
// upstream leaves zero, and what a client makes of it.
#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <functional>
#include <string>

namespace superllama {

enum rpc_feature : uint8_t {
    RPC_FEATURE_WEIGHTS = 1, // it has files with weights: anything of rpc_unit_least bytes is worth asking for by hash
};

// ------------------------------------------------------------------------------------------------ a client

// A handshake with the server at this endpoint, whose HELLO is then met in it.
bool rpc_handshake(const std::string & endpoint, const std::function<bool()> & hello);

void rpc_remember(uint8_t features); // of the server of this thread's handshake

// Within a handshake: whether a server that says this of itself is to be used.
template <class Socket>
bool meet_server(Socket &, uint8_t features) {
    rpc_remember(features);
    return true;
}

// From how many bytes on a weight is asked for by hash.
size_t rpc_hash_threshold(const std::string & endpoint, size_t upstream);

// What the backend answers when it is asked for functions by name, for us; null where the name is none of ours.
void * rpc_function(const char * name, bool (*lost)(ggml_backend_t));

// ------------------------------------------------------------------------------------------------ a server

// Before a server takes clients: looks through its files. False where what it was given is of no use, which is said.
bool rpc_begin_to_serve();

uint8_t rpc_own_features();

// A client's HELLO is answered by `send`, and says what this server is. False: the connection ends.
template <class Socket, class Answer, class Send>
bool admit_client(Socket &, Answer & answer, const Send & send) {
    answer.padding = rpc_own_features();
    return send();
}

} // namespace superllama
