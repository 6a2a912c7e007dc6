// Which caches can be paged, and what such a one has from its beginning.

#include "kv/pager.h"

#include "base/error.h"
#include "io/readers.h"
#include "llama-context.h"
#include "llama-model.h"
#include "telemetry/memory.h"

#include "ggml-backend-impl.h"

#include <algorithm>

namespace superllama {

using page_id = page_table::page_id;

kv_paging *& kv_paging::current() {
    static thread_local kv_paging * offer = nullptr;
    return offer;
}

// Empty where the cache can be paged.
static std::string not_eligible(const llama_model & model, const llama_hparams & hparams, bool v_trans, bool shared,
                                llama_swa_type swa_type, bool on_devices,
                                const llama_kv_cache::layer_filter_cb & filter) {
    if (!kv_spill::is_supported()) {
        return "not supported on this system";
    }
    if (shared) {
        return "the cache is shared with another context";
    }
    if (swa_type != LLAMA_SWA_TYPE_NONE) {
        return "the sliding-window part of the cache is small and changes in place";
    }
    if (v_trans) {
        return "V is transposed; turn flash attention on";
    }
    switch (model.arch) { // caches that mirror each other cell by cell
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_QWEN4EXP:
            return "the model keeps an index beside its cache";
        default:
            break;
    }
    uint32_t n_device = 0, n_layers = 0;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!hparams.has_kv(il) || (filter && !filter((int32_t) il))) {
            continue;
        }
        ggml_backend_dev_t dev = model.dev_layer((int) il);
        n_layers++;
        n_device += on_devices && ggml_backend_dev_buffer_type(dev) != ggml_backend_cpu_buffer_type();
    }
    if (n_device > 0) {
        return format("%u of %u layers keep their cache on a device for good; --dynamic-layers lets it come and go, "
                      "-nkvo keeps it in host memory",
                      n_device, n_layers);
    }
    return n_layers == 0 ? "the cache holds no layer" : "";
}

std::shared_ptr<kv_pager> kv_pager::create(llama_kv_cache & kv, bool offload,
                                           const llama_kv_cache::layer_filter_cb & filter) {
    kv_paging * offer = kv_paging::current();
    if (offer == nullptr || kv.hparams.no_alloc) {
        return nullptr;
    }
    const bool on_devices = offload && !offer->may_move;
    std::string reason =
        not_eligible(kv.model, kv.hparams, kv.v_trans, kv.other != nullptr, kv.swa_type, on_devices, filter);
    if (reason.empty() && offer->pager != nullptr) {
        reason = "the context has a second cache";
    }
    if (!reason.empty()) {
        offer->reason = reason;
        return nullptr;
    }
    auto pager = std::make_shared<kv_pager>(kv, offload, *offer);
    offer->pager = pager.get();
    return pager;
}

kv_pager::kv_pager(llama_kv_cache & kv, bool offload, kv_paging & offer) :
    offer(&offer),
    kv(kv),
    params(offer.params),
    host_only(offer.host_only),
    offload(offload),
    pool(offer.pool) {
    buft = std::make_unique<ggml_backend_buffer_type>();
    buft->iface.get_name = [](ggml_backend_buffer_type_t) { return "CPU_KV_Paged"; };
    buft->iface.alloc_buffer = alloc_buffer;
    buft->iface.get_alignment = [](ggml_backend_buffer_type_t) { return system_page(); };
    buft->iface.is_host = [](ggml_backend_buffer_type_t) { return true; };
    buft->device = ggml_backend_buft_get_device(ggml_backend_cpu_buffer_type());
    buft->context = this;
}

kv_pager::~kv_pager() {
    if (offer != nullptr && offer->pager == this) {
        offer->pager = nullptr;
    }
}

kv_paging::~kv_paging() {
    if (pager != nullptr) {
        pager->offer = nullptr;
    }
}

