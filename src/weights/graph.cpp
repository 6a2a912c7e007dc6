#include "weights/graph.h"

#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

namespace superllama {

static const size_t n_stops_min = 16; // a pass over the weights stops at least so often, for memory to be given back

static const ggml_tensor * weights_of(const ggml_tensor * src) {
    while (src != nullptr && src->view_src != nullptr) {
        src = src->view_src;
    }
    return src;
}

// What one device computed, or holds, and another one needs is copied before the other's turn, into a tensor
// "DEVICE#name#0". The name of what it is a copy of; empty: it is none.
static std::string copied_name(const ggml_tensor * t) {
    const char * first = strchr(t->name, '#');
    const char * last = strrchr(t->name, '#');
    return first == last ? std::string() : std::string(first + 1, last);
}

const ggml_tensor * original_of(ggml_cgraph * gf, const ggml_tensor * t) {
    const std::string name = copied_name(t);
    const ggml_tensor * original = name.empty() ? nullptr : ggml_graph_get_tensor(gf, name.c_str());
    return original != nullptr ? original : t;
}

// Weights of ours on the host that a node reads: there, or as a copy on a device that computes large batches with them.
// Null: none of ours.
static const ggml_tensor * held_weights(const weight_store & store, const ggml_tensor * src) {
    const ggml_tensor * t = weights_of(src);
    if (t == nullptr || t->op != GGML_OP_NONE) {
        return nullptr; // computed, as most are
    }
    if (store.is_here(t)) {
        return t;
    }
    const std::string name = copied_name(t);
    t = name.empty() ? nullptr : store.named(name);
    return t != nullptr && store.is_here(t) ? t : nullptr;
}

// All of it: no view.
static bool is_whole(const ggml_tensor * src, const ggml_tensor * weights) {
    return src == weights || copied_name(src) == weights->name;
}

// A product that is computed a piece of the matrix at a time: this is the matrix.
static bool is_in_pieces(const ggml_tensor * node, int s) {
    return node->op == GGML_OP_MUL_MAT && s == 0 && node->src[0]->view_src == nullptr;
}

std::vector<block_use> uses_of(const weight_store & store, ggml_cgraph * gf) {
    static const int per_node = 1024;
    std::map<uint32_t, block_use> uses;
    const auto use = [&uses](uint32_t block, int at) {
        uses.insert({ block, { block, at, at } }).first->second.last = at;
    };
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        for (int s = 0; s < GGML_MAX_SRC; ++s) {
            const ggml_tensor * root = weights_of(node->src[s]);
            if (root == nullptr || root->op != GGML_OP_NONE) {
                continue;
            }
            const std::string copied = copied_name(root);
            const std::string name = copied.empty() ? root->name : copied;
            const ggml_tensor * in_pieces = is_in_pieces(node, s) ? store.named_in_pieces(name) : nullptr;
            if (in_pieces != nullptr) {
                const std::vector<uint32_t> & pieces = store.pieces_of(in_pieces);
                for (size_t k = 0; k < pieces.size(); ++k) {
                    use(pieces[k], i * per_node + (int) std::min<size_t>(k, per_node - 1));
                }
                continue;
            }
            const ggml_tensor * t = store.named(name);
            const int32_t block = t == nullptr || store.n_experts(t) > 0 ? -1 : store.block_of(t);
            if (block >= 0) {
                use((uint32_t) block, i * per_node);
            }
        }
    }
    std::vector<block_use> result;
    for (const auto & entry : uses) {
        result.push_back(entry.second);
    }
    return result;
}

std::vector<const ggml_tensor *> read_whole(const weight_store & store, ggml_cgraph * gf) {
    std::vector<const ggml_tensor *> whole;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        for (int s = 0; s < GGML_MAX_SRC && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0; ++s) {
            const ggml_tensor * src = held_weights(store, node->src[s]);
            if (src == nullptr) {
                continue;
            }
            const bool as_it_is = s == 0 && is_whole(node->src[s], src);
            const bool served = node->op == GGML_OP_VIEW ||
                                (as_it_is && store.is_by_row(src) && node->op == GGML_OP_GET_ROWS) ||
                                (!store.pieces_of(src).empty() && is_in_pieces(node, s));
            if (store.is_partial(src) && !served) {
                whole.push_back(src);
            }
            if (store.n_experts(src) > 0 && !(node->op == GGML_OP_MUL_MAT_ID && as_it_is)) {
                throw std::runtime_error(std::string("the model's graph reads ") + src->name + " by " +
                                         ggml_op_name(node->op) +
                                         ", which cannot be streamed; load the model without dynamic layers");
            }
        }
    }
    return whole;
}

