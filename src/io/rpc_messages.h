// What a message to an RPC server has to be before it is acted upon: lengths, tensors and graphs that hang together.
// Used by patched call sites in ggml-rpc.cpp, whose types are its own: templates take them apart, the rules are here.
#pragma once

#include "ggml.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

namespace superllama {

// Throws std::runtime_error where the peer at "host:port" is no RPC server of this version that answers within a few
// seconds: one that is busy, silent or foreign would hang or end the process that connects to it.
void check_rpc_peer(const char * endpoint);

// The next client that says something: one that connects and is silent, or is gone before it was accepted, holds up
// nobody for long. Clients whose machine disappears are noticed (TCP keep-alive).
#ifdef _WIN32
uintptr_t accept_client(uintptr_t listener);
#else
int accept_client(int listener);
#endif

// Where the client that this thread accepted last connects from.
const char * rpc_client_name();

// Memory for what a peer announces grows with what it sends: a length is only a claim.
template <class Socket>
bool receive_growing(Socket & socket, uint64_t size, std::vector<uint8_t> & data) {
    const uint64_t first = 64ull << 20; // what fits is allocated once
    try {
        for (uint64_t n = 0; n < size;) {
            const uint64_t step = std::min(size - n, std::max(first, n));
            data.resize((size_t) (n + step));
            if (!socket.recv_data(data.data() + n, (size_t) step)) {
                return false;
            }
            n += step;
        }
        return true;
    } catch (const std::exception &) { // no memory
        return false;
    }
}

// A tensor as a peer describes it. `buffer` is null where the server knows none by that name.
struct rpc_tensor_claim {
    uint32_t type; // one of ggml's
    uint32_t op;
    uint32_t ne[GGML_MAX_DIMS];
    uint32_t nb[GGML_MAX_DIMS];
    uint64_t data;
    ggml_backend_buffer_t buffer;
};

// Whole blocks, an operation that exists, an extent that can be counted and lies in its buffer, numbers that are
// aligned.
bool rpc_claim_ok(const rpc_tensor_claim & claim);

template <class Tensor, class Buffers>
bool rpc_tensor_ok(const Tensor & tensor, const Buffers & buffers) {
    rpc_tensor_claim claim = {};
    claim.type = tensor.type;
    claim.op = tensor.op;
    claim.data = tensor.data;
    memcpy(claim.ne, tensor.ne, sizeof(claim.ne));
    memcpy(claim.nb, tensor.nb, sizeof(claim.nb));
    const auto buffer = reinterpret_cast<ggml_backend_buffer_t>(tensor.buffer);
    claim.buffer = buffers.count(buffer) > 0 ? buffer : nullptr;
    return memchr(tensor.name, 0, sizeof(tensor.name)) != nullptr && rpc_claim_ok(claim);
}

// Two tensors in buffers that are known, of which one can be copied to the other: not onto a part of itself, which
// memcpy() does not do. Null is none that was described well.
bool rpc_copy_ok(const ggml_tensor * from, const ggml_tensor * to);

// One tensor of a graph, and those that it is computed from.
struct rpc_node_claim {
    uint64_t id;
    uint64_t sources[GGML_MAX_SRC + 1]; // the last one is what it is a view of
};

// Every node is one of the tensors and stands there once, no tensor comes from itself, and no chain of sources is so
// long that following it, which the server does by recursion, would end its stack.
bool rpc_claims_ok(const std::vector<uint64_t> & nodes, const std::vector<rpc_node_claim> & tensors);

template <class Tensor>
bool rpc_graph_ok(const void * node_ids, uint32_t n_nodes, const Tensor * tensors, uint32_t n_tensors) {
    try {
        std::vector<uint64_t> nodes(n_nodes);
        if (n_nodes > 0) {
            memcpy(nodes.data(), node_ids, n_nodes * sizeof(uint64_t)); // nothing in a message is aligned
        }
        std::vector<rpc_node_claim> claims(n_tensors);
        for (uint32_t i = 0; i < n_tensors; ++i) {
            claims[i].id = tensors[i].id;
            memcpy(claims[i].sources, tensors[i].src, sizeof(tensors[i].src));
            claims[i].sources[GGML_MAX_SRC] = tensors[i].view_src;
        }
        return rpc_claims_ok(nodes, claims);
    } catch (const std::exception &) { // no memory
        return false;
    }
}

} // namespace superllama
