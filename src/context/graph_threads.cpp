#include "context/graph_threads.h"

#include "telemetry/core_share.h"
#include "llama-context.h"

#include "ggml-impl.h"

#include <algorithm>

namespace superllama {

static const int64_t split_cells = 512; // from so many on upstream's attention shares them among its threads

graph_threads::graph_threads(llama_context & ctx, superllama_adapt_threads mode, bool managed) :
    ctx(ctx),
    mode(mode),
    managed(managed) {}

// Whether the last bits of a graph's results depend on the number of threads.
static bool counts(const llama_context & ctx, const ggml_cgraph * gf) {
    for (int i = 0; i < gf->n_nodes; ++i) {
        const ggml_tensor * node = gf->nodes[i];
        if (node->op != GGML_OP_FLASH_ATTN_EXT) {
            continue;
        }
        const bool one_token = node->src[0]->ne[1] == 1 && node->src[0]->ne[3] == 1;
        if (one_token && node->src[1]->ne[1] >= split_cells) {
            ggml_backend_t backend =
                ggml_backend_sched_get_tensor_backend(ctx.get_sched(), const_cast<ggml_tensor *>(node));
            ggml_backend_dev_t dev = backend != nullptr ? ggml_backend_get_device(backend) : nullptr;
            if (dev == nullptr || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
                return true;
            }
        }
    }
    return false;
}

void graph_threads::before_graph(const ggml_cgraph * gf, bool batched) {
    const int n = (int) ctx.n_threads();
    const int n_batch = (int) ctx.n_threads_batch();
    n_used = batched ? n_batch : n;
    if (!managed && mode != SUPERLLAMA_ADAPT_THREADS_ON) {
        return;
    }
    const int left = core_share::of_process().threads(n_used); // which also counts what is lost by waiting
    if (left >= n_used || mode == SUPERLLAMA_ADAPT_THREADS_OFF) {
        return;
    }
    if (mode == SUPERLLAMA_ADAPT_THREADS_EXACT) {
        if (gf->uid == 0 || gf->uid != graph_seen) {
            graph_counts = counts(ctx, gf);
            graph_seen = gf->uid;
        }
        if (graph_counts) {
            return;
        }
    }
    n_asked = n;
    n_asked_batch = n_batch;
    n_used = left;
    ctx.set_n_threads(std::min(n, left), std::min(n_batch, left));
}

void graph_threads::after_graph() {
    if (n_asked > 0) {
        ctx.set_n_threads(n_asked, n_asked_batch);
        n_asked = 0;
    }
}

} // namespace superllama
