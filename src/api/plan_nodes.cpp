#include "api/plan_nodes.h"

#include "api/plan.h"
#include "context/hooks.h"
#include "devices/layer_kv.h"
#include "devices/link.h"
#include "devices/paper.h"
#include "devices/upload.h"
#include "io/rpc_units.h"
#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "model/dynamic_model.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace superllama {

static const int32_t max_nodes = 12;        // of the scheduler's 16 backends, the host has some
static const size_t small_graph_bytes = 21; // of the message that computes a graph which the server has

namespace {

// What a context takes at one placement.
struct dry_context {
    std::vector<size_t> compute;      // of each node
    struct superllama_plan host = {}; // kv_bytes, compute_bytes and what is of the model
    bool pipelined = false;
    context_hooks::token_crossings crossings;
};

struct placement {
    std::vector<int> to;                          // of each layer
    std::vector<size_t> compute;                  // compute buffers of each node: the most of all that were tried
    std::vector<std::vector<int64_t>> n_arrivals; // of each layer on each node, until it is where it stays
    const dry_context * context;
};

class planner {
  public:
    planner(const char * path, const llama_model_params & mparams, const llama_context_params & cparams,
            int32_t n_nodes);

    int32_t n_layers() const { return tier->n_layers(); }
    std::vector<uint64_t> budgets(const struct superllama_plan_node * nodes) const;
    std::vector<double> crossing_s(const struct superllama_plan_node * nodes) const;
    placement place(const std::vector<uint64_t> & budgets, const std::vector<double> & crossing_s);
    struct superllama_plan host(const placement & p, uint64_t mem_budget);
    struct superllama_node_share share(const placement & p, int node, uint64_t budget) const;
    struct superllama_plan_layer layer(const placement & p, int il) const;

  private:
    const dry_context & at(const std::vector<int> & to, bool op_offload, bool pipelined);
    static void add_load(const ggml_tensor * t, int64_t n_arrivals, struct superllama_node_share & s);

    const char * path;
    llama_model_params mparams;
    llama_context_params cparams;
    paper_devices nodes;
    std::vector<ggml_backend_dev_t> list;
    llama_model_ptr model;
    dynamic_model * weights;
    device_tier * tier;
    std::vector<size_t> kv; // of each layer
    std::map<std::pair<std::vector<int>, std::pair<bool, bool>>, dry_context> contexts;
};

} // namespace

planner::planner(const char * path, const llama_model_params & params, const llama_context_params & cparams,
                 int32_t n_nodes) :
    path(path),
    mparams(params),
    cparams(cparams),
    nodes((size_t) n_nodes),
    list(nodes.list()) {
    mparams.devices = list.data();
    mparams.split_mode = LLAMA_SPLIT_MODE_LAYER;
    model = plan_laid_out(path, mparams);
    weights = model->superllama.get();
    tier = &weights->paper_tier();

    // what KV each layer has does not depend on where it is
    llama_model_params on_host = mparams;
    on_host.n_gpu_layers = 0;
    const llama_model_ptr dry = plan_dry_model(path, on_host);
    const layer_kv_sizes sizes;
    plan_dry_context(dry.get(), cparams);
    kv = sizes.bytes((size_t) n_layers());
}

std::vector<uint64_t> planner::budgets(const struct superllama_plan_node * given) const {
    std::vector<uint64_t> result;
    for (size_t d = 0; d < nodes.size(); ++d) {
        result.push_back(given[d].budget_bytes > 0
                             ? given[d].budget_bytes
                             : device_tier::automatic_budget(0, given[d].free_bytes, mparams.superllama.mem_pressure));
    }
    return result;
}

std::vector<double> planner::crossing_s(const struct superllama_plan_node * given) const {
    std::vector<double> result;
    for (size_t d = 0; d < nodes.size(); ++d) {
        result.push_back(given[d].round_trip_s + (double) token_state_bytes(*model) / given[d].bytes_per_s);
    }
    return result;
}

