// A context whose layers may be on devices: what holds them in place, compute buffers there, devices that are gone.

#include "context/hooks_impl.h"

#include "devices/lost.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace superllama {

static const uint32_t offload_tokens_min = 32; // devices take no smaller batches, unless the environment says so

std::unique_lock<std::recursive_mutex> context_hooks::hold() const {
    return pimpl->tier != nullptr ? pimpl->tier->hold() : std::unique_lock<std::recursive_mutex>();
}

// The cache may be gone before the context is: then there is nothing of it.
std::unique_ptr<layer_kv::cache> context_hooks::impl::paged_layers(const kv_paging & paging) {
    class paged : public layer_kv::cache {
      public:
        explicit paged(const kv_paging & of) : of(of) {}
        size_t device_bytes(int il) const override { return has(il) ? of.pager->device_bytes(il) : 0; }
        size_t spare_bytes() const override { return of.pager != nullptr ? of.pager->spare_bytes() : 0; }
        bool is_at(int il, ggml_backend_buffer_type_t buft) const override {
            return !has(il) || of.pager->is_at(il, buft);
        }
        bool move(int il, ggml_backend_buffer_type_t to, uint64_t * copied) override {
            return !has(il) || of.pager->move(il, to, copied);
        }

      private:
        bool has(int il) const { return of.pager != nullptr && of.pager->has_layer(il); }
        const kv_paging & of;
    };
    return std::make_unique<paged>(paging);
}

// The largest graphs refer to all cells of the KV cache, also to those for which a device has no memory yet.
context_hooks::all_cells context_hooks::with_all_cells() const {
    return { hold(), pimpl->paging.pager };
}

context_hooks::all_cells::all_cells(std::unique_lock<std::recursive_mutex> placement, kv_pager * pager) :
    placement(std::move(placement)),
    pager(pager) {
    if (pager != nullptr) {
        pager->show_all_cells(true);
    }
}

context_hooks::all_cells::all_cells(all_cells && other) noexcept :
    placement(std::move(other.placement)),
    pager(std::exchange(other.pager, nullptr)) {}

context_hooks::all_cells::~all_cells() {
    if (pager != nullptr) {
        pager->show_all_cells(false);
    }
}

// The KV cache is going to have more cells, or may have fewer: layers make room for them on devices.
void context_hooks::impl::resize_kv() {
    std::string error;
    if (!tier->place(&error)) {
        LLAMA_LOG_WARN("superllama: %s\n", error.c_str());
    }
}

// Before upstream looks where operations would run, which tells it what the devices support.
context_hooks::all_cells context_hooks::begin_reserve() {
    auto placement = with_all_cells();
    if (pimpl->tier != nullptr) {
        const llama_cparams & cp = pimpl->ctx.cparams;
        pimpl->device_kv->offloads = pimpl->offload_asked && std::min(cp.n_ctx, cp.n_ubatch) >= offload_tokens_min;
        std::string error;
        if (!pimpl->tier->place(&error)) {
            LLAMA_LOG_WARN("superllama: %s\n", error.c_str());
        }
        if (!pimpl->ctx.cparams.op_offload) {
            pimpl->need_without_offload = pimpl->device_kv->compute_need;
        }
        pimpl->ctx.cparams.op_offload = pimpl->offload_asked; // before_reserve() sees whether there is room for it
    }
    return placement;
}

// Bytes per device of the tier, of sizes per backend of the context.
static std::vector<size_t> by_device(const std::vector<llama_device> & devices,
                                     const std::vector<ggml_backend_t> & backends, const std::vector<size_t> & sizes) {
    std::vector<size_t> result(devices.size());
    for (size_t b = 0; b < backends.size(); ++b) {
        for (size_t d = 0; d < devices.size(); ++d) {
            result[d] += ggml_backend_get_device(backends[b]) == devices[d].dev ? sizes[b] : 0;
        }
    }
    return result;
}

// Of compute buffers, per device.
std::vector<size_t> context_hooks::buffer_sizes() const {
    const llama_context & ctx = pimpl->ctx;
    std::vector<size_t> sizes;
    for (ggml_backend_t backend : ctx.backend_ptrs) {
        sizes.push_back(ggml_backend_sched_get_buffer_size(ctx.sched.get(), backend));
    }
    return by_device(ctx.model.devices, ctx.backend_ptrs, sizes);
}

