#include "llama-kv-cache-paged.h"

#include "ggml-backend-impl.h"
#include "llama-context.h"
#include "llama-kv-memory.h"
#include "llama-mem-telemetry.h"
#include "llama-model.h"
#include "llama-prefetch.h"
#include "superllama-error.h"

#include <algorithm>
#include <cstring>

using page_id = llama_kv_pages::page_id;

static std::string mib(uint64_t bytes) {
    return format("%.1f MiB", (double) bytes / (1024.0 * 1024.0));
}

llama_kv_paging *& llama_kv_paging::current() {
    static thread_local llama_kv_paging * offer = nullptr;
    return offer;
}

// ----------------------------------------------------------------------------------------------- creation

// Empty where the cache can be paged.
static std::string not_eligible(const llama_model & model, const llama_hparams & hparams, bool v_trans, bool shared,
                                llama_swa_type swa_type, bool offload, const llama_kv_cache::layer_filter_cb & filter) {
    if (!llama_kv_spill::is_supported()) {
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
        n_device += offload && ggml_backend_dev_buffer_type(dev) != ggml_backend_cpu_buffer_type();
    }
    if (n_device > 0) {
        return format("%u of %u layers keep their cache on a device; -nkvo keeps it in host memory", n_device,
                      n_layers);
    }
    return n_layers == 0 ? "the cache holds no layer" : "";
}

std::shared_ptr<llama_kv_pager> llama_kv_pager::create(llama_kv_cache & kv, bool offload,
                                                       const llama_kv_cache::layer_filter_cb & filter) {
    llama_kv_paging * offer = llama_kv_paging::current();
    if (offer == nullptr || kv.hparams.no_alloc) {
        return nullptr;
    }
    std::string reason =
        not_eligible(kv.model, kv.hparams, kv.v_trans, kv.other != nullptr, kv.swa_type, offload, filter);
    if (reason.empty() && offer->pager != nullptr) {
        reason = "the context has a second cache";
    }
    if (!reason.empty()) {
        offer->reason = reason;
        return nullptr;
    }
    auto pager = std::make_shared<llama_kv_pager>(kv, *offer);
    offer->pager = pager.get();
    return pager;
}

llama_kv_pager::llama_kv_pager(llama_kv_cache & kv, llama_kv_paging & offer) :
    kv(kv),
    params(offer.params),
    host_only(offer.host_only),
    pool(offer.pool) {
    buft = std::make_unique<ggml_backend_buffer_type>();
    buft->iface.get_name = [](ggml_backend_buffer_type_t) { return "CPU_KV_Paged"; };
    buft->iface.alloc_buffer = alloc_buffer;
    buft->iface.get_alignment = [](ggml_backend_buffer_type_t) { return llama_kv_system_page(); };
    buft->iface.is_host = [](ggml_backend_buffer_type_t) { return true; };
    buft->device = ggml_backend_buft_get_device(ggml_backend_cpu_buffer_type());
    buft->context = this;
}

llama_kv_pager::~llama_kv_pager() = default;