// A static load that has the same layers on the same devices.
const dry_context & planner::at(const std::vector<int> & to, bool op_offload, bool pipelined) {
    const auto key = std::make_pair(to, std::make_pair(op_offload, pipelined));
    const auto known = contexts.find(key);
    if (known != contexts.end()) {
        return known->second;
    }
    std::vector<float> split(std::max<size_t>(llama_max_devices(), nodes.size()));
    llama_model_params here = mparams;
    here.n_gpu_layers = 0;
    for (int node : to) {
        here.n_gpu_layers += node >= 0 ? 1 : 0;
        split[(size_t) std::max(0, node)] += node >= 0 ? 1.0f : 0.0f;
    }
    here.tensor_split = split.data();
    const llama_model_ptr dry = plan_dry_model(path, here);
    for (size_t il = 0; il < to.size(); ++il) {
        ggml_backend_dev_t dev = il + 1 == to.size() ? dry->dev_output() : dry->dev_layer((int) il);
        const bool as_asked = to[il] >= 0 ? dev == nodes.device((size_t) to[il])
                                          : ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
        if (!as_asked) {
            throw std::runtime_error(
                format("layer %zu is on %s in a dry run, and not where it was put", il, ggml_backend_dev_name(dev)));
        }
    }
    llama_context_params c = cparams;
    c.op_offload = op_offload;
    const llama_context_ptr ctx = plan_dry_context(dry.get(), c);
    if (pipelined && !context_hooks::is_pipelined(*ctx)) {
        context_hooks::pipeline(*ctx);
    }
    dry_context & found = contexts[key];
    plan_context(*ctx, found.host);
    found.pipelined = context_hooks::is_pipelined(*ctx);
    found.compute.resize(nodes.size());
    for (const auto & [buft, bytes] : ctx->memory_breakdown()) {
        for (size_t d = 0; d < nodes.size(); ++d) {
            found.compute[d] += ggml_backend_buft_get_device(buft) == nodes.device(d) ? bytes.compute : 0;
        }
    }
    if (ggml_cgraph * gf = context_hooks::largest_graph(*ctx)) {
        weights->expect(gf);
    }
    found.crossings = context_hooks::crossings_of_token(*ctx);
    return found;
}

// In the steps of a load and of context_hooks::before_reserve(): needs are measured at a placement, and what they leave
// gives the next one, until it has room for what it needs.
placement planner::place(const std::vector<uint64_t> & budgets, const std::vector<double> & crossing_s) {
    const std::vector<size_t> nothing(nodes.size());
    std::vector<size_t> need = nothing;
    std::vector<std::vector<int64_t>> n_arrivals(nodes.size(), std::vector<int64_t>(kv.size()));
    std::vector<int> now(kv.size(), -1);
    const auto move = [&](const std::vector<int> & to) {
        for (size_t il = 0; il < to.size(); ++il) {
            if (to[il] >= 0 && to[il] != now[il]) {
                n_arrivals[(size_t) to[il]][il]++;
            }
        }
        now = to;
    };
    bool op_offload = cparams.op_offload;
    const std::vector<int> loaded = tier->target(budgets, std::vector<size_t>(kv.size()), nothing, crossing_s).device;
    move(loaded);
    const bool all = std::none_of(loaded.begin(), loaded.end(), [](int node) { return node < 0; });
    const bool pipelined = all && nodes.size() > 1 && at(loaded, op_offload, false).pipelined;
    for (;;) {
        const std::vector<int> to = tier->target(budgets, kv, need, crossing_s).device;
        move(to);
        const dry_context & ctx = at(to, op_offload, pipelined);
        bool fits = true, room = true;
        for (size_t d = 0; d < nodes.size(); ++d) {
            fits = fits && ctx.compute[d] <= need[d];
            need[d] = std::max(need[d], ctx.compute[d]);
            room = room && need[d] <= budgets[d];
        }
        if (op_offload && !room) {
            op_offload = false;
            need = nothing;
            continue;
        }
        if (fits) {
            return { to, need, n_arrivals, &ctx };
        }
    }
}

struct superllama_plan planner::host(const placement & p, uint64_t mem_budget) {
    weights->place_on_paper(p.to);
    struct superllama_plan common = p.context->host;
    plan_weights(*weights, mparams, common);
    common.fixed_bytes += device_upload_staging();
    const struct superllama_plan row = plan_row(*weights, common, mem_budget);
    weights->place_on_paper(std::vector<int>(p.to.size(), -1));
    return row;
}

