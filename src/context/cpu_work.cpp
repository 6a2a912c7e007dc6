#include "context/cpu_work.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <vector>

namespace superllama {

// The CPU backend may be a module that is loaded when the process starts: its functions have to be asked for.
using graph_plan = ggml_cplan (*)(const ggml_cgraph *, int, ggml_threadpool *);

static graph_plan planner() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg = cpu != nullptr ? ggml_backend_dev_backend_reg(cpu) : nullptr;
    return reg != nullptr ? (graph_plan) ggml_backend_reg_get_proc_address(reg, "ggml_graph_plan") : nullptr;
}

static bool is_on_cpu(ggml_backend_sched_t sched, ggml_tensor * node) {
    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched, node);
    return ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

size_t cpu_work_bytes(ggml_backend_sched_t sched, const ggml_cgraph * gf, int n_threads) {
    static const graph_plan plan = planner();
    if (plan == nullptr) {
        return 0;
    }
    std::vector<ggml_tensor *> nodes;
    for (int i = 0; i < gf->n_nodes; ++i) {
        if (sched == nullptr || is_on_cpu(sched, gf->nodes[i])) {
            nodes.push_back(gf->nodes[i]);
        }
    }
    ggml_cgraph on_cpu = *gf;
    on_cpu.nodes = nodes.data();
    on_cpu.n_nodes = (int) nodes.size();
    return nodes.empty() ? 0 : plan(&on_cpu, n_threads, nullptr).work_size;
}

} // namespace superllama
