// llama_moe_cache, through which upstream's graphs read experts on devices: without dynamic layers it is upstream's own
// cache, which is compiled by another name; with them it is the banks of the device tier.

#include "llama-moe-cache.h"

#include "devices/expert_banks.h"
#include "llama-model.h"
#include "upstream-moe-cache.h"

struct llama_moe_cache::impl {
    std::unique_ptr<upstream_moe_cache> upstream; // or else
    superllama::dynamic_model * model = nullptr;
    std::vector<ggml_backend_t> backends;
};

llama_moe_cache::llama_moe_cache(const llama_model & model, const std::vector<ggml_backend_t> & backends,
                                 const std::vector<ggml_backend_buffer_type_t> & bufts, size_t size) :
    pimpl(std::make_unique<impl>()) {
    pimpl->model = model.superllama.get();
    pimpl->backends = backends;
    if (pimpl->model == nullptr) {
        pimpl->upstream = std::make_unique<upstream_moe_cache>(model, backends, bufts, size);
    }
}

llama_moe_cache::~llama_moe_cache() = default;

ggml_backend_t llama_moe_cache::backend(int32_t il) const {
    if (pimpl->upstream) {
        return pimpl->upstream->backend(il);
    }
    for (ggml_backend_t backend : pimpl->backends) {
        if (ggml_backend_get_device(backend) == pimpl->model->device_of(il)) {
            return backend;
        }
    }
    return nullptr;
}

ggml_tensor * llama_moe_cache::get_slot_map(int32_t il, int64_t n_tokens, int64_t n_expert_used) const {
    return pimpl->upstream ? pimpl->upstream->get_slot_map(il, n_tokens, n_expert_used)
                           : pimpl->model->banks()->slot_map(il, n_tokens, n_expert_used);
}

ggml_tensor * llama_moe_cache::get_experts(const ggml_tensor * w) const {
    return pimpl->upstream ? pimpl->upstream->get_experts(w) : pimpl->model->banks()->bank_of(w);
}

// With dynamic layers the graphs of ubatches run with a callback of their own (context/graph_run.h).
bool llama_moe_cache::copy(ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * dst, ggml_cgraph * graph) {
    return pimpl->upstream && pimpl->upstream->copy(backend, src, dst, graph);
}

int64_t llama_moe_cache::copy_experts(ggml_backend_t backend, const ggml_tensor * w, ggml_tensor * dst, int64_t e,
                                      int64_t last) {
    return pimpl->upstream ? pimpl->upstream->copy_experts(backend, w, dst, e, last) : 0;
}

// Banks are weights, and counted as such.
std::map<ggml_backend_buffer_type_t, size_t> llama_moe_cache::memory_breakdown() const {
    return pimpl->upstream ? pimpl->upstream->memory_breakdown() : std::map<ggml_backend_buffer_type_t, size_t>();
}