void context_hooks::count_compute_buffers() {
    pimpl->device_kv->compute_now = buffer_sizes();
    pimpl->placement = pimpl->tier->generation();
    pimpl->tier->refresh();
}

bool context_hooks::lost_device(std::string * error) const {
    const auto placement = hold();
    bool any = false;
    for (ggml_backend_t backend : pimpl->ctx.backend_ptrs) {
        if (!is_lost(backend)) {
            continue;
        }
        any = true;
        ggml_backend_dev_t dev = ggml_backend_get_device(backend);
        *error =
            format("the RPC server at %s is gone, and what this context had there; free the context and make a new "
                   "one",
                   ggml_backend_dev_description(dev));
        for (size_t d = 0; d < pimpl->tier->n_devices() && !pimpl->lost; ++d) {
            std::string why;
            if (pimpl->ctx.model.devices[d].dev == dev && !pimpl->tier->device_lost(d, &why)) {
                LLAMA_LOG_ERROR("superllama: %s\n", why.c_str());
            }
        }
    }
    pimpl->lost = pimpl->lost || any;
    return any;
}

// What was asked for comes later than the graph ends, and a device that is lost meanwhile answers with zeros.
bool context_hooks::after_outputs() {
    std::string error;
    if (pimpl->tier == nullptr) {
        return true;
    }
    for (ggml_backend_t backend : pimpl->ctx.backend_ptrs) {
        if (may_be_lost(backend)) {
            ggml_backend_synchronize(backend);
        }
    }
    return !lost_device(&error) || pimpl->say(error);
}

// The scheduler knows how it would cut the graph and has allocated nothing yet.
void context_hooks::before_reserve(const llama_memory_context_i * mctx) {
    llama_context & ctx = pimpl->ctx;
    device_tier * tier = pimpl->tier;
    if (tier == nullptr) {
        return;
    }
    layer_kv & kv = *pimpl->device_kv;
    const uint32_t n_seqs = ctx.cparams.n_seq_max;
    const uint32_t n_tokens = std::min(ctx.cparams.n_ctx, ctx.cparams.n_ubatch);
    const uint32_t n_outputs = std::min(n_tokens, ctx.cparams.n_outputs_max);
    std::string error;
    if (lost_device(&error)) {
        return; // nothing is left there; the next ubatch says so
    }
    const auto without_offload = [&] { // there is no room on a device for the weights of one operation
        ctx.cparams.op_offload = kv.offloads = false;
        ctx.sched.reset(ggml_backend_sched_new(ctx.backend_ptrs.data(), ctx.backend_buft.data(),
                                               (int) ctx.backend_ptrs.size(), ctx.graph_max_nodes(n_tokens),
                                               ctx.cparams.pipeline_parallel, false));
        kv.compute_need = pimpl->need_without_offload;
    };
    for (;;) {
        error.clear();
        bool fits = tier->place(&error);
        std::vector<size_t> sizes(ctx.backend_ptrs.size());
        ctx.graph_reserve(n_tokens, n_seqs, n_outputs, mctx, true, sizes.data());
        const std::vector<size_t> need = by_device(ctx.model.devices, ctx.backend_ptrs, sizes);
        for (size_t d = 0; d < need.size(); ++d) {
            fits = fits && need[d] <= kv.compute_need[d];
            kv.compute_need[d] = std::max(kv.compute_need[d], need[d]);
        }
        if (ctx.cparams.op_offload && !tier->has_room()) {
            without_offload();
            continue;
        }
        if (!error.empty()) {
            throw std::runtime_error(error);
        }
        if (!fits) {
            continue; // with these needs, fewer layers may
        }
        const bool allocates = tier->n_device_layers() > 0 || ctx.cparams.op_offload;
        if (!allocates || ctx.graph_reserve(n_tokens, n_seqs, n_outputs, mctx) != nullptr) {
            break;
        }
        const std::vector<size_t> got = buffer_sizes();
        bool fewer = false;
        for (size_t d = 0; d < need.size() && !fewer; ++d) { // the first whose buffer is missing, or too small still
            fewer = got[d] < need[d] && tier->allocation_failed(d, &error);
        }
        if (!fewer && ctx.cparams.op_offload) {
            without_offload();
            continue;
        }
        if (!fewer && !error.empty()) {
            throw std::runtime_error("a device has no memory for the compute buffers, and no layer can leave it: " +
                                     error);
        }
        if (!fewer) {
            break; // upstream's own attempt says it again, and what it wanted
        }
    }
    count_compute_buffers();
}

} // namespace superllama
