// The plan of a model whose layers may be on other machines: the device tier's own placement, on devices that have
// sizes only, and what upstream's dry run says of contexts there.
#pragma once

#include "superllama.h"

namespace superllama {

// As superllama_plan_nodes() has it.
struct plan_nodes_cases {
    const struct superllama_plan_node * nodes;
    int32_t n_nodes;
    const uint64_t * mem_budgets;
    int32_t n_cases;
    struct superllama_plan * host;
    struct superllama_node_share * shares;
    struct superllama_plan_layer * layers;
    int32_t n_layers_max;
};

// Throws std::runtime_error.
int32_t plan_nodes(const char * path, struct llama_model_params mparams, struct llama_context_params cparams,
                   const plan_nodes_cases & cases);

} // namespace superllama
