#include "context/hooks_impl.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "io/readers.h"
#include "kv/state_check.h"
#include "base/assert_guard.h"
#include "base/error.h"
#include "model/position_table.h"

#include "ggml-impl.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <utility>
#include <vector>

namespace superllama {

static const int lent_page_cells = 32; // of a KV cache that only lends

// ----------------------------------------------------------------------------------------------- a context

void context_hooks::impl::finish_graphs() {
    for (ggml_backend_t backend : ctx.backend_ptrs) {
        ggml_backend_synchronize(backend);
    }
}

context_hooks::impl::impl(llama_context & ctx, const superllama_context_params & params) :
    ctx(ctx),
    params(params),
    sequences(ctx.get_cparams().n_seq_max),
    threads(ctx, params.adapt_threads, ctx.get_model().superllama != nullptr || params.paged_kv) {
    for (const auto & dev : ctx.get_model().devices) {
        devices.push_back(dev.dev);
    }
    if (ctx.get_model().hparams.no_alloc) {
        return; // a dry run that only measures sizes
    }
    weights = ctx.get_model().superllama.get();
    tier = weights != nullptr ? weights->tier() : nullptr;
    if (tier != nullptr) {
        device_kv = std::make_unique<layer_kv>(*tier, [this] { finish_graphs(); });
        paging.may_move = [this] { device_kv->add(paged_layers(paging)); };
        offload_asked = ctx.cparams.op_offload;
        need_without_offload.resize(tier->n_devices());
    }
    if (params.paged_kv) {
        offer_paging();
    } else if (weights != nullptr && devices.empty()) {
        offer_lending();
    }
    if (params.metrics) {
        log_sink = metrics_sink::open("");
    }
    if (params.metrics_file != nullptr && params.metrics_file[0] != '\0') {
        file_sink = metrics_sink::open(params.metrics_file);
    }
}

context_hooks::impl::~impl() {
    if (kv_paging::current() == &paging) {
        kv_paging::current() = nullptr;
    }
}

void context_hooks::impl::offer_paging() {
    if (params.kv_page_size < 16 || params.kv_page_size > 8192) {
        throw std::runtime_error("--kv-page-size " + std::to_string(params.kv_page_size) +
                                 ": a page has 16 to 8192 cells");
    }
    paging.params = params;
    paging.host_only = devices.empty();
    if (params.async_prefetch) {
        std::string why;
        paging.pool = readers::create(params.prefetch_threads > 0 ? params.prefetch_threads : 4, &why);
        if (paging.pool == nullptr) {
            LLAMA_LOG_WARN("superllama: KV pages are not read ahead: %s\n", why.c_str());
        }
    }
    kv_paging::current() = &paging;
}

// Cells take memory when they are used first, as with --paged-kv, but what has memory keeps it.
void context_hooks::impl::offer_lending() {
    paging.params = params;
    paging.params.kv_page_size = lent_page_cells;
    kv_paging::current() = &paging;
}

void context_hooks::impl::close_paging() {
    if (kv_paging::current() != &paging) {
        return; // nothing was offered
    }
    kv_paging::current() = nullptr;
    if (paging.pager == nullptr && paging.reason.empty()) {
        paging.reason = "the model has no KV cache of cells";
    }
    if (!paging.reason.empty() && params.paged_kv) {
        LLAMA_LOG_WARN("superllama: --paged-kv: %s: %s\n",
                       paging.pager == nullptr ? "standard KV cache" : "a part of the KV cache is not paged",
                       paging.reason.c_str());
    }
}

context_hooks::context_hooks(llama_context & ctx, const superllama_context_params & params) :
    pimpl(std::make_unique<impl>(ctx, params)) {
    if (pimpl->weights == nullptr) {
        return;
    }
    if (ctx.cparams.moe_cache_size > 0) {
        throw std::runtime_error("--moe-cache-mib: not with dynamic layers, which keep experts on devices themselves: "
                                 "--vram-budget says how much there is for all of it");
    }
    // upstream makes its cache, which is ours here (model/moe_cache.cpp), and does not cut ubatches into several that
    // devices compute one behind the other, for which there would have to be slots at once
    ctx.cparams.moe_cache_size = pimpl->weights->banks() != nullptr ? 1 : 0;
}

context_hooks::~context_hooks() {
    const auto placement = hold();
    if (pimpl->weights != nullptr) {
        pimpl->memory.reset();
        pimpl->weights->remove_context(pimpl.get());
    }
    if (pimpl->writes_lines() && pimpl->ready) { // what failed while it was made has no caches to tell of
        tried([this] { pimpl->write_line(METRICS_FINAL); });
        for (metrics_sink * sink : { pimpl->log_sink.get(), pimpl->file_sink.get() }) {
            if (sink != nullptr) {
                sink->flush();
            }
        }
    }
}

superllama_context_params context_hooks::default_context_params() {
    superllama_context_params params = {};
    params.metrics_interval_ms = 1000;
    params.kv_page_size = 256;
    return params;
}

void context_hooks::context_ready() {
    impl & self = *pimpl;
    self.close_paging();
    self.ready = true;
    if (self.weights != nullptr || self.paging.pager != nullptr) {
        self.recurrent = recurrent_guard::create(self.ctx.get_memory(), [&self] { self.finish_graphs(); }, true);
    }
    std::string error;
    const llama_context * other = self.ctx.cparams.ctx_other;
    dynamic_model * lender = other != nullptr ? other->get_model().superllama.get() : nullptr;
    if (lender != nullptr && lender != self.weights && !lender->lend_embeddings(&error)) {
        throw std::runtime_error(error);
    }
    if (self.weights == nullptr) {
        return;
    }
    if (self.tier != nullptr && lost_device(&error)) {
        throw std::runtime_error(error);
    }
    {
        const auto placement = hold();
        self.open_account();
        if (self.tier != nullptr) {
            self.turns = std::make_unique<backend_turns>(self.ctx.backend_ptrs);
            self.device_kv->ready();
        }
    }
    if (self.paging.pager != nullptr) {
        page_table & pages = *self.paging.pager->get_pages();
        self.grant(self.memory->kv_pages, (uint64_t) pages.count().resident_bytes);
        pages.before_growth([&self](uint64_t bytes) {
            self.grant(self.memory->kv_pages, std::max<uint64_t>(bytes, self.memory->kv_pages.granted()));
        });
    }
}

// -------------------------------------------------------------------------------------- the way of a ubatch

bool context_hooks::impl::say(const std::string & error) {
    set_error(error);
    LLAMA_LOG_ERROR("superllama: %s\n", error.c_str());
    return false;
}

bool context_hooks::impl::guarded(const std::function<bool()> & body) {
    try {
        return body();
    } catch (const std::exception & e) {
        return say(e.what());
    }
}

bool context_hooks::before_ubatch(const llama_ubatch & ubatch) {
    const std::string missing = behind_position_table(pimpl->ctx.get_model(), ubatch);
    return missing.empty() ? pimpl->guarded([&] { return prepare(ubatch); }) : pimpl->say(missing);
}

bool context_hooks::prepare(const llama_ubatch & ubatch) {
    pimpl->rates.begin(ggml_time_us());
    pimpl->batched = ubatch.n_tokens > 1;
    if (pimpl->tier != nullptr) {
        std::string error;
        if (lost_device(&error)) {
            return pimpl->say(error);
        }
        if (!pimpl->tier->apply_asked(&error) || !pimpl->tier->sample(&error)) {
            LLAMA_LOG_WARN("superllama: %s\n", error.c_str());
        }
        if (pimpl->paging.pager != nullptr && pimpl->paging.pager->expect_cells(ubatch.n_tokens)) {
            pimpl->resize_kv();
        }
        const bool offloads = pimpl->ctx.cparams.op_offload;
        if (pimpl->placement != pimpl->tier->generation() || (offloads && !pimpl->tier->has_room())) {
            pimpl->ctx.sched_need_reserve = true;
        }
        try {
            pimpl->ctx.sched_reserve();
        } catch (const std::exception & e) {
            pimpl->placement = -1; // the next call tries again
            return pimpl->say(e.what());
        }
    }
    if (pimpl->paging.pager != nullptr && !pimpl->devices.empty()) {
        ggml_backend_sched_synchronize(pimpl->ctx.get_sched()); // a device may still copy from KV pages
    }
    std::string error;
    return pimpl->recurrent == nullptr || pimpl->recurrent->before_ubatch(ubatch, &error) || pimpl->say(error);
}

void context_hooks::before_inputs(const ggml_cgraph * gf) {
    if (pimpl->memory != nullptr) {
        pimpl->has_buffers = pimpl->guarded([&] {
            pimpl->charge_buffers(gf);
            return true;
        });
    }
}

bool context_hooks::before_graph(ggml_cgraph * gf) {
    impl & self = *pimpl;
    kv_pager * pager = self.paging.pager;
    const bool kv_cuts = pager != nullptr && pager->is_streaming();
    return self.has_buffers && self.guarded([&] {
        if (self.weights != nullptr && pager != nullptr) { // pages that come in the middle of a graph have their memory
            charge & kv = self.memory->kv_pages;
            const auto resident = (uint64_t) pager->get_pages()->count().resident_bytes;
            self.grant(kv, kv_cuts ? kv.promised() : resident);
            kv.use(resident);
        }
        std::string error;
        if (self.weights != nullptr && (gf->uid == 0 || gf->uid != self.graph_seen)) {
            if (!self.weights->serve(gf, &error)) {
                return self.say(error);
            }
            self.charge_cpu_work(gf);
            self.charge_control_vectors();
            self.graph_seen = gf->uid;
        }
        self.run = std::make_unique<graph_run>(self.ctx, self.weights != nullptr ? &self.weights->sched() : nullptr,
                                               self.weights != nullptr ? self.weights->banks() : nullptr,
                                               kv_cuts ? pager : nullptr);
        if (!self.run->begin(gf)) {
            return false;
        }
        self.threads.before_graph(gf, self.batched);
        if (self.recurrent) {
            // the last step that may fail: from here on a state may be lost. A copy costs nothing beside reading KV for
            // every layer; weights may all be there, and every token would pay
            self.recurrent->before_graph(kv_cuts);
        }
        self.asserts_threw = assert_guard::set_throwing(false);
        return true;
    });
}

bool context_hooks::after_graph(bool computed) {
    impl & self = *pimpl;
    self.threads.after_graph();
    if (self.asserts_threw) {
        assert_guard::set_throwing(true);
        self.asserts_threw = false;
    }
    const bool ok = end_graph() && computed;
    if (self.recurrent && !ok) {
        self.recurrent->undo(computed && !self.stopped ? error_text() : "it was stopped");
    }
    return ok;
}

ggml_status context_hooks::failure() const {
    return pimpl->stopped ? GGML_STATUS_ABORTED : GGML_STATUS_FAILED;
}

bool context_hooks::end_graph() {
    impl & self = *pimpl;
    self.stopped = false;
    if (self.run == nullptr) {
        return false; // it did not begin, and before_graph() said why
    }
    const bool ok = self.run->end();
    self.stopped = self.run->was_stopped();
    std::string error = self.run->error();
    self.run.reset();
    if (self.tier != nullptr) {
        lost_device(&error);
    }
    if (!error.empty()) {
        self.say(error);
    }
    return ok && error.empty();
}

bool context_hooks::on_state(const llama_seq_id * read, const std::function<bool()> & work, uint64_t bytes) const {
    llama_memory_t memory = pimpl->ctx.get_memory();
    const auto placement = hold();
    bool ok = false;
    forget_positions();
    try {
        const assert_guard guard("the state is damaged, or of another model");
        pimpl->ctx.memory_update(false);
        pimpl->finish_graphs(); // which that may have begun
        if (read != nullptr && pimpl->tier != nullptr && pimpl->paging.pager != nullptr &&
            pimpl->paging.pager->expect_state(bytes)) {
            pimpl->resize_kv();
        }
        const bool done = work();
        std::string error;
        if (pimpl->tier != nullptr && lost_device(&error)) { // what was asked of it came as zeros
            throw std::runtime_error(error);
        }
        ok = done;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("superllama: %s\n", e.what());
        set_error(e.what());
    }
    kv_pager * pager = pimpl->paging.pager;
    const bool kv_failed = pager != nullptr && pager->take_failure();
    if (read != nullptr && pager != nullptr) {
        pager->after_state_read();
    }
    if (read == nullptr || memory == nullptr) {
        return ok && !kv_failed;
    }
    if (!ok && positions_were_read()) { // what is half there is no sequence
        if (*read < 0) {
            memory->clear(true);
        } else {
            memory->seq_rm(*read, -1, -1);
        }
    }
    if (pimpl->recurrent == nullptr) { // numbers of a state may be none, and would stay in the cells for ever
        pimpl->recurrent = recurrent_guard::create(memory, [self = pimpl.get()] { self->finish_graphs(); }, false);
    }
    if (pimpl->recurrent != nullptr) {
        pimpl->recurrent->clear_from_now_on();
    }
    return ok && !kv_failed;
}

uint64_t bytes_of_file(const char * path) {
    std::error_code ignored;
    const uintmax_t bytes = std::filesystem::file_size(path, ignored);
    return ignored ? UINT64_MAX : bytes;
}

void context_hooks::copy_tensor(const ggml_tensor * src, ggml_tensor * dst) {
    if (kv_pager::is_paged(src)) {
        ggml_backend_tensor_get(src, dst->data, 0, ggml_nbytes(src));
    } else {
        ggml_backend_tensor_copy(src, dst);
    }
}

} // namespace superllama
