#include "io/rpc_messages.h"

#include "ggml-impl.h"

#include <cinttypes>
#include <unordered_map>
#include <unordered_set>

namespace superllama {

// Sums of products of two 32-bit numbers: four of them do not fit 64 bits.
static bool extent_of(const rpc_tensor_claim & claim, uint64_t & bytes) {
    const auto type = (ggml_type) claim.type;
    const uint64_t block = (uint64_t) ggml_blck_size(type);
    double n_elements = 1;
    double sum = 0;
    uint64_t exact = 0;
    const auto add = [&](uint64_t n) {
        sum += (double) n;
        exact += n;
    };

    bool empty = false;
    for (uint32_t n : claim.ne) {
        n_elements *= n;
        empty = empty || n == 0;
    }
    if (claim.ne[0] % block != 0 || n_elements > 9e18) {
        return false;
    }
    if (!empty) {
        add(block == 1 ? ggml_type_size(type) + (uint64_t) (claim.ne[0] - 1) * claim.nb[0]
                       : claim.ne[0] / block * claim.nb[0]);
        for (int i = 1; i < GGML_MAX_DIMS; ++i) {
            add((uint64_t) (claim.ne[i] - 1) * claim.nb[i]);
        }
    }
    bytes = exact;
    return sum < 9e18;
}

// Kernels read numbers where they are: at multiples of their size, and blocks at multiples of what divides theirs.
static bool is_aligned(const rpc_tensor_claim & claim) {
    const uint64_t size = ggml_type_size((ggml_type) claim.type);
    const uint64_t divides = size & (~size + 1); // the largest power of two that does
    const uint64_t alignment = ggml_blck_size((ggml_type) claim.type) == 1 ? divides : std::min<uint64_t>(divides, 4);
    uint64_t bits = claim.data;
    for (uint32_t stride : claim.nb) {
        bits |= stride;
    }
    return bits % alignment == 0;
}

bool rpc_claim_ok(const rpc_tensor_claim & claim) {
    uint64_t bytes = 0;
    if (claim.op >= GGML_OP_COUNT || !extent_of(claim, bytes) || !is_aligned(claim)) {
        GGML_LOG_ERROR("RPC: a tensor of type %u, operation %u, [%u, %u, %u, %u] elements cannot be\n", claim.type,
                       claim.op, claim.ne[0], claim.ne[1], claim.ne[2], claim.ne[3]);
        return false;
    }
    if (claim.buffer == nullptr || (bytes == 0 && claim.data == 0)) {
        return true;
    }
    // an empty tensor too: what is copied to it has the size of another
    const auto base = (uint64_t) (uintptr_t) ggml_backend_buffer_get_base(claim.buffer);
    const uint64_t size = ggml_backend_buffer_get_size(claim.buffer);
    if (claim.data < base || claim.data - base > size || bytes > size - (claim.data - base)) {
        GGML_LOG_ERROR("RPC: a tensor of %" PRIu64 " bytes lies outside of its buffer of %" PRIu64 " bytes\n", bytes,
                       size);
        return false;
    }
    return true;
}

bool rpc_copy_ok(const ggml_tensor * from, const ggml_tensor * to) {
    if (from == nullptr || to == nullptr || from->buffer == nullptr || to->buffer == nullptr) {
        return false;
    }
    const uint64_t bytes = ggml_nbytes(from);
    const auto a = (uint64_t) (uintptr_t) from->data;
    const auto b = (uint64_t) (uintptr_t) to->data;
    if (from->buffer == to->buffer && a != b && std::max(a, b) - std::min(a, b) < bytes) {
        GGML_LOG_ERROR("RPC: a copy of %" PRIu64 " bytes to %" PRIu64
                       " bytes beside them would overwrite what it reads\n",
                       bytes, std::max(a, b) - std::min(a, b));
        return false;
    }
    return true;
}

// ------------------------------------------------------------------------------------------------ graphs

// Follows sources in the server's order, without recursion.
class graph_walk {
  public:
    explicit graph_walk(const std::vector<rpc_node_claim> & tensors) {
        for (const rpc_node_claim & tensor : tensors) {
            known.emplace(tensor.id, &tensor);
        }
    }

    bool follow(uint64_t id) {
        if (done.count(id) > 0) {
            return true;
        }
        if (!enter(id)) {
            return false;
        }
        while (!path.empty()) {
            step & at = path.back();
            if (at.next > GGML_MAX_SRC) {
                done.insert(at.tensor->id);
                open.erase(at.tensor->id);
                path.pop_back();
                continue;
            }
            const uint64_t source = at.tensor->sources[at.next++];
            if (source == at.tensor->id) {
                continue; // a cast names itself as what it writes to
            }
            if (source != 0 && done.count(source) == 0 && !enter(source)) {
                return false;
            }
        }
        return true;
    }

  private:
    // a client sends what a node is computed from first, but of a part of a graph all that led to it on this device
    static const size_t max_depth = 16384;

    struct step {
        const rpc_node_claim * tensor;
        int next;
    };

    bool enter(uint64_t id) {
        const auto it = known.find(id);
        if (it == known.end() || path.size() >= max_depth || !open.insert(id).second) {
            return false;
        }
        path.push_back({ it->second, 0 });
        return true;
    }

    std::unordered_map<uint64_t, const rpc_node_claim *> known;
    std::unordered_set<uint64_t> done;
    std::unordered_set<uint64_t> open;
    std::vector<step> path;
};

bool rpc_claims_ok(const std::vector<uint64_t> & nodes, const std::vector<rpc_node_claim> & tensors) {
    graph_walk walk(tensors);
    std::unordered_set<uint64_t> seen;
    for (uint64_t id : nodes) {
        if (id == 0 || !seen.insert(id).second || !walk.follow(id)) {
            GGML_LOG_ERROR("RPC: a graph of %zu nodes and %zu tensors does not hang together\n", nodes.size(),
                           tensors.size());
            return false;
        }
    }
    return true;
}

} // namespace superllama