void kv_pager::attach() {
    kv_geometry g;
    g.n_streams = kv.n_stream;
    g.n_cells = kv.get_size();
    g.page_cells = std::min((uint32_t) params.kv_page_size, g.n_cells);
    for (const auto & layer : kv.layers) {
        std::vector<kv_rows> rows = { { (uint8_t *) layer.k->data, layer.k->nb[1] } };
        index_of[(int) layer.il] = (uint32_t) g.layers.size();
        layer_of[layer.k] = (uint32_t) g.layers.size();
        if (layer.v != nullptr) {
            rows.push_back({ (uint8_t *) layer.v->data, layer.v->nb[1] });
            layer_of[layer.v] = (uint32_t) g.layers.size();
        }
        g.layers.push_back(rows);
    }

    if (params.paged_kv) {
        pages = spilled_pages(g);
    } else {
        const kv_layout layout(g);
        pages = std::make_unique<page_table>(layout, layout.n_pages() * layout.page_charge(), nullptr, nullptr,
                                             [this](page_id p) { return inspect(p); });
    }
    seq_used.resize(LLAMA_MAX_SEQ);
    page_used.resize(pages->n_pages());
    n_used.resize(kv.n_stream);
    broken.resize(kv.n_stream);

    on_device.resize(kv.layers.size());
    cells_on_device.resize(kv.layers.size());
    expect_cells(0);
    for (uint32_t layer = 0; layer < kv.layers.size(); ++layer) {
        uint64_t bytes = 0;
        for (const ggml_tensor * t : rows_of(layer)) {
            bytes += t->nb[1];
        }
        bytes_of_cell += bytes;
        bytes_of_cell_max = std::max(bytes_of_cell_max, bytes);
    }
    in_pages = kv.layers.front().k->buffer;
    if (offload && offer->may_move) {
        offer->may_move();
    }
}

std::unique_ptr<page_table> kv_pager::spilled_pages(const kv_geometry & g) {
    uint64_t budget = params.kv_budget_bytes;
    if (budget == 0) {
        budget = memory_telemetry().sample().host_available / 2;
        budget = budget == 0 ? (uint64_t) 4 << 30 : budget;
    }
    // buffers for reading and writing are part of what the cache may hold
    const kv_layout layout(g);
    const uint64_t bounce = layout.bounce_bytes() * (pool != nullptr ? 1 + (uint64_t) pool->n_threads() : 1);
    const auto spill_dir = std::string(params.spill_dir != nullptr ? params.spill_dir : "");
    auto spill = std::make_unique<kv_spill>(spill_dir, layout.record_bytes());
    auto made = std::make_unique<page_table>(layout, budget > bounce ? budget - bounce : 0, std::move(spill),
                                             pool.get(), [this](page_id p) { return inspect(p); });

    // one full sequence must fit, if only layer by layer; moves within the cache need two pages
    uint64_t least = 2 * made->page_charge();
    if (host_only) {
        least = std::max(least, (uint64_t) made->pages_per_stream() * made->layer_charge_max());
    }
    if (made->budget_bytes() < least) {
        throw std::runtime_error(
            format("--kv-budget %s is too small: a context of %u cells per sequence with pages of %u cells (%s each) "
                   "needs at least %s; raise it, or make the context or the pages smaller",
                   kv_mib(budget).c_str(), g.n_cells, g.page_cells, kv_mib(made->page_charge()).c_str(),
                   kv_mib(least + bounce).c_str()));
    }
    if (made->spill_file().is_memory()) {
        LLAMA_LOG_WARN(
            "%s: the spill file in %s lies in memory: what is spilled frees none; name a folder on a disk with "
            "--spill-dir\n",
            __func__, made->spill_file().folder().c_str());
    }
    LLAMA_LOG_INFO("%s: KV cache in pages of %u cells, %s each, budget %s, spill file %s\n", __func__, g.page_cells,
                   kv_mib(made->page_charge()).c_str(), kv_mib(budget).c_str(),
                   made->spill_file().is_direct() ? "with direct I/O" : "through the page cache");
    return made;
}

} // namespace superllama
