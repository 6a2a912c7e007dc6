#include "server/projector.h"

#include "common.h"
#include "mtmd.h"
#include "server/free_heap.h"

#include <stdexcept>

namespace superllama {

// What upstream keeps to describe a graph, for images and for sounds; see clip_ctx::max_nodes.
static uint64_t described_bytes(const char * path) {
    const uint64_t nodes = 8192;
    const mtmd_caps has = mtmd_get_cap_from_file(path);
    return (has.inp_vision + has.inp_audio) * (nodes * ggml_tensor_overhead() + ggml_graph_overhead());
}

// As upstream's server makes it; see server_context_impl::load_model(). Without a warm-up it takes the same, with its
// first image; what it computes in is known only after one.
static mtmd_context_params params_of(const common_params & params) {
    mtmd_context_params found = mtmd_context_params_default();
    found.use_gpu = params.mmproj_use_gpu;
    found.device = params.mmproj_device;
    found.print_timings = false;
    found.n_threads = params.cpuparams.n_threads;
    found.flash_attn_type = params.flash_attn_type;
    found.warmup = true;
    found.image_min_tokens = params.image_min_tokens;
    found.image_max_tokens = params.image_max_tokens;
    found.batch_max_tokens = params.mtmd_batch_max_tokens;
    return found;
}

uint64_t projector_bytes(const common_params & params) {
    if (params.mmproj.path.empty()) {
        return 0;
    }
    const mtmd_memory_usage usage = mtmd_get_memory_usage(params.mmproj.path.c_str(), params_of(params));
    if (usage.backend_mem_usage.empty()) {
        throw std::runtime_error("the projector " + params.mmproj.path +
                                 " cannot be read; perhaps it is damaged, or no projector");
    }
    uint64_t bytes = described_bytes(params.mmproj.path.c_str());
    for (const auto & [device, of_device] : usage.backend_mem_usage) {
        const bool is_host = device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
        bytes += is_host ? of_device : 0;
    }
    return bytes;
}

void count_projector(common_params & params) {
    llama_model_params of_model = llama_model_default_params();
    params.superllama.model.projector_bytes = 0;
    if (!params.superllama.apply(of_model)) {
        return; // there is no budget
    }
    if (!params.mmproj.path.empty()) {
        keep_heap_small(); // else it takes half a projector more than it has
    }
    try {
        params.superllama.model.projector_bytes = projector_bytes(params);
    } catch (const std::exception &) {
        // what is wrong with the file is said when it is loaded
    }
}

} // namespace superllama