void llama_kv_pager::attach() {
    llama_kv_geometry g;
    g.n_streams = kv.n_stream;
    g.n_cells = kv.get_size();
    g.page_cells = std::min((uint32_t) params.kv_page_size, g.n_cells);
    for (const auto & layer : kv.layers) {
        std::vector<llama_kv_rows> rows = { { (uint8_t *) layer.k->data, layer.k->nb[1] } };
        layer_of[layer.k] = (uint32_t) g.layers.size();
        if (layer.v != nullptr) {
            rows.push_back({ (uint8_t *) layer.v->data, layer.v->nb[1] });
            layer_of[layer.v] = (uint32_t) g.layers.size();
        }
        g.layers.push_back(rows);
    }

    uint64_t budget = params.kv_budget_bytes;
    if (budget == 0) {
        budget = llama_mem_telemetry().sample().host_available / 2;
        budget = budget == 0 ? (uint64_t) 4 << 30 : budget;
    }
    // buffers for reading and writing are part of what the cache may hold
    const uint64_t bounce = llama_kv_pages::bounce_bytes(g) * (pool != nullptr ? 1 + (uint64_t) pool->n_threads() : 1);
    const auto spill_dir = std::string(params.spill_dir != nullptr ? params.spill_dir : "");
    auto spill = std::make_unique<llama_kv_spill>(spill_dir, llama_kv_pages::record_bytes(g));
    pages = std::make_unique<llama_kv_pages>(g, budget > bounce ? budget - bounce : 0, std::move(spill), pool.get(),
                                             [this](page_id p) { return inspect(p); });

    // one full sequence must fit, if only layer by layer; moves within the cache need two pages
    uint64_t least = 2 * pages->page_charge();
    if (host_only) {
        least = std::max(least, (uint64_t) pages->pages_per_stream() * pages->layer_charge_max());
    }
    if (pages->budget_bytes() < least) {
        throw std::runtime_error(
            format("--kv-budget %s is too small: a context of %u cells per sequence with pages of %u cells (%s each) "
                   "needs at least %s; raise it, or make the context or the pages smaller",
                   mib(budget).c_str(), g.n_cells, g.page_cells, mib(pages->page_charge()).c_str(),
                   mib(least + bounce).c_str()));
    }
    seq_used.resize(LLAMA_MAX_SEQ);
    page_used.resize(pages->n_pages());
    n_used.resize(kv.n_stream);
    broken.resize(kv.n_stream);

    LLAMA_LOG_INFO("%s: KV cache in pages of %u cells, %s each, budget %s, spill file %s\n", __func__, g.page_cells,
                   mib(pages->page_charge()).c_str(), mib(budget).c_str(),
                   pages->spill_file().is_direct() ? "with direct I/O" : "through the page cache");
}

// ------------------------------------------------------------------------------------------------- buffer

ggml_backend_buffer_t llama_kv_pager::alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    llama_kv_pager & self = *(llama_kv_pager *) buft->context;
    if (self.base != nullptr) { // a copy of cells that someone keeps beside the cache
        return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    }
    self.base = llama_kv_reserve(size);
    self.reserved = size;
    if (self.base == nullptr) {
        superllama_set_error("cannot reserve " + mib(size) +
                             " of address space for the KV cache; make the context smaller");
        return nullptr;
    }
    return ggml_backend_buffer_init(buft, buffer_iface(), &self, size);
}

const ggml_backend_buffer_i & llama_kv_pager::buffer_iface() {
    static const auto self_of = [](ggml_backend_buffer_t buffer) -> llama_kv_pager & {
        return *(llama_kv_pager *) buffer->context;
    };
    static const ggml_backend_buffer_i iface = [] {
        ggml_backend_buffer_i i = {};
        i.free_buffer = [](ggml_backend_buffer_t buffer) {
            llama_kv_pager & self = self_of(buffer);
            self.pages.reset(); // waits for reads into the memory that goes now
            llama_kv_unreserve(self.base, self.reserved);
            self.base = nullptr;
        };
        i.get_base = [](ggml_backend_buffer_t buffer) -> void * { return self_of(buffer).base; };
        i.memset_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
            llama_kv_pager & self = self_of(buffer);
            std::string error;
            if (!self.pages->write_bytes((uint8_t *) t->data + offset, size, nullptr, value, &error)) {
                self.failed = true;
                self.fail(error);
            }
        };
        i.set_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset,
                          size_t size) {
            llama_kv_pager & self = self_of(buffer);
            std::string error;
            uint8_t * at = (uint8_t *) t->data + offset;
            if (!self.pages->write_bytes(at, size, data, 0, &error)) {
                self.failed = true;
                self.fail(error);
                // the cells are taken already: whoever reads this stream must hear of it
                const ggml_tensor * root = t->view_src != nullptr ? t->view_src : t;
                const size_t stream = (size_t) (at - (uint8_t *) root->data) / root->nb[2];
                self.broken[std::min(stream, self.broken.size() - 1)] = error;
            }
        };
        i.get_tensor = [](ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset,
                          size_t size) {
            llama_kv_pager & self = self_of(buffer);
            std::string error;
            if (!self.pages->read_bytes((const uint8_t *) t->data + offset, size, data, &error)) {
                memset(data, 0, size);
                self.failed = true;
                self.fail(error);
            }
        };
        i.clear = [](ggml_backend_buffer_t buffer, uint8_t value) {
            llama_kv_pager & self = self_of(buffer);
            GGML_ASSERT(value == 0);
            if (self.pages) { // before that it is as the system gave it: zero
                self.end_streaming();
                self.pages->clear();
                std::fill(self.broken.begin(), self.broken.end(), "");
            }
        };
        return i;
    }();
    return iface;
}

