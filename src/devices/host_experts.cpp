#include "devices/host_experts.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace superllama {

static const size_t memory_max = 2u << 20;
static const size_t alignment = 64;

size_t host_experts::memory_bytes() {
    return 2 * memory_max; // as much again for the kernels' work
}

static const ggml_tensor * root_of(const ggml_tensor * t) {
    while (t->view_src != nullptr) {
        t = t->view_src;
    }
    return t;
}

static bool computes(ggml_cgraph * part, const ggml_tensor * t) {
    for (int i = 0; i < ggml_graph_n_nodes(part); ++i) {
        if (ggml_graph_node(part, i) == t) {
            return true;
        }
    }
    return false;
}

// What treats every row of a tensor alike, and knows nothing of its place.
static bool is_by_row(const ggml_tensor * t) {
    static const std::set<ggml_op> ops = { GGML_OP_UNARY, GGML_OP_GLU,   GGML_OP_MUL,
                                           GGML_OP_CLAMP, GGML_OP_SCALE, GGML_OP_SQR };
    return ops.count(t->op) > 0 && t->type == GGML_TYPE_F32;
}

// A part of each row.
static bool is_cut(const ggml_tensor * t) {
    return t->op == GGML_OP_VIEW && t->view_offs + t->ne[0] * t->nb[0] <= t->view_src->nb[1] &&
           t->ne[1] == t->view_src->ne[1] && t->nb[1] == t->view_src->nb[1] && t->ne[2] == t->view_src->ne[2];
}

void host_experts::end() {
    weighted = nullptr;
    rows.clear();
    pairs.clear();
    steps.clear();
}

bool host_experts::begin(ggml_cgraph * part, const ggml_tensor * lookup, const weights_of & weights, size_t n_weights) {
    end();
    host_weights = weights;
    input = nullptr;
    const ggml_tensor * product = nullptr; // the last one so far
    size_t n_products = 0;
    std::set<const ggml_tensor *> known;
    for (int i = 0; i < ggml_graph_n_nodes(part) && weighted == nullptr; ++i) {
        ggml_tensor * node = ggml_graph_node(part, i);
        if (node->op == GGML_OP_MUL_MAT_ID && weights(node->src[0]) != nullptr) {
            const bool is_first = known.count(node->src[1]) == 0;
            if (root_of(node->src[2]) != lookup || (is_first && input != nullptr && input != node->src[1])) {
                break;
            }
            input = is_first ? node->src[1] : input;
            product = node;
            n_products++;
        } else if (n_products == n_weights && node->op == GGML_OP_MUL && node->src[0] == product) {
            weighted = node;
            factors = node->src[1];
            break;
        } else if (n_products == n_weights) {
            continue; // all steps are known
        } else if (is_cut(node) ? known.count(node->view_src) == 0
                                : !is_by_row(node) || known.count(node->src[0]) == 0 ||
                                      (node->src[1] != nullptr && known.count(node->src[1]) == 0)) {
            continue; // of something else
        }
        known.insert(node);
        steps.push_back(node);
    }
    if (weighted == nullptr || input->ne[1] != 1 || factors->ne[0] != 1 || !ggml_is_contiguous(input) ||
        !ggml_is_contiguous(factors) || input->type != GGML_TYPE_F32 || factors->type != GGML_TYPE_F32 ||
        computes(part, root_of(input)) || computes(part, root_of(factors))) {
        end();
        return false;
    }
    n_pairs_max = memory_max / pair_bytes();
    return n_pairs_max > 0;
}

// Of one pair: its expert, its input, and every step.
size_t host_experts::pair_bytes() const {
    size_t bytes = GGML_PAD(sizeof(int32_t), alignment) + GGML_PAD(ggml_row_size(input->type, input->ne[0]), alignment);
    for (const ggml_tensor * t : steps) {
        bytes += GGML_PAD(ggml_row_size(t->type, t->ne[0]), alignment);
    }
    return bytes;
}

// A graph of the same steps, for other rows.
struct host_experts::graph_of {
    ggml_context_ptr ctx;
    uint8_t * at;
    int64_t n_rows;