static layer_experts experts_of(const weight_store & store, const ggml_tensor * weights, int64_t n_chosen) {
    layer_experts e = { weights, {}, n_chosen };
    for (int32_t i = 0; i < store.n_experts(weights); ++i) {
        e.blocks.push_back((uint32_t) store.block_of(weights, i));
    }
    return e;
}

layer_graph layer_graph_build(const weight_store & store, ggml_cgraph * gf, uint64_t id) {
    layer_graph graph;
    graph.id = id;

    const int n_nodes = ggml_graph_n_nodes(gf);
    std::vector<int> first_use(store.blocks().size(), -1);
    std::vector<int> last_use(store.blocks().size(), -1);
    const auto before = [&](int i) -> layer_stop & {
        return graph.stops[i > 0 ? ggml_graph_node(gf, i - 1) : nullptr];
    };
    const ggml_tensor * last_moe = nullptr;
    const ggml_tensor * router = nullptr;
    layer_stop * moe_stop = nullptr; // of the layer before
    int32_t moe_layer = -1;
    std::set<const ggml_tensor *> copied;

    for (int i = 0; i < n_nodes; ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
            continue;
        }
        for (int s = 0; s < GGML_MAX_SRC; ++s) {
            const ggml_tensor * src = held_weights(store, node->src[s]);
            if (src == nullptr) {
                continue; // none of ours, or moved to a device
            }
            if (node->src[s] != src && node->src[s]->view_src == nullptr && is_whole(node->src[s], src) &&
                copied.insert(node->src[s]).second) {
                graph.copies.push_back({ src, node->src[s] });
            }
            if (node->op == GGML_OP_MUL_MAT && strstr(src->name, "ffn_gate_inp.weight") != nullptr) {
                router = src;
            }
            if (store.n_experts(src) > 0) {
                if (node->op == GGML_OP_MUL_MAT_ID) {
                    const int32_t layer = store.blocks()[(size_t) store.block_of(src)].layer;
                    if (layer != moe_layer) {
                        if (moe_stop != nullptr) {
                            moe_stop->next_router = router;
                            moe_stop->next_moe = &before(i);
                        }
                        moe_stop = &before(i);
                        moe_stop->experts = node;
                        moe_stop->expert_weights = src;
                        moe_stop->expert_ids = original_of(gf, node->src[2]);
                        moe_layer = layer;
                        graph.experts.push_back(experts_of(store, src, node->src[2]->ne[0]));
                        // what a device chose is looked at before a kernel here believes it
                        const bool chosen_here = moe_stop->expert_ids == node->src[2];
                        graph.expert_tokens =
                            std::max(graph.expert_tokens, chosen_here ? node->src[2]->ne[1] : INT64_MAX);
                        router = nullptr;
                        if (last_moe != nullptr) {
                            graph.stops[last_moe].experts_done = last_moe;
                        }
                    }
                    last_moe = node;
                }
                continue;
            }
            if (node->op == GGML_OP_GET_ROWS && store.is_by_row(src)) {
                graph.rows.push_back(node);
                if (!store.pieces_of(src).empty()) {
                    graph.in_pieces[src] = false;
                }
                continue;
            }
            const std::vector<uint32_t> & pieces = store.pieces_of(src);
            if (!pieces.empty()) {
                for (uint32_t b : pieces) {
                    if (first_use[b] < 0) {
                        first_use[b] = i;
                        graph.order.push_back(b);
                    }
                    last_use[b] = i;
                }
                graph.stops[node].in_pieces = src;
                graph.in_pieces[src] = false;
                continue;
            }
            const int32_t block = store.block_of(src);
            if (block < 0) {
                continue;
            }
            const auto b = (uint32_t) block;
            if (node->view_src == src) {
                graph.views[b].push_back(node); // also where only a copy of it, on a device, is read
            }
            if (!is_whole(node->src[s], src)) {
                graph.views[b].push_back(node->src[s]);
            }
            if (first_use[b] < 0) {
                first_use[b] = i;
                graph.order.push_back(b);
                before(i).acquire.push_back(b);
            }
            last_use[b] = i;
        }
    }
    if (last_moe != nullptr) {
        graph.stops[last_moe].experts_done = last_moe;
    }
    size_t total = 0;
    for (uint32_t b : graph.order) {
        graph.stops[ggml_graph_node(gf, last_use[b])].release.push_back(b);
        total += store.blocks()[b].bytes;
    }
    size_t since = 0;
    for (uint32_t b : graph.order) {
        since += store.blocks()[b].bytes;
        if (since >= total / n_stops_min) {
            before(first_use[b]).always = true;
            since = 0;
        }
    }
    return graph;
}

} // namespace superllama