bool llama_kv_pager::fail(const std::string & text) {
    LLAMA_LOG_ERROR("%s: %s\n", __func__, text.c_str());
    superllama_set_error(text);
    return false;
}

bool llama_kv_pager::take_failure() {
    const bool was = failed;
    failed = false;
    return was;
}

// -------------------------------------------------------------------------------------- pages and their use

bool llama_kv_pager::has_cells(page_id p, const llama_ubatch * of) const {
    const llama_kv_cells & cells = kv.v_cells[pages->stream_of(p)];
    const uint32_t first = pages->first_cell(p), end = first + pages->n_cells_of(p);
    const bool any = of == nullptr || kv.n_stream > 1; // a stream is a sequence then
    for (uint32_t i = first; i < end; ++i) {
        if (cells.is_empty(i)) {
            continue;
        }
        if (any) {
            return true;
        }
        for (uint32_t s = 0; s < of->n_seqs_unq; ++s) {
            if (cells.seq_has(i, of->seq_id_unq[s])) {
                return true;
            }
        }
    }
    return false;
}

llama_kv_pages::usage llama_kv_pager::inspect(page_id p) const {
    const uint32_t stream = pages->stream_of(p);
    // a copy that waits for the next decode reads this stream, whatever its cells say
    const auto & waiting = kv.sc_info.ssrc;
    const bool source = std::find(waiting.begin(), waiting.end(), stream) != waiting.end() ||
                        std::find(copy_source.begin(), copy_source.end(), stream) != copy_source.end();
    llama_kv_pages::usage use = { source, page_used[p] };
    if (kv.n_stream > 1) {
        use.live = source || has_cells(p, nullptr);
        use.last_used = std::max(use.last_used, seq_used[stream]);
        return use;
    }
    const llama_kv_cells & cells = kv.v_cells[stream];
    const uint32_t first = pages->first_cell(p), end = first + pages->n_cells_of(p);
    for (uint32_t i = first; i < end; ++i) {
        for (uint32_t s = 0; !cells.is_empty(i) && s < kv.n_seq_max; ++s) {
            if (cells.seq_has(i, (llama_seq_id) s)) {
                use.live = true;
                use.last_used = std::max(use.last_used, seq_used[s]);
            }
        }
    }
    return use;
}

// Gives back the pages of a stream that hold no cell any more.
void llama_kv_pager::sweep(uint32_t stream) {
    const page_id first = stream * pages->pages_per_stream();
    for (page_id p = first; p < first + pages->pages_per_stream(); ++p) {
        if (!pages->is_empty(p) && !inspect(p).live) {
            pages->drop(p);
        }
    }
}

// ----------------------------------------------------------------------------------------- before a ubatch

