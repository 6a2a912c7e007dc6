// For a plan with devices: how ubatches are computed on several, and what one token sends between them. The scheduler
// of a context that was made without memory has cut its graph as that of a real one would.

#include "context/hooks.h"

#include "llama-context.h"
#include "llama-graph.h"

#include "ggml-backend.h"
#include "ggml-impl.h"

#include <map>
#include <set>
#include <string>

namespace superllama {

bool context_hooks::is_pipelined(const llama_context & ctx) {
    return ctx.cparams.pipeline_parallel;
}

void context_hooks::pipeline(llama_context & ctx) {
    ctx.cparams.pipeline_parallel = true;
    ctx.sched_need_reserve = true;
    ctx.sched_reserve();
}

// Of a tensor in the graph that was cut last; null: it has none.
static ggml_backend_dev_t device_of(ggml_backend_sched_t sched, ggml_tensor * t) {
    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched, t);
    return backend != nullptr ? ggml_backend_get_device(backend) : nullptr;
}

// The scheduler names a copy BACKEND#TENSOR#NUMBER, after where it is and what it is of. Empty: it is none.
static std::string copied_name(const ggml_tensor * t, const std::string & backend) {
    const std::string name = t->name, begin = backend + "#";
    const size_t end = name.rfind('#');
    const bool is = name.compare(0, begin.size(), begin) == 0 && end != std::string::npos && end > begin.size();
    return is ? name.substr(begin.size(), end - begin.size()) : "";
}

context_hooks::token_crossings context_hooks::crossings_of_token(llama_context & ctx) {
    llama_memory_context_ptr mctx;
    if (ctx.memory) {
        mctx = ctx.memory->init_full();
    }
    ggml_cgraph * gf = ctx.graph_reserve(1, 1, 1, mctx.get(), true);
    ggml_backend_sched_t sched = ctx.sched.get();
    ggml_backend_dev_t host = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    std::multimap<std::string, ggml_tensor *> by_name;
    for (int i = 0; i < gf->n_leafs; ++i) {
        by_name.insert({ gf->leafs[i]->name, gf->leafs[i] });
    }
    for (int i = 0; i < gf->n_nodes; ++i) {
        by_name.insert({ gf->nodes[i]->name, gf->nodes[i] });
    }
    token_crossings found;
    std::set<const ggml_tensor *> seen;
    for (int i = 0; i < gf->n_nodes; ++i) {
        ggml_tensor * node = gf->nodes[i];
        ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched, node);
        if (backend == nullptr) {
            continue;
        }
        ggml_backend_dev_t to = ggml_backend_get_device(backend);
        if (found.parts.empty() || found.parts.back() != to) {
            found.parts.push_back(to);
        }
        for (ggml_tensor * src : node->src) {
            const std::string name = src != nullptr ? copied_name(src, ggml_backend_name(backend)) : "";
            if (name.empty() || !seen.insert(src).second) {
                continue;
            }
            ggml_backend_dev_t from = host; // inputs and weights of the host have no other place
            const auto range = by_name.equal_range(name);
            for (auto it = range.first; it != range.second; ++it) {
                ggml_backend_dev_t dev = device_of(sched, it->second);
                from = dev != nullptr && dev != to ? dev : from;
            }
            found.copies.push_back({ from, to, ggml_nbytes(src) });
        }
    }
    for (ggml_tensor * result : { ctx.gf_res_reserve->get_logits(), ctx.gf_res_reserve->get_embd_pooled() }) {
        ggml_backend_dev_t dev = result != nullptr ? device_of(sched, result) : nullptr;
        if (dev != nullptr && dev != host) {
            found.copies.push_back({ dev, host, ggml_nbytes(result) });
        }
    }
    return found;
}

} // namespace superllama
