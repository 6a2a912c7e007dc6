// The C API of superllama.h: thin, and no exception leaves it.

#include "superllama.h"

#include "devices/lost.h"
#include "llama-context.h"
#include "telemetry/cores.h"
#include "telemetry/memory.h"
#include "llama-model.h"
#include "model/dynamic_model.h"
#include "base/error.h"
#include "api/grammar_limits.h"
#include "api/plan.h"
#include "api/plan_nodes.h"
#include "api/budget_text.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

using namespace superllama;

// Runs `body`; what it throws becomes superllama_last_error() and -1.
template <typename F>
static int32_t guarded(const F & body) {
    int32_t result = -1;
    set_error("");
    return tried([&] { result = body(); }) ? result : -1;
}

// As many of `found` as there is room for; returns how many there are.
template <typename T>
static int32_t fill(T * out, int32_t n_max, const std::vector<T> & found) {
    std::copy_n(found.begin(), std::max(0, std::min(n_max, (int32_t) found.size())), out);
    return (int32_t) found.size();
}

const char * superllama_version(void) {
    return SUPERLLAMA_VERSION;
}

const char * superllama_upstream_build(void) {
    return SUPERLLAMA_UPSTREAM_BUILD;
}

const char * superllama_last_error(void) {
    return error_text();
}

int32_t superllama_size(const char * text, uint64_t * bytes) {
    return guarded([&] {
        *bytes = parse_budget(text);
        return 0;
    });
}

int32_t superllama_memory(struct superllama_memory * out) {
    return guarded([&] {
        *out = memory_telemetry().sample();
        return 0;
    });
}

struct llama_sampler * superllama_sampler_init_grammar(const struct llama_vocab * vocab, const char * grammar,
                                                       const char * root) {
    struct llama_sampler * sampler = nullptr;
    guarded([&] {
        check_grammar(vocab, grammar, root);
        sampler = llama_sampler_init_grammar(vocab, grammar, root);
        return 0;
    });
    return sampler;
}

int32_t superllama_check_grammar(const struct llama_vocab * vocab, const char * grammar, const char * root) {
    return guarded([&] {
        check_grammar(vocab, grammar, root);
        return 0;
    });
}

int32_t superllama_sampler_apply(struct llama_sampler * smpl, llama_token_data_array * tokens) {
    return guarded([&] {
        llama_sampler_apply(smpl, tokens);
        return 0;
    });
}

int32_t superllama_sampler_accept(struct llama_sampler * smpl, llama_token token) {
    return guarded([&] {
        llama_sampler_accept(smpl, token);
        return 0;
    });
}

int32_t superllama_usable_cores(int32_t n) {
    tried([&] { n = usable_cores(n); });
    return n;
}

double superllama_cpu_quota(void) {
    double quota = 0;
    tried([&] { quota = cpu_groups().quota(); });
    return quota;
}

const char * superllama_memory_tag(int32_t i) {
    static_assert(SUPERLLAMA_N_MEMORY_TAGS == n_memory_tags, "the header names all tags");
    return i >= 0 && i < SUPERLLAMA_N_MEMORY_TAGS ? name_of((memory_tag) i) : nullptr;
}

int32_t superllama_memory_by_tag(const struct llama_model * model, int64_t out[SUPERLLAMA_N_MEMORY_TAGS]) {
    return guarded([&] {
        std::fill_n(out, SUPERLLAMA_N_MEMORY_TAGS, 0);
        if (model->superllama) {
            const auto bytes = model->superllama->memory_by_tag();
            std::copy(bytes.begin(), bytes.end(), out);
        }
        return 0;
    });
}

int32_t superllama_charge_prompt_cache(struct llama_context * ctx, uint64_t bytes) {
    return guarded([&] {
        ctx->superllama->charge_prompt_cache(bytes);
        return 0;
    });
}

int32_t superllama_stats(const struct llama_context * ctx, struct superllama_stats * out) {
    return guarded([&] {
        ctx->superllama->stats(*out);
        return 0;
    });
}

int32_t superllama_kv_pages(const struct llama_context * ctx, struct superllama_kv_pages * out) {
    return guarded([&] {
        ctx->superllama->kv_pages(*out);
        return 0;
    });
}

int32_t superllama_kv_seq_pages(const struct llama_context * ctx, llama_seq_id seq,
                                struct superllama_kv_seq_pages * out) {
    return guarded([&] {
        ctx->superllama->kv_seq_pages(seq, *out);
        return 0;
    });
}

int32_t superllama_seq_stats(const struct llama_context * ctx, struct superllama_seq_stats * out, int32_t n_max) {
    return guarded([&] {
        const std::vector<struct superllama_seq_stats> found = ctx->superllama->seq_stats();
        return fill(out, n_max, found);
    });
}

int32_t superllama_kv_prefetch(struct llama_context * ctx, llama_seq_id seq) {
    return guarded([&] { return (int32_t) ctx->superllama->kv_prefetch(seq); });
}

int32_t superllama_metrics_json(const struct llama_context * ctx, char * buf, size_t size) {
    return guarded([&] {
        const std::string json = ctx->superllama->metrics_json();
        if (json.size() < size) {
            memcpy(buf, json.c_str(), json.size() + 1);
        }
        return (int32_t) json.size();
    });
}

