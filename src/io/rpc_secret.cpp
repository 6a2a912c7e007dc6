#include "io/rpc_secret.h"

extern "C" {
#include "hash/sha256/sha256.h"
}

#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#ifndef _WIN32
#    include "io/file.h"

#    include <cerrno>
#    include <fcntl.h>
#    include <sys/stat.h>
#    include <unistd.h>
#    ifdef __APPLE__
#        include <sys/random.h>
#    endif
#endif

namespace superllama {

rpc_digest hmac_sha256(const std::string & key, const std::string & message) {
    const auto hash = [](const std::string & first, const void * rest, size_t bytes) {
        rpc_digest digest = {};
        sha256_t state;
        sha256_init(&state);
        sha256_update(&state, (const unsigned char *) first.data(), first.size());
        sha256_update(&state, (const unsigned char *) rest, bytes);
        sha256_final(&state, digest.data());
        return digest;
    };
    const size_t block = 64;
    std::string padded = key;
    if (padded.size() > block) {
        const rpc_digest digest = hash("", padded.data(), padded.size());
        padded.assign((const char *) digest.data(), digest.size());
    }
    padded.resize(block);
    std::string inner = padded, outer = padded;
    for (size_t i = 0; i < block; ++i) {
        inner[i] = (char) (inner[i] ^ 0x36);
        outer[i] = (char) (outer[i] ^ 0x5c);
    }
    const rpc_digest digest = hash(inner, message.data(), message.size());
    return hash(outer, digest.data(), digest.size());
}

bool same_digest(const rpc_digest & a, const rpc_digest & b) {
    volatile uint8_t difference = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        difference = (uint8_t) (difference | (a[i] ^ b[i]));
    }
    return difference == 0;
}

// ---------------------------------------------------------------------------------------- of the system

#ifdef _WIN32

std::string read_rpc_secret(const std::string &) {
    throw std::runtime_error("a shared secret of RPC servers is not supported on this system");
}

static bool random_bytes(void *, size_t) {
    return false;
}

#else

std::string read_rpc_secret(const std::string & path) {
    const size_t least = 16, most = 4096;
    const auto fail = [&](const std::string & what) -> void {
        throw std::runtime_error("the shared secret in " + path + ": " + what);
    };
    const descriptor file(open_at(AT_FDCWD, path.c_str(), O_RDONLY | O_NONBLOCK));
    struct stat st = {};
    if (!file || fstat(file.get(), &st) != 0) {
        fail(file_error(errno));
    }
    if (!S_ISREG(st.st_mode)) {
        fail("it is no regular file");
    }
    std::string secret(most + 1, '\0');
    const file_result got = read_exact(file.get(), &secret[0], secret.size(), 0);
    if (got.error != 0) {
        fail(file_error(got.error));
    }
    secret.resize(got.done);
    while (!secret.empty() && (secret.back() == '\n' || secret.back() == '\r')) {
        secret.pop_back();
    }
    if (secret.size() < least || secret.size() > most) {
        fail("it has " + (secret.size() > most ? "more than 4096" : std::to_string(secret.size())) +
             " bytes, and 16 to 4096 are wanted; make one with: head -c 32 /dev/urandom | base64");
    }
    if ((st.st_mode & S_IROTH) != 0) {
        fprintf(stderr, "warning: every user of this machine can read the shared secret in %s; chmod 600 it\n",
                path.c_str());
    }
    return secret;
}

static bool random_bytes(void * data, size_t bytes) {
    return getentropy(data, bytes) == 0;
}

#endif

// ------------------------------------------------------------------------------------------- the protocol

// A client sends a command and what belongs to it, as in all of the protocol; upstream's commands are below 32:
//
//   client  command_prove  its random number            (nothing: it knows no secret)
//   server                 its random number
//   client  command_prove  HMAC("client", server's, client's)
//   server                 1 and HMAC("server", client's, server's); 0 and zeros: refused
//
// A client proves itself first: a stranger learns nothing that was made with the secret.

