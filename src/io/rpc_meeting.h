// The first words of an RPC connection, beyond upstream's: what a server says of itself in a byte of its HELLO that
// upstream leaves zero, and what a client makes of it; a secret that both know.
#pragma once

#include "ggml-backend.h"
#include "io/rpc_link.h"
#include "io/rpc_secret.h"

#include <cstdint>
#include <functional>
#include <string>

namespace superllama {

enum rpc_feature : uint8_t {
    RPC_FEATURE_WEIGHTS = 1, // it has files with weights: anything of rpc_unit_least bytes is worth asking for by hash
    RPC_FEATURE_SECRET = 2,  // a proof follows, see rpc_secret.cpp
};

// With a secret, the version that others understand is one that nobody has: they end with an error at once.
const uint8_t rpc_version_with_secret = 0x80;

template <class Socket>
rpc_wire wire_of(Socket & socket) {
    return { [&socket](const void * data, size_t bytes) { return socket.send_data(data, bytes) && socket.flush(); },
             [&socket](void * data, size_t bytes) { return socket.recv_data(data, bytes); } };
}

// ------------------------------------------------------------------------------------------------ a client

// A handshake with the server at this endpoint, whose HELLO is then met in it.
bool rpc_handshake(const std::string & endpoint, const std::function<bool()> & hello);

// What follows a HELLO that says `features`; makes the version one that can be compared. "" or what is wrong.
std::string rpc_meet(const std::string & endpoint, const rpc_wire & wire, uint8_t features, uint8_t & version);

bool rpc_meet_now(const rpc_wire & wire, uint8_t features, uint8_t & version); // in this thread's handshake

// Within a handshake: whether the server that answered so is to be used.
template <class Socket, class Answer>
bool meet_server(Socket & socket, Answer & answer) {
    return rpc_meet_now(wire_of(socket), answer.padding, answer.major);
}

// The way to a server, as it was when the server became known.
struct rpc_link_speed {
    double round_trip_s;
    double bytes_per_s; // to it
};
void rpc_set_link_speed(const std::string & endpoint, const rpc_link_speed & speed);

// From how many bytes on a weight is asked for by hash.
size_t rpc_hash_threshold(const std::string & endpoint, size_t upstream);

// "superllama_rpc_crossing_s": seconds that so many bytes take to a device's server, and an answer back; 0: not
// measured.
using rpc_crossing_s = double (*)(ggml_backend_dev_t device, double bytes);

// What the backend answers when it is asked for functions by name, for us; null where the name is none of ours.
void * rpc_function(const char * name, bool (*lost)(ggml_backend_t));

// "superllama_rpc_secret": the file of the secret for a server, or for all that have none of their own (null); without
// a file it is forgotten. Null, or what is wrong, which is there until the thread asks again.
using rpc_set_secret = const char * (*) (const char * endpoint, const char * path);

// ------------------------------------------------------------------------------------------------ a server

// Before a server takes clients, for these devices: reads its secret, looks through its files. False where what it was
// given is of no use, which is said.
bool rpc_begin_to_serve(ggml_backend_dev_t * devices, size_t n_devices);

uint8_t rpc_own_features();

bool rpc_challenge(const rpc_wire & wire); // whether this client knows the secret; where not, the log says who

// A client's HELLO is answered by `send`, and says what this server is. False: the connection ends.
template <class Socket, class Answer, class Send>
bool admit_client(Socket & socket, Answer & answer, const Send & send) {
    answer.padding = rpc_own_features();
    const bool secret = (answer.padding & RPC_FEATURE_SECRET) != 0;
    answer.major = (uint8_t) (answer.major | (secret ? rpc_version_with_secret : 0));
    const bool admitted = send() && (!secret || rpc_challenge(wire_of(socket)));
    rpc_wait(rpc_waits::for_commands);
    return admitted;
}

} // namespace superllama