bool llama_kv_pager::prepare(const llama_kv_cache::slot_info & sinfo, const llama_ubatch & ubatch, uint32_t n_kv) {
    end_streaming();
    tick++;
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        seq_used[(size_t) ubatch.seq_id_unq[s]] = tick;
    }
    pages->unpin_all();

    std::vector<page_id> writes, needed;
    uint64_t bytes = 0;
    bool restoring = false;
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        const auto stream = (uint32_t) sinfo.strm[s];
        const uint32_t used = kv.v_cells[stream].get_used(), added = (uint32_t) sinfo.idxs[s].size();
        if (used == added) {
            broken[stream].clear(); // it began anew
        }
        if (!broken[stream].empty()) {
            return fail(format("sequences of KV stream %u are lost (%s); remove them and decode their tokens again",
                               stream, broken[stream].c_str()));
        }
        if (used < n_used[stream] + added) {
            sweep(stream);
        }
        n_used[stream] = used;

        for (uint32_t cell : sinfo.idxs[s]) {
            const page_id p = pages->page_of(stream, cell);
            if (writes.empty() || writes.back() != p) {
                writes.push_back(p);
            }
        }
    }
    std::sort(writes.begin(), writes.end());
    writes.erase(std::unique(writes.begin(), writes.end()), writes.end());
    for (page_id p : writes) {
        pages->pin(p);
        restoring = restoring || pages->needs_restore(p);
        bytes += pages->in_memory(p) ? 0 : pages->page_charge();
    }

    // all that the graph will read: a page beyond it, or without a cell of these sequences, is masked
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        const page_id first = (uint32_t) sinfo.strm[s] * pages->pages_per_stream();
        for (page_id p = first; p < first + pages->pages_per_stream(); ++p) {
            if (pages->is_empty(p)) {
                continue;
            }
            const bool written = std::binary_search(writes.begin(), writes.end(), p);
            if (pages->on_disk(p) && !written && !has_cells(p, &ubatch)) {
                if (kv.n_stream > 1) {
                    pages->drop(p);
                }
                continue;
            }
            if (kv.n_stream == 1 && !written && pages->in_memory(p) && !pages->needs_restore(p)) {
                // which sequences are in it matters only when something has to leave
                needed.push_back(p);
                continue;
            }
            if (!written && (pages->first_cell(p) >= n_kv || (kv.n_stream == 1 && !has_cells(p, &ubatch)))) {
                continue; // read ahead for others
            }
            pages->pin(p);
            needed.push_back(p);
            restoring = restoring || pages->needs_restore(p);
            bytes += written || pages->in_memory(p) ? 0 : pages->page_charge();
        }
    }
    const uint64_t resident = (uint64_t) pages->count().resident_bytes;
    const bool full = resident + bytes > pages->budget_bytes();
    if (kv.n_stream == 1 && (full || restoring)) {
        const auto foreign = [&](page_id p) {
            const bool keep = std::binary_search(writes.begin(), writes.end(), p) || has_cells(p, &ubatch);
            if (keep) {
                pages->pin(p);
            }
            return !keep;
        };
        needed.erase(std::remove_if(needed.begin(), needed.end(), foreign), needed.end());
    }

    std::string error;
    if (full) {
        std::vector<page_id> all = needed;
        for (page_id p : writes) {
            if (pages->is_empty(p)) {
                all.push_back(p);
            }
        }
        if (all.size() * pages->page_charge() > pages->budget_bytes()) {
            return begin_streaming(all, writes, &error) || fail(error);
        }
    }
    if (restoring && !pages->restore(needed, &error)) {
        return fail(error);
    }
    for (page_id p : writes) {
        if (!pages->write(p, &error)) {
            return fail(error);
        }
    }
    return true;
}

// ----------------------------------------------------------------------------------------- layer by layer

struct llama_kv_pager::stream_run {
    struct step {
        uint32_t layer;
        const ggml_tensor * cut; // the last node that touches the layer's cache
    };

    std::vector<page_id> cold;   // pages that are in memory for one layer at a time
    std::vector<page_id> writes; // those of them that the ubatch writes
    std::vector<page_id> touched;
    std::vector<step> steps;
    size_t i = 0;
    bool ahead = false; // the memory of two layers: one computes, the next is read
    std::string error;
};

bool llama_kv_pager::begin_streaming(const std::vector<page_id> & needed, const std::vector<page_id> & writes,
                                     std::string * error) {
    const uint64_t budget = pages->budget_bytes(), page = pages->page_charge(), layer = pages->layer_charge_max();
    const uint64_t n = needed.size();
    uint64_t ring = pool != nullptr && 2 * n * layer <= budget ? 2 : 1;
    if (!host_only || ring * n * layer > budget) {
        *error = format("this batch needs %s of KV pages at once%s, --kv-budget leaves %s for pages; raise it, or "
                        "decode fewer or shorter sequences in one batch",
                        mib(n * page).c_str(), host_only ? (" (" + mib(n * layer) + " layer by layer)").c_str() : "",
                        mib(budget).c_str());
        return false;
    }
    // what fits beside the layers stays in memory as a whole: first what is written, then always the same pages,
    // for the scan is cyclic
    const uint64_t n_hot = page > ring * layer ? std::min(n, (budget - ring * n * layer) / (page - ring * layer)) : 0;

    auto run = std::make_unique<stream_run>();
    run->ahead = ring == 2;
    std::vector<page_id> order = writes, hot;
    for (page_id p : needed) {
        if (!std::binary_search(writes.begin(), writes.end(), p)) {
            order.push_back(p);
        }
    }
    for (page_id p : order) {
        pages->pin(p);
        const bool write = std::binary_search(writes.begin(), writes.end(), p);
        if (hot.size() < n_hot) {
            hot.push_back(p);
            continue;
        }
        run->cold.push_back(p);
        if (write) {
            run->writes.push_back(p);
        }
        if (!pages->evict(p, error)) {
            return false;
        }
    }
    // what else is in memory belongs to idle sequences; the layers of the cold pages need its place
    if (!pages->restore(hot, error)) {
        return false;
    }
    for (page_id p : hot) {
        if (std::binary_search(writes.begin(), writes.end(), p) && !pages->write(p, error)) {
            return false;
        }
    }
    n_streamed++;
    streaming = std::move(run);
    return true;
}