static const uint8_t command_prove = 200;
static const uint8_t command_left = 201; // from one that only asked who is here

using nonce = std::array<uint8_t, 32>;

static rpc_digest proof(const std::string & secret, const char * of, const nonce & first, const nonce & second) {
    std::string message = std::string("superllama rpc 1 ") + of;
    message.append((const char *) first.data(), first.size());
    message.append((const char *) second.data(), second.size());
    return hmac_sha256(secret, message);
}

static bool say(const rpc_wire & wire, const void * data, uint64_t bytes) {
    std::string message((const char *) &bytes, sizeof(bytes));
    message.append((const char *) data, (size_t) bytes);
    return wire.send(message.data(), message.size());
}

static bool command(const rpc_wire & wire, const void * data, uint64_t bytes) {
    std::string message(1, (char) command_prove);
    message.append((const char *) &bytes, sizeof(bytes));
    message.append((const char *) data, (size_t) bytes);
    return wire.send(message.data(), message.size());
}

static bool hear(const rpc_wire & wire, void * data, uint64_t bytes) {
    uint64_t announced = 0;
    return wire.receive(&announced, sizeof(announced)) && announced == bytes && wire.receive(data, (size_t) bytes);
}

std::string prove_to_server(const rpc_wire & wire, const std::string & secret) {
    const std::string ended =
        "it ended the connection, or was silent, when it was to prove that it knows the shared secret";
    if (secret.empty()) {
        command(wire, "", 0);
        return "it wants a secret that it shares with its clients, and none was given here";
    }
    nonce mine = {}, its = {};
    if (!random_bytes(mine.data(), mine.size())) {
        return "this system has no random numbers for a proof";
    }
    if (!command(wire, mine.data(), mine.size()) || !hear(wire, its.data(), its.size())) {
        return ended;
    }
    const rpc_digest shown = proof(secret, "client", its, mine);
    std::array<uint8_t, 33> answer = {};
    if (!command(wire, shown.data(), shown.size()) || !hear(wire, answer.data(), answer.size())) {
        return ended;
    }
    rpc_digest its_proof = {};
    std::copy(answer.begin() + 1, answer.end(), its_proof.begin());
    if (answer[0] == 0) {
        return "it refuses the shared secret that was given here; both sides need the same file";
    }
    return same_digest(its_proof, proof(secret, "server", mine, its))
               ? ""
               : "it does not know the shared secret that was given here, and is not used; it may be somebody else";
}

std::string challenge_client(const rpc_wire & wire, const std::string & secret, bool * left) {
    uint8_t what = 0;
    uint64_t bytes = 0;
    nonce its = {}, mine = {};
    *left = false;
    if (!wire.receive(&what, 1)) {
        return "it went away when it was to prove that it knows the secret; other programs than superllama cannot";
    }
    if (what == command_left) {
        *left = true;
        return "it only asked";
    }
    if (what != command_prove || !wire.receive(&bytes, sizeof(bytes)) || (bytes != 0 && bytes != its.size())) {
        return "it does not prove that it knows the secret; it may be another program, or of another version";
    }
    if (bytes == 0) {
        return "it has no secret";
    }
    rpc_digest shown = {};
    if (!random_bytes(mine.data(), mine.size())) {
        return "this system has no random numbers";
    }
    if (!wire.receive(its.data(), its.size()) || !say(wire, mine.data(), mine.size()) || !wire.receive(&what, 1) ||
        what != command_prove || !hear(wire, shown.data(), shown.size())) {
        return "it did not say to the end that it knows the secret";
    }
    std::array<uint8_t, 33> answer = {};
    const bool same = same_digest(shown, proof(secret, "client", mine, its));
    if (same) {
        const rpc_digest own = proof(secret, "server", its, mine);
        answer[0] = 1;
        std::copy(own.begin(), own.end(), answer.begin() + 1);
    }
    if (!say(wire, answer.data(), answer.size())) {
        return "it went away";
    }
    return same ? "" : "it has another secret";
}

} // namespace superllama