int32_t superllama_layers(const struct llama_model * model, struct superllama_layer * out, int32_t n_max) {
    return guarded([&] {
        if (model->superllama == nullptr) {
            return 0;
        }
        std::vector<struct superllama_layer> layers;
        for (const auto & l : model->superllama->sched().layers()) {
            layers.push_back({ l.index, l.bytes_resident < l.bytes ? SUPERLLAMA_TIER_DISK : SUPERLLAMA_TIER_HOST,
                               (int64_t) l.bytes, (int64_t) l.bytes_resident, l.last_use, l.n_loads, l.n_evictions,
                               nullptr, 0, 0 });
        }
        if (const device_tier * tier = model->superllama->tier()) {
            const int32_t n_output = tier->n_layers() - 1;
            const auto bytes = (int64_t) tier->info(n_output).bytes;
            layers.push_back({ n_output, SUPERLLAMA_TIER_HOST, bytes, bytes, 0, 0, 0, nullptr, 0, 0 });
            for (struct superllama_layer & l : layers) {
                const auto on = tier->info(l.index);
                l.n_device_loads = on.n_loads;
                l.n_device_evictions = on.n_evictions;
                if (on.device != nullptr) {
                    l.tier = SUPERLLAMA_TIER_DEVICE;
                    l.device = ggml_backend_dev_name(on.device);
                    l.bytes = l.bytes_resident = (int64_t) on.bytes;
                }
            }
        }
        return fill(out, n_max, layers);
    });
}

int32_t superllama_experts(const struct llama_model * model, struct superllama_expert * out, int32_t n_max) {
    return guarded([&] {
        const auto experts = model->superllama ? model->superllama->experts() : std::vector<struct superllama_expert>();
        return fill(out, n_max, experts);
    });
}

int32_t superllama_devices(const struct llama_model * model, struct superllama_device * out, int32_t n_max) {
    return guarded([&] {
        const device_tier * tier = model->superllama ? model->superllama->tier() : nullptr;
        const auto found = tier != nullptr ? tier->count_devices() : std::vector<struct superllama_device>();
        return fill(out, n_max, found);
    });
}

static dynamic_model & with_budgets(const struct llama_model * model) {
    if (model->superllama == nullptr) {
        throw std::runtime_error("the model was loaded without dynamic layers; it has no budget to set");
    }
    return *model->superllama;
}

int32_t superllama_set_budgets(struct llama_model * model, const uint64_t * mem_budget_bytes,
                               const uint64_t * vram_budget_bytes) {
    return guarded([&] {
        with_budgets(model).set_budgets(mem_budget_bytes, vram_budget_bytes);
        return 0;
    });
}

int32_t superllama_budgets(const struct llama_model * model, uint64_t * mem_budget_bytes,
                           uint64_t vram_budget_bytes[SUPERLLAMA_MAX_DEVICES]) {
    return guarded([&] {
        with_budgets(model).budgets(mem_budget_bytes, vram_budget_bytes);
        return 0;
    });
}

int32_t superllama_budget_range(const struct llama_model * model, uint64_t * least, uint64_t * full) {
    return guarded([&] {
        with_budgets(model).budget_range(least, full);
        return 0;
    });
}

int32_t superllama_vram_budget(const char * text, uint64_t bytes[SUPERLLAMA_MAX_DEVICES]) {
    return guarded([&] {
        parse_vram_budget(text, bytes);
        return 0;
    });
}

int32_t superllama_rpc_secret(const char * endpoint, const char * path) {
    return guarded([&] {
        using set_secret = const char * (*) (const char *, const char *);
        ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
        const auto set = rpc ? (set_secret) ggml_backend_reg_get_proc_address(rpc, "superllama_rpc_secret") : nullptr;
        if (set == nullptr) {
            throw std::runtime_error("this build has no RPC backend (GGML_RPC)");
        }
        if (const char * error = set(endpoint, path)) {
            throw std::runtime_error(error);
        }
        return 0;
    });
}

int32_t superllama_add_rpc_server(const char * endpoint) {
    return guarded([&] {
        using add_server = ggml_backend_reg_t (*)(const char *);
        ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
        const auto add =
            rpc ? (add_server) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server") : nullptr;
        if (add == nullptr) {
            throw std::runtime_error("this build has no RPC backend (GGML_RPC)");
        }
        survive_lost_devices();
        ggml_backend_reg_t server = add(endpoint);
        if (server == nullptr) {
            throw std::runtime_error(std::string("the RPC server at ") + endpoint + " offers no device");
        }
        bool known = false;
        for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
            known = known || ggml_backend_reg_get(i) == server;
        }
        if (!known) {
            ggml_backend_register(server);
        }
        return (int32_t) ggml_backend_reg_dev_count(server);
    });
}

int32_t superllama_plan(const char * path, struct llama_model_params mparams, struct llama_context_params cparams,
                        const uint64_t * budgets, int32_t n_budgets, struct superllama_plan * out) {
    return guarded([&] {
        plan_rows(path, mparams, cparams, budgets, n_budgets, out);
        return 0;
    });
}

int32_t superllama_plan_nodes(const char * path, struct llama_model_params mparams, struct llama_context_params cparams,
                              const struct superllama_plan_node * nodes, int32_t n_nodes, const uint64_t * mem_budgets,
                              int32_t n_cases, struct superllama_plan * host, struct superllama_node_share * shares,
                              struct superllama_plan_layer * layers, int32_t n_layers_max) {
    return guarded([&] {
        return plan_nodes(path, mparams, cparams,
                          { nodes, n_nodes, mem_budgets, n_cases, host, shares, layers, n_layers_max });
    });
}

double superllama_measure_cpu(enum ggml_type type, bool repack, int32_t n_threads) {
    double rate = 0;
    guarded([&] {
        rate = superllama_measure_matvec(type, repack, n_threads);
        return 0;
    });
    return rate;
}