bool llama_kv_pager::plan(ggml_cgraph * gf) {
    stream_run & run = *streaming;
    const auto touch = [&](const ggml_tensor * node, const ggml_tensor * t) {
        const auto found = t == nullptr ? layer_of.end() : layer_of.find(t->view_src != nullptr ? t->view_src : t);
        if (found == layer_of.end()) {
            return;
        }
        if (run.steps.empty() || run.steps.back().layer != found->second) {
            run.steps.push_back({ found->second, node });
        }
        run.steps.back().cut = node;
    };
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        switch (node->op) {
            case GGML_OP_NONE:
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE:
                continue; // no data is touched
            default:
                break;
        }
        touch(node, node);
        for (const ggml_tensor * src : node->src) {
            touch(node, src);
        }
    }
    return prepare_layer();
}

// Brings the current step's layer, and starts the next one.
bool llama_kv_pager::prepare_layer() {
    stream_run & run = *streaming;
    if (run.i >= run.steps.size()) {
        return true;
    }
    const uint32_t layer = run.steps[run.i].layer;
    bool ok = pages->restore_layer(run.cold, layer, &run.error);
    for (size_t i = 0; ok && i < run.writes.size(); ++i) {
        ok = pages->write_layer(run.writes[i], layer, &run.error);
    }
    if (ok && run.ahead && run.i + 1 < run.steps.size()) {
        pages->prefetch(run.cold, (int) run.steps[run.i + 1].layer, false);
    }
    return ok;
}

bool llama_kv_pager::is_cut(const ggml_tensor * node) const {
    const stream_run & run = *streaming;
    return !run.error.empty() || (run.i < run.steps.size() && run.steps[run.i].cut == node);
}

bool llama_kv_pager::advance() {
    stream_run & run = *streaming;
    if (!run.error.empty() || !pages->evict_layer(run.cold, run.steps[run.i].layer, &run.error)) {
        return false;
    }
    run.i++;
    return prepare_layer();
}

bool llama_kv_pager::finish() {
    const std::string error = streaming->error;
    end_streaming();
    return error.empty() || fail(error);
}

// Also after a graph that was aborted: then some layers are here and some are not, which the next ubatch sorts out.
void llama_kv_pager::end_streaming() {
    if (!streaming) {
        return;
    }
    const bool whole = streaming->i >= streaming->steps.size();
    for (size_t i = 0; !whole && i < streaming->cold.size(); ++i) {
        pages->scrub(streaming->cold[i]); // nodes may have run without their pages
    }
    streaming.reset();
}

// ----------------------------------------------------------------------- copies and shifts between decodes

size_t llama_kv_pager::copy_streams(const llama_kv_cache::stream_copy_info & info) {
    end_streaming();
    pages->unpin_all();
    copy_source = info.ssrc; // they are read here, whatever their cells say by now
    const uint32_t n = pages->pages_per_stream();
    for (size_t c = 0; c < info.ssrc.size(); ++c) {
        const uint32_t src = info.ssrc[c], dst = info.sdst[c];
        std::string error = broken[src];
        bool ok = error.empty();
        for (uint32_t i = 0; i < n; ++i) {
            const page_id from = src * n + i, to = dst * n + i;
            if (!pages->is_empty(to)) {
                pages->drop(to);
            }
            if (ok && !pages->is_empty(from)) {
                page_used[to] = tick;
                ok = pages->copy(from, to, &error);
            }
        }
        n_used[dst] = kv.v_cells[dst].get_used();
        broken[dst] = error;
        if (!ok) {
            fail(error);
        }
    }
    copy_source.clear();
    return 0;
}

