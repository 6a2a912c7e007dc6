// What a compute graph needs of the blocks of weights, and when: the order of their first use, and the nodes between
// which something has to happen.
#pragma once

#include "weights/store.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

struct ggml_cgraph;
struct ggml_tensor;

namespace superllama {

// What happens between two nodes of a graph.
struct layer_stop {
    std::vector<uint32_t> release;         // blocks whose last use was before
    std::vector<uint32_t> acquire;         // blocks whose first use comes next
    const ggml_tensor * experts = nullptr; // the MUL_MAT_ID node that comes next
    const ggml_tensor * expert_weights = nullptr;
    const ggml_tensor * expert_ids = nullptr;   // which experts it wants, where the router left them
    const ggml_tensor * experts_done = nullptr; // the last one of a layer
    const ggml_tensor * next_router = nullptr;  // weights that choose the experts of the next layer that has any
    const layer_stop * next_moe = nullptr;      // the stop where they are chosen
    bool always = false;                        // stop here even where nothing is to be done
    const ggml_tensor * in_pieces = nullptr;    // the matrix that this node multiplies with, a piece at a time
};

// Experts of a layer, by their number, and one of the tensors that they have a matrix in.
struct layer_experts {
    const ggml_tensor * weights;
    std::vector<uint32_t> blocks;
    int64_t n_chosen = 0; // for each token
};

// Weights of the host, and where they are wanted on a device that computes a large batch with them.
struct layer_copy {
    const ggml_tensor * weights;
    ggml_tensor * to;
};

struct layer_graph {
    uint64_t id = 0;
    std::vector<uint32_t> order;                                    // blocks by first use
    std::unordered_map<const ggml_tensor *, layer_stop> stops;      // after this node; nullptr: before the first
    std::unordered_map<uint32_t, std::vector<ggml_tensor *>> views; // of weights, by block
    std::vector<const ggml_tensor *> rows;                          // GET_ROWS nodes over by-row tensors
    std::unordered_map<const ggml_tensor *, bool> in_pieces;        // that it reads; true: all are there, and stay
    std::vector<layer_experts> experts;                             // of each layer that has any
    std::vector<layer_copy> copies;                                 // by first use
    int64_t expert_tokens = 0;                                      // the most tokens that choose experts at once
};

// The choice of experts, where the router left it: a copy on another device comes too late to ask it which to have
// ready.
const ggml_tensor * original_of(ggml_cgraph * gf, const ggml_tensor * t);

layer_graph layer_graph_build(const weight_store & store, ggml_cgraph * gf, uint64_t id);

// From the first node that reads a block to the last one: so long it is in use. Pieces of a matrix come one after the
// other at one node, so that positions are finer than nodes.
struct block_use {
    uint32_t block;
    int first;
    int last;
};

// Of blocks that are no experts. The graph may be another model's, of the same file: tensors are known by name.
std::vector<block_use> uses_of(const weight_store & store, ggml_cgraph * gf);

// Tensors of which only rows or pieces are there, and which the graph reads in another way: an embedding that is the
// output matrix too, an output matrix that is looked up by rows. Throws where a tensor of experts is read by an
// operation whose kernel does not ask where an expert is.
std::vector<const ggml_tensor *> read_whole(const weight_store & store, ggml_cgraph * gf);

} // namespace superllama