    ggml_tensor * place(ggml_tensor * t) {
        t->data = at;
        at += GGML_PAD(ggml_nbytes(t), alignment);
        return t;
    }
    ggml_tensor * rows_of(int64_t ne0) { return place(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, ne0, 1, n_rows)); }
};

bool host_experts::compute(ggml_backend_t host, const std::vector<int32_t> & chosen, const std::set<int32_t> & experts,
                           std::string * error) {
    pairs.clear();
    for (size_t i = 0; i < chosen.size(); ++i) {
        if (experts.count(chosen[i]) > 0) {
            pairs.push_back(i);
        }
    }
    const int64_t n_each = weighted->ne[1]; // experts of a token
    std::vector<float> inputs((size_t) ggml_nelements(input)), factor((size_t) ggml_nelements(factors));
    ggml_backend_tensor_get(input, inputs.data(), 0, ggml_nbytes(input));
    ggml_backend_tensor_get(factors, factor.data(), 0, ggml_nbytes(factors));

    memory.resize(pairs.size() * pair_bytes() + alignment);
    const size_t n_tensors = steps.size() + 2;
    graph_of g = { ggml_context_ptr(
                       ggml_init({ n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
                                   nullptr, true })),
                   (uint8_t *) GGML_PAD((uintptr_t) memory.data(), alignment), (int64_t) pairs.size() };
    ggml_tensor * ids = g.place(ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_I32, 1, g.n_rows));
    ggml_tensor * x = g.rows_of(input->ne[0]);
    for (size_t k = 0; k < pairs.size(); ++k) {
        ((int32_t *) ids->data)[k] = chosen[pairs[k]];
        memcpy((float *) x->data + k * (size_t) x->ne[0],
               inputs.data() + pairs[k] / (size_t) n_each * (size_t) x->ne[0], x->nb[1]);
    }
    ggml_cgraph * graph = ggml_new_graph_custom(g.ctx.get(), n_tensors, false);
    std::map<const ggml_tensor *, ggml_tensor *> twin = { { input, x } };
    for (const ggml_tensor * t : steps) {
        ggml_tensor * same = nullptr;
        if (t->op == GGML_OP_VIEW) {
            ggml_tensor * src = twin.at(t->view_src);
            same = ggml_view_3d(g.ctx.get(), src, t->ne[0], 1, g.n_rows, src->nb[1], src->nb[2], t->view_offs);
        } else {
            same = g.rows_of(t->ne[0]);
            same->op = t->op;
            memcpy(same->op_params, t->op_params, sizeof(t->op_params));
            if (t->op == GGML_OP_MUL_MAT_ID) {
                same->src[0] = host_weights(t->src[0]);
                same->src[1] = twin.at(t->src[1]);
                same->src[2] = ids;
            } else {
                same->src[0] = twin.at(t->src[0]);
                same->src[1] = t->src[1] != nullptr ? twin.at(t->src[1]) : nullptr;
            }
        }
        same->flags |= GGML_TENSOR_FLAG_COMPUTE;
        ggml_graph_add_node(graph, same);
        twin[t] = same;
    }
    const ggml_status status = ggml_backend_graph_compute(host, graph);
    if (status != GGML_STATUS_SUCCESS) {
        *error = status == GGML_STATUS_ABORTED ? "" : "the host could not compute them";
        return false;
    }
    const ggml_tensor * result = twin.at(steps.back());
    rows.resize((size_t) ggml_nelements(result));
    for (size_t k = 0; k < pairs.size(); ++k) {
        const auto n = (size_t) result->ne[0];
        std::transform((const float *) result->data + k * n, (const float *) result->data + (k + 1) * n,
                       rows.begin() + (ptrdiff_t) (k * n), [&](float value) { return value * factor[pairs[k]]; });
    }
    return true;
}

void host_experts::write(ggml_backend_t device) const {
    const auto n = (size_t) weighted->ne[0];
    const auto n_each = (size_t) weighted->ne[1];
    for (size_t k = 0; k < pairs.size(); ++k) {
        const size_t offset = pairs[k] % n_each * weighted->nb[1] + pairs[k] / n_each * weighted->nb[2];
        ggml_backend_tensor_set_async(device, weighted, rows.data() + k * n, offset, n * sizeof(float));
    }
}

} // namespace superllama