// The shift of one page's cells; as llama_kv_cache::build_graph_shift, which spans the whole cache.
class llm_graph_input_page_shift : public llm_graph_input_i {
  public:
    llm_graph_input_page_shift(const llama_kv_cache * kv, std::vector<int32_t> shifts) :
        kv(kv),
        shifts(std::move(shifts)) {}

    void set_input(const llama_ubatch *) override {
        if (k_shift->buffer != nullptr) {
            ggml_backend_tensor_set(k_shift, shifts.data(), 0, ggml_nbytes(k_shift));
        }
        if (k_rot != nullptr && k_rot->buffer != nullptr) {
            kv->set_input_k_rot(k_rot);
        }
    }

    const llama_kv_cache * kv;
    std::vector<int32_t> shifts;
    ggml_tensor * k_shift = nullptr; // I32 [cells]
    ggml_tensor * k_rot = nullptr;
};

bool llama_kv_pager::shift(llama_context * lctx) {
    if (kv.hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return false;
    }
    end_streaming();
    const llama_cparams & cparams = lctx->get_cparams();
    // a rotation by nothing leaves f16 and f32 as they are; others are rounded again, as without pages
    const bool exact =
        !ggml_is_quantized(kv.type_k()) && cparams.yarn_ext_factor == 0.0f && cparams.yarn_attn_factor == 1.0f;
    bool updated = false;

    for (page_id p = 0; p < pages->n_pages(); ++p) {
        const uint32_t stream = pages->stream_of(p), first = pages->first_cell(p), n = pages->n_cells_of(p);
        const llama_kv_cells & cells = kv.v_cells[stream];
        if (pages->is_empty(p) || !broken[stream].empty()) {
            continue;
        }
        std::vector<int32_t> shifts(n);
        bool moved = false, live = false;
        for (uint32_t i = 0; i < n; ++i) {
            live = live || !cells.is_empty(first + i);
            shifts[i] = cells.is_empty(first + i) ? 0 : cells.get_shift(first + i);
            moved = moved || shifts[i] != 0;
        }
        if (!live || (!moved && exact)) {
            continue;
        }

        pages->unpin_all();
        pages->pin(p);
        page_used[p] = std::max(page_used[p], moved ? tick : page_used[p]);
        std::string error;
        if (!pages->write(p, &error)) {
            broken[stream] = error;
            fail(error);
            continue;
        }

        ggml_backend_sched_reset(lctx->get_sched());
        llm_graph_result * res = lctx->get_gf_res_reserve();
        res->reset();
        ggml_context * ctx = res->get_ctx();
        ggml_cgraph * gf = res->get_gf();
        auto inp = std::make_unique<llm_graph_input_page_shift>(&kv, std::move(shifts));
        inp->k_shift = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        ggml_set_input(inp->k_shift);
        inp->k_rot = kv.build_input_k_rot(ctx);
        for (const auto & layer : kv.layers) {
            const uint32_t il = layer.il;
            if (!kv.hparams.has_rope(il)) {
                continue;
            }
            const auto n_rot = kv.hparams.n_rot(il), n_embd_head_k = kv.hparams.n_embd_head_k(il);
            const auto n_embd_nope = kv.hparams.n_lora_kv > 0 ? n_embd_head_k - n_rot : 0;
            const size_t row = ggml_row_size(layer.k->type, kv.hparams.n_embd_k_gqa(il));
            ggml_tensor * k = ggml_view_3d(
                ctx, layer.k, n_rot, kv.hparams.n_head_kv(il), n, ggml_row_size(layer.k->type, n_embd_head_k), row,
                ((size_t) stream * kv.get_size() + first) * row + ggml_row_size(layer.k->type, n_embd_nope));
            ggml_build_forward_expand(gf, kv.build_rope_shift(cparams, ctx, k, inp->k_shift, inp->k_rot,
                                                              kv.model.get_rope_factors(cparams, (int) il),
                                                              kv.model.get_rope_freq_base(cparams, (int) il),
                                                              kv.model.get_rope_freq_scale(cparams, (int) il), il));
        }
        res->add_input(std::move(inp));
        bool ok = ggml_backend_sched_alloc_graph(lctx->get_sched(), gf);
        if (ok) {
            res->set_inputs(nullptr);
            ok = lctx->graph_compute(gf, false) == GGML_STATUS_SUCCESS;
            ggml_backend_sched_synchronize(lctx->get_sched());
        }
        if (!ok) {
            broken[stream] = "the context shift could not be computed";
            fail(broken[stream]);
        }
        updated = true;
    }
    return updated;
}