// What an upload sends: units that are asked for by hash where the server has files, smaller ones as they are.
void planner::add_load(const ggml_tensor * t, int64_t n_arrivals, struct superllama_node_share & s) {
    const size_t slice = ggml_nbytes(t) / rpc_slices(t), slices = rpc_slices(t) * (size_t) n_arrivals;
    for (size_t at = 0; at < slice; at += rpc_unit_bytes) {
        const size_t n = std::min(rpc_unit_bytes, slice - at);
        const bool asks = n >= rpc_unit_least;
        s.load_bytes += slices * (n + rpc_message_bytes);
        s.load_hashed_bytes += slices * (rpc_message_bytes + (asks ? rpc_answer_bytes : n));
        s.n_load_asks += asks ? (int64_t) slices : 0;
    }
}

struct superllama_node_share planner::share(const placement & p, int node, uint64_t budget) const {
    struct superllama_node_share s = {};
    s.budget_bytes = budget;
    s.compute_bytes = p.compute[(size_t) node];
    for (int il = 0; il < n_layers(); ++il) {
        const int64_t n_arrivals = p.n_arrivals[(size_t) node][(size_t) il];
        for (const ggml_tensor * t : tier->weights_of(il)) {
            add_load(t, n_arrivals, s);
        }
        if (p.to[(size_t) il] != node) {
            continue;
        }
        s.n_layers++;
        s.weight_bytes += tier->info(il).bytes;
        s.kv_bytes += kv[(size_t) il];
    }
    ggml_backend_dev_t dev = nodes.device((size_t) node);
    for (const auto & copy : p.context->crossings.copies) {
        s.sent_bytes += copy.to == dev ? copy.bytes + rpc_message_bytes : 0;
        if (copy.from == dev) {
            s.sent_bytes += rpc_message_bytes;
            s.received_bytes += copy.bytes + rpc_answer_bytes;
            s.n_waits++;
        }
    }
    s.sent_bytes += small_graph_bytes *
                    (size_t) std::count(p.context->crossings.parts.begin(), p.context->crossings.parts.end(), dev);
    return s;
}

struct superllama_plan_layer planner::layer(const placement & p, int il) const {
    const size_t n_used = model->hparams.n_expert_used_max();
    uint64_t token_bytes = 0;
    for (const ggml_tensor * t : tier->weights_of(il)) {
        const size_t n_experts = weights->n_experts_of(t);
        token_bytes += n_experts > 0 ? ggml_nbytes(t) / n_experts * std::min(n_used, n_experts) : ggml_nbytes(t);
    }
    return { tier->info(il).bytes, token_bytes, kv[(size_t) il], p.to[(size_t) il] };
}

int32_t plan_nodes(const char * path, struct llama_model_params mparams, struct llama_context_params cparams,
                   const plan_nodes_cases & cases) {
    if (cases.n_nodes < 1 || cases.n_nodes > max_nodes) {
        throw std::runtime_error(format("%d nodes: a plan has 1 to %d", cases.n_nodes, max_nodes));
    }
    planner plan(path, mparams, cparams, cases.n_nodes);
    for (int32_t i = 0; i < cases.n_cases; ++i) {
        const struct superllama_plan_node * nodes = cases.nodes + i * cases.n_nodes;
        const std::vector<uint64_t> budgets = plan.budgets(nodes);
        const placement p = plan.place(budgets, plan.crossing_s(nodes));
        cases.host[i] = plan.host(p, cases.mem_budgets[i]);
        for (int32_t d = 0; d < cases.n_nodes; ++d) {
            cases.shares[i * cases.n_nodes + d] = plan.share(p, d, budgets[(size_t) d]);
        }
        for (int32_t il = 0; il < std::min(plan.n_layers(), cases.n_layers_max); ++il) {
            cases.layers[i * cases.n_layers_max + il] = plan.layer(p, il);
        }
    }
    return plan.n_layers();
}

} // namespace superllama
