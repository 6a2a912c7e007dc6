// Sockets of RPC peers with a limit to every wait: a peer that is gone, cut off, or stops in the middle of a message is
// an error after a time that is known. SUPERLLAMA_RPC_TIMEOUT is another number for answers, and the most of all.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace superllama {

const int rpc_connect_s = 5;    // until a connection is there
const int rpc_handshake_s = 10; // of a server: until a client has proven who it is; a client waits rpc_connect_s
const int rpc_answer_s = 600;   // until a server that computes begins to answer
const int rpc_silence_s = 30;   // in the middle of a message, and until a peer takes more of one
const int rpc_dead_s = 20;      // until a peer whose machine or network does not answer is given up (TCP)

// What the receives of this thread wait for. A server's thread has one client at a time, a client's thread one server.
enum class rpc_waits : uint8_t {
    for_answers,   // a client: the first word may take rpc_answer_s
    for_handshake, // either: all of it has one deadline, from now on
    for_commands,  // a server: as long as its client likes, where TCP says that it is there
};

void rpc_wait(rpc_waits what, int seconds = 0); // seconds: of a handshake

#ifdef _WIN32
using rpc_socket = uintptr_t;
#else
using rpc_socket = int;
#endif

// As send() and recv(), for upstream's loops around them: never 0 but at the end, and -1 after a time-out, when the log
// says which. `whole` is the length of what is received, where this is its beginning, else 0.
int64_t rpc_send(rpc_socket fd, const void * data, size_t bytes);
int64_t rpc_receive(rpc_socket fd, void * data, size_t bytes, size_t whole);

// Until poll() says `events` of a socket; false: not by then.
bool rpc_poll(rpc_socket fd, short events, std::chrono::steady_clock::time_point deadline);

// Connects a socket that does not wait. 0, or an error's number: ETIMEDOUT where it is not there by then.
int rpc_connect_by(rpc_socket fd, const void * address, size_t bytes, std::chrono::steady_clock::time_point deadline);

// As connect(); where it fails the socket is closed. A handshake is what comes next.
int rpc_connect_to(rpc_socket fd, const void * address, size_t bytes);

template <class Address>
int rpc_connect(rpc_socket fd, const Address & address) {
    return rpc_connect_to(fd, &address, sizeof(address));
}

// TCP notices that a peer's machine is gone, or the way to it; calls on this socket wait a second at most.
void rpc_watch(rpc_socket fd);

} // namespace superllama
