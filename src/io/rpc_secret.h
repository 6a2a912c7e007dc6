// A secret that RPC servers share with their clients: each side proves that it knows it, by HMAC-SHA256 of random
// numbers of both, and neither shows it. What follows is not encrypted.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace superllama {

using rpc_digest = std::array<uint8_t, 32>;

rpc_digest hmac_sha256(const std::string & key, const std::string & message);

// Takes as long wherever they differ.
bool same_digest(const rpc_digest & a, const rpc_digest & b);

// The content of a file without the line end that editors leave. Throws std::runtime_error where it cannot be read, or
// is so short that it could be guessed.
std::string read_rpc_secret(const std::string & path);

// A connection before anything but HELLO went over it. Both are false where it has ended.
struct rpc_wire {
    std::function<bool(const void *, size_t)> send;
    std::function<bool(void *, size_t)> receive;
};

// A client proves itself to a server that wants it, and the server to it. "" or what is wrong. With an empty secret
// the server is told that there is none.
std::string prove_to_server(const rpc_wire & wire, const std::string & secret);

// The other side of it. "" or why the client is refused; *left: it went away as one that only asked who is here.
std::string challenge_client(const rpc_wire & wire, const std::string & secret, bool * left);

} // namespace superllama
