#include "api/plan.h"

#include "llama-context.h"
#include "context/hooks.h"
#include "llama-cpp.h"
#include "llama-model.h"
#include "model/dynamic_model.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"
#include "ggml-backend.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace superllama {

static llama_model_ptr load(const char * path, const llama_model_params & params) {
    llama_model_ptr model(llama_model_load_from_file(path, params));
    if (model == nullptr) {
        throw std::runtime_error(std::string("cannot read the metadata of ") + path + "; the log says why");
    }
    return model;
}

llama_model_ptr plan_dry_model(const char * path, struct llama_model_params mparams) {
    mparams.no_alloc = true;
    mparams.load_mode = LLAMA_LOAD_MODE_NONE; // a dry run must not map the file
    mparams.superllama.dynamic_layers = false;
    return load(path, mparams);
}

llama_context_ptr plan_dry_context(llama_model * dry, const struct llama_context_params & cparams) {
    llama_context_ptr ctx(llama_init_from_model(dry, cparams));
    if (ctx == nullptr) {
        throw std::runtime_error("no context of this size can be made; the log says why");
    }
    return ctx;
}

llama_model_ptr plan_laid_out(const char * path, struct llama_model_params mparams) {
    mparams.no_alloc = false;
    mparams.load_mode = LLAMA_LOAD_MODE_NONE;
    mparams.superllama.dynamic_layers = true;
    mparams.superllama.async_prefetch = false;
    mparams.superllama.plan_only = true;
    return load(path, mparams);
}

void plan_context(llama_context & ctx, struct superllama_plan & common) {
    for (const auto & entry : ctx.memory_breakdown()) {
        if (ggml_backend_buft_is_host(entry.first)) {
            common.kv_bytes += entry.second.context;
            common.compute_bytes += entry.second.compute;
        }
    }
    common.compute_bytes += context_hooks::output_bytes(ctx) + context_hooks::work_bytes(ctx);
    common.n_ubatch = (int32_t) ctx.n_ubatch();
    const llama_hparams & hparams = ctx.get_model().hparams;
    common.n_layers = (int32_t) hparams.n_layer();
    common.n_experts = (int32_t) hparams.n_expert;
    common.n_experts_used = (int32_t) hparams.n_expert_used_max();
}

void plan_weights(const dynamic_model & weights, const struct llama_model_params & mparams,
                  struct superllama_plan & common) {
    common.fixed_bytes = weights.fixed_bytes();
    common.repacked_bytes = weights.converted_bytes();
    common.n_blocks = (int32_t) weights.n_blocks();
    common.projector_bytes = mparams.superllama.projector_bytes;
}

struct superllama_plan plan_row(const dynamic_model & weights, const struct superllama_plan & common, uint64_t budget) {
    const uint64_t taken = common.fixed_bytes + common.kv_bytes + common.compute_bytes + common.projector_bytes;
    const uint64_t usable = dynamic_model::without_page_tables(budget);
    const weights_budget b = weights.plan(usable - std::min(usable, taken), common.n_ubatch);
    struct superllama_plan row = common;

    row.mem_budget_bytes = budget;
    row.mem_least_bytes = dynamic_model::with_page_tables(taken + b.min_bytes);
    row.mem_full_bytes = dynamic_model::with_page_tables(taken + b.full_bytes());
    row.works = budget >= row.mem_least_bytes;
    row.dense_bytes = b.dense_bytes;
    row.expert_bytes = b.expert_bytes;
    row.pinned_bytes = b.pinned_bytes;
    row.ring_bytes = b.ring_bytes;
    row.expert_pool_bytes = b.pool_bytes;
    row.streamed_bytes = b.streamed_bytes;
    row.expert_used_bytes =
        common.n_experts > 0 ? b.expert_bytes / (uint64_t) common.n_experts * (uint64_t) common.n_experts_used : 0;
    return row;
}

