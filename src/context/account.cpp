// What a context has of its model's budget: opened when it is complete, asked before memory is taken, and given back.

#include "context/hooks_impl.h"

#include "llama-adapter.h"

#include <algorithm>

namespace superllama {

static const uint64_t loan_step_bytes = 16u << 20; // memory comes from weights, and returns to them, in steps of this
static const int n_small_graphs_min = 4;           // one after another, before they have what larger ones used

// Where a batch has an output for every token whoever asks: embeddings, encoders, models that look ahead. Upstream's
// buffer has logits and embeddings of each then, and grows to this with the first text of a full ubatch.
static uint64_t outputs_of_all_tokens(const llama_context & ctx) {
    const llama_cparams & cp = ctx.get_cparams();
    const llama_model & model = ctx.get_model();
    if (!cp.embeddings && cp.causal_attn && !llama_model_has_encoder(&model)) {
        return 0;
    }
    const uint64_t numbers = model.vocab.n_tokens() + model.hparams.n_embd_out();
    return std::min(cp.causal_attn ? cp.n_batch : cp.n_ubatch, cp.n_ctx) * numbers * sizeof(float);
}

static uint64_t size_of(const ggml_backend_buffer_ptr & buffer) {
    return buffer != nullptr ? ggml_backend_buffer_get_size(buffer.get()) : 0;
}

void context_hooks::impl::open_account() {
    page_table * pages = paging.pager != nullptr ? paging.pager->get_pages() : nullptr;
    uint64_t page_bytes = 0, kv_bytes = 0, compute_bytes = 0;
    for (const auto & entry : ctx.memory_breakdown()) {
        if (pages != nullptr && entry.first == paging.pager->buffer_type()) {
            page_bytes += std::min<uint64_t>(entry.second.context, pages->budget_bytes());
        } else if (ggml_backend_buft_is_host(entry.first)) {
            kv_bytes += entry.second.context;
            compute_bytes += entry.second.compute;
        }
    }
    for (int il = 0; tier != nullptr && il < tier->n_layers(); ++il) { // the tier charges those of its KV on the host
        kv_bytes -= tier->device_of(il) == nullptr ? device_kv->host_bytes(il) : 0;
    }
    if (ggml_cgraph * gf = largest_graph(ctx)) {
        weights->expect(gf);
    }
    memory = std::make_unique<account>(weights->accounts());
    weights->add_context(this, (int) ctx.n_ubatch());
    const bool lends = devices.empty(); // with devices, copies of their tensors lie in the compute buffers too
    weights->change_charges({
        { &memory->kv_pages, page_bytes, page_bytes },
        { &memory->kv, kv_bytes, kv_bytes },
        { &memory->compute, lends ? 0 : compute_bytes, compute_bytes },
        { &memory->cpu_work, work_bytes(ctx), work_bytes(ctx) },
        { &memory->outputs, output_bytes(ctx), output_bytes(ctx) },
    });
    memory->outputs.use(size_of(ctx.buf_output));
}

uint64_t context_hooks::output_bytes(const llama_context & ctx) {
    return std::max(size_of(ctx.buf_output), outputs_of_all_tokens(ctx));
}

ggml_cgraph * context_hooks::largest_graph(llama_context & ctx) {
    const llm_graph_result * largest = ctx.get_gf_res_reserve();
    return largest != nullptr ? largest->get_gf() : nullptr;
}

// The kernels' work for a graph, and what two graphs are described by: the one that runs, and the largest.
static uint64_t work_of(llama_context & ctx, ggml_backend_sched_t sched, const ggml_cgraph * gf) {
    const auto max_nodes = (size_t) ctx.get_gf_res_reserve()->get_max_nodes();
    const uint64_t described = ggml_tensor_overhead() * max_nodes + ggml_graph_overhead_custom(max_nodes, false);
    const int n_threads = std::max(ctx.n_threads(), ctx.n_threads_batch());
    return cpu_work_bytes(sched, gf, n_threads) + 2 * described;
}

uint64_t context_hooks::work_bytes(llama_context & ctx) {
    const ggml_cgraph * gf = largest_graph(ctx);
    return gf != nullptr ? work_of(ctx, nullptr, gf) : 0;
}

void context_hooks::impl::grant(charge & of, uint64_t bytes) {
    const auto in_steps = [&of](uint64_t n) { return std::min<uint64_t>(GGML_PAD(n, loan_step_bytes), of.promised()); };
    // not less before half a step more would fit: a page that comes and goes moves nothing
    const uint64_t granted = std::min(std::max(of.granted(), in_steps(bytes)), in_steps(bytes + loan_step_bytes / 2));
    if (granted != of.granted()) {
        weights->grant(of, granted);
    }
}

void context_hooks::impl::grant_compute(const ggml_cgraph * gf) {
    charge & compute = memory->compute;
    const uint64_t in_memory = buffers.add(gf);
    grant(compute, std::max<uint64_t>(in_memory, compute.granted()));
    compute.use(in_memory);
    const bool small = buffers.bytes_of_graph() + loan_step_bytes < compute.granted();
    n_small_graphs = small ? n_small_graphs + 1 : 0;
    if (n_small_graphs >= n_small_graphs_min) {
        n_small_graphs = 0;
        buffers.give_back();
        compute.use(buffers.bytes_of_graph());
        grant(compute, buffers.bytes_of_graph());
    }
}

// Upstream reserves anew when a context is used in another way, and a graph may ask for more then.
void context_hooks::impl::charge_buffers(const ggml_cgraph * gf) {
    uint64_t bytes = 0;
    for (ggml_backend_t backend : ctx.backend_ptrs) {
        if (ggml_backend_buft_is_host(ggml_backend_sched_get_buffer_type(ctx.get_sched(), backend))) {
            bytes += ggml_backend_sched_get_buffer_size(ctx.get_sched(), backend);
        }
    }
    charge & compute = memory->compute;
    if (bytes > compute.promised()) {
        weights->change_charges({ { &compute, devices.empty() ? compute.granted() : bytes, bytes } });
    }
    if (devices.empty()) {
        grant_compute(gf);
    }
}

void context_hooks::impl::charge_cpu_work(const ggml_cgraph * gf) {
    const uint64_t bytes = work_of(ctx, ctx.get_sched(), gf);
    if (bytes > memory->cpu_work.granted()) {
        weights->change_charges({ { &memory->cpu_work, bytes, bytes } });
    }
}

// They are made when they are first set, all layers' at once.
void context_hooks::impl::charge_control_vectors() {
    const llama_hparams & hparams = ctx.get_model().hparams;
    bool any = false;
    for (int il = 0; !any && ctx.cvec != nullptr && il < (int) hparams.n_layer(); ++il) {
        any = ctx.cvec->tensor_for(il) != nullptr;
    }
    const uint64_t bytes = any ? (uint64_t) hparams.n_layer() * hparams.n_embd * sizeof(float) : 0;
    if (bytes > memory->adapters.granted()) {
        weights->change_charges({ { &memory->adapters, bytes, bytes } });
    }
}

bool context_hooks::before_outputs(size_t bytes) {
    if (pimpl->memory == nullptr) {
        return true; // there is no budget, or the context is being made
    }
    return pimpl->guarded([&] {
        const uint64_t granted = std::max<uint64_t>(bytes, outputs_of_all_tokens(pimpl->ctx));
        pimpl->weights->change_charges({ { &pimpl->memory->outputs, granted, granted } });
        pimpl->memory->outputs.use(bytes);
        return true;
    });
}

} // namespace superllama