// A copy on the device's side reads our memory without asking: bring what it reads.
void llama_kv_pager::before_state_write(llama_seq_id seq, llama_state_seq_flags flags) {
    end_streaming();
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (!broken[s].empty() && (seq < 0 || kv.seq_to_stream[(size_t) seq] == s) && kv.v_cells[s].get_used() > 0) {
            throw std::runtime_error("the KV data of this state is lost: " + broken[s]);
        }
    }
    if (!(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE)) {
        return;
    }
    std::vector<page_id> list;
    pages->unpin_all();
    for (page_id p = 0; p < pages->n_pages(); ++p) {
        const uint32_t stream = pages->stream_of(p);
        if (!pages->is_empty(p) && (seq < 0 || kv.seq_to_stream[(size_t) seq] == stream) && has_cells(p, nullptr)) {
            pages->pin(p);
            list.push_back(p);
        }
    }
    std::string error;
    if (!pages->restore(list, &error)) {
        throw std::runtime_error(error);
    }
}

void llama_kv_pager::before_state_read(llama_seq_id seq) {
    end_streaming();
    pages->unpin_all();
    if (seq >= 0 && kv.n_stream > 1) {
        broken[kv.seq_to_stream[(size_t) seq]].clear(); // all of it is replaced
    }
}

// ---------------------------------------------------------------------------------- prefetch and statistics

static bool seq_in_page(const llama_kv_cells & cells, uint32_t first, uint32_t n, llama_seq_id seq) {
    for (uint32_t i = first; i < first + n; ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, seq)) {
            return true;
        }
    }
    return false;
}

int llama_kv_pager::prefetch(llama_seq_id seq) {
    end_streaming();
    pages->unpin_all();
    std::vector<page_id> list;
    const uint32_t stream = kv.seq_to_stream[(size_t) seq], n = pages->pages_per_stream();
    for (page_id p = stream * n; p < (stream + 1) * n; ++p) {
        if (!pages->is_empty(p) && seq_in_page(kv.v_cells[stream], pages->first_cell(p), pages->n_cells_of(p), seq)) {
            page_used[p] = tick + 1;
            list.push_back(p);
        }
    }
    return pages->prefetch(list, -1, true);
}

void llama_kv_pager::count_seq(llama_seq_id seq, struct superllama_kv_seq_pages & out) const {
    const uint32_t stream = kv.seq_to_stream[(size_t) seq], n = pages->pages_per_stream();
    const llama_kv_cells & cells = kv.v_cells[stream];
    for (page_id p = stream * n; p < (stream + 1) * n; ++p) {
        const uint32_t first = pages->first_cell(p);
        if (!seq_in_page(cells, first, pages->n_cells_of(p), seq)) {
            continue;
        }
        for (uint32_t i = first; i < first + pages->n_cells_of(p); ++i) {
            out.tokens += !cells.is_empty(i) && cells.seq_has(i, seq);
        }
        out.pages_cpu += pages->n_resident(p) > 0;
        out.pages_disk += pages->n_resident(p) == 0 && pages->on_disk(p);
    }
}

void llama_kv_pager::count(struct superllama_kv_pages & out) const {
    const llama_kv_counters & c = pages->count();
    out.paged = true;
    out.page_size = params.kv_page_size;
    out.page_bytes = (int64_t) pages->page_charge();
    out.budget_bytes = (int64_t) pages->budget_bytes();
    out.resident_bytes = c.resident_bytes;
    out.resident_peak_bytes = c.resident_peak_bytes;
    out.pages_cpu = c.pages_cpu;
    out.pages_disk = c.pages_disk;
    out.evicted_clean = c.evicted_clean;
    out.evicted_dirty = c.evicted_dirty;
    out.dropped = c.dropped;
    out.restored = c.restored;
    out.prefetched = c.prefetched;
    out.prefetched_used = c.prefetched_used;
    out.prefetched_wasted = c.prefetched_wasted;
    out.ubatches_streamed = n_streamed;
    out.bytes_read = c.bytes_read;
    out.bytes_written = c.bytes_written;
    out.stall_ms = (double) c.stall_us / 1000.0;
}