void plan_rows(const char * path, struct llama_model_params mparams, struct llama_context_params cparams,
               const uint64_t * budgets, int32_t n_budgets, struct superllama_plan * out) {
    struct superllama_plan common = {};

    // what a context takes: from a dry run of upstream's
    const llama_model_ptr dry = plan_dry_model(path, mparams);
    const llama_context_ptr ctx = plan_dry_context(dry.get(), cparams);
    plan_context(*ctx, common);

    // the layout of the weights: as in a load that stops before it reads
    const llama_model_ptr model = plan_laid_out(path, mparams);
    dynamic_model & weights = *model->superllama;
    if (ggml_cgraph * gf = context_hooks::largest_graph(*ctx)) {
        weights.expect(gf);
    }
    plan_weights(weights, mparams, common);
    for (int32_t i = 0; i < n_budgets; ++i) {
        out[i] = plan_row(weights, common, budgets[i]);
    }
}

// ----------------------------------------------------------------------------------------------------- CPU

static ggml_backend_buffer_type_t repacking_buffer_type(ggml_backend_dev_t dev) {
    const auto extra = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    ggml_backend_buffer_type_t * bufts = extra != nullptr ? extra(dev) : nullptr;
    for (; bufts != nullptr && *bufts != nullptr; ++bufts) {
        if (std::string(ggml_backend_buft_name(*bufts)) == "CPU_REPACK") {
            return *bufts;
        }
    }
    return nullptr;
}

// Matrices larger than the caches, each multiplied with a vector, as in generating one token.
double superllama_measure_matvec(enum ggml_type type, bool repack, int32_t n_threads) {
    const int64_t n_embd = 2048, n_rows = 4096, n_matrices = 16;

    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const ggml_backend_ptr backend(dev != nullptr ? ggml_backend_dev_init(dev, nullptr) : nullptr);
    if (backend == nullptr) {
        throw std::runtime_error("no CPU backend is loaded");
    }
    const auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
    if (set_n_threads != nullptr) {
        set_n_threads(backend.get(), n_threads);
    }

    const ggml_init_params params = { 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    const ggml_context_ptr weights_ctx(ggml_init(params));
    std::vector<ggml_tensor *> weights;
    for (int64_t i = 0; i < n_matrices; ++i) {
        weights.push_back(ggml_new_tensor_2d(weights_ctx.get(), type, n_embd, n_rows));
    }
    ggml_backend_buffer_type_t buft = repack ? repacking_buffer_type(dev) : nullptr;
    ggml_backend_buffer_ptr memory(buft ? ggml_backend_alloc_ctx_tensors_from_buft(weights_ctx.get(), buft) : nullptr);
    if (memory == nullptr || weights[0]->extra == nullptr) { // no layout of its own for this type
        for (ggml_tensor * w : weights) {
            w->data = nullptr;
            w->buffer = nullptr;
        }
        memory.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights_ctx.get(), ggml_backend_cpu_buffer_type()));
    }

    const ggml_context_ptr ctx(ggml_init(params));
    ggml_tensor * x = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, 1);
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    for (ggml_tensor * w : weights) {
        ggml_build_forward_expand(gf, ggml_mul_mat(ctx.get(), w, x));
    }
    const ggml_backend_buffer_ptr work(
        ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    if (memory == nullptr || work == nullptr) {
        throw std::runtime_error("no memory for a measurement of the CPU");
    }
    const std::vector<uint8_t> zeros(ggml_nbytes(weights[0]), 0);
    for (ggml_tensor * w : weights) {
        ggml_backend_tensor_set(w, zeros.data(), 0, zeros.size());
    }
    ggml_backend_tensor_memset(x, 0, 0, ggml_nbytes(x));

    int64_t best_us = INT64_MAX;
    for (int i = 0; i < 5; ++i) {
        const int64_t t = ggml_time_us();
        ggml_backend_graph_compute(backend.get(), gf);
        best_us = std::min(best_us, ggml_time_us() - t);
    }
    return 1e6 * (double) zeros.size() * (double) n_matrices / (double) std::max<int64_t>(1, best_us);
}

} // namespace superllama
