#include "llama-superllama.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache-paged.h"
#include "llama-mem-telemetry.h"
#include "llama-metrics.h"
#include "llama-model.h"
#include "llama-prefetch.h"
#include "superllama-error.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

static int64_t unix_ms() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

struct llama_superllama::impl {
    llama_context & ctx;
    superllama_context_params params;

    llama_mem_telemetry telemetry;
    std::vector<ggml_backend_dev_t> devices; // those that hold layers or KV, the CPU left out

    llama_metrics_rates rates;
    std::vector<std::shared_ptr<llama_metrics_sink>> sinks;
    int64_t t_line_us = 0;

    int64_t mem_peak_bytes = 0;

    llama_kv_paging paging;
    int64_t n_kv_evicted = 0; // as of the last event line
    int64_t n_kv_restored = 0;
    bool user_wants = false; // the user's eval callback, of the node in hand
    bool eval_is_ours = false;

    impl(llama_context & ctx, const superllama_context_params & params) : ctx(ctx), params(params) {
        for (const auto & dev : ctx.get_model().devices) {
            devices.push_back(dev.dev);
        }
        if (ctx.get_model().hparams.no_alloc) {
            return; // a dry run that only measures sizes
        }
        if (params.paged_kv) {
            offer_paging();
        }
        if (params.metrics) {
            sinks.push_back(llama_metrics_sink::open(""));
        }
        if (params.metrics_file != nullptr && params.metrics_file[0] != '\0') {
            sinks.push_back(llama_metrics_sink::open(params.metrics_file));
        }
    }

    ~impl() {
        if (llama_kv_paging::current() == &paging) {
            llama_kv_paging::current() = nullptr;
        }
    }

    void offer_paging() {
        if (params.kv_page_size < 16 || params.kv_page_size > 8192) {
            throw std::runtime_error("--kv-page-size " + std::to_string(params.kv_page_size) +
                                     ": a page has 16 to 8192 cells");
        }
        paging.params = params;
        paging.host_only = devices.empty();
        if (params.async_prefetch) {
            paging.pool = std::make_shared<llama_prefetch>(params.prefetch_threads > 0 ? params.prefetch_threads : 4);
        }
        llama_kv_paging::current() = &paging;
    }

    // The callback that cuts the graph between layers; the user's own sees every node as before.
    static bool eval(ggml_tensor * node, bool ask, void * self_) {
        impl & self = *(impl *) self_;
        const llama_cparams & cparams = self.ctx.get_cparams();
        const bool cut = self.paging.pager->is_cut(node);
        if (ask) {
            self.user_wants = cparams.cb_eval != nullptr && cparams.cb_eval(node, true, cparams.cb_eval_user_data);
            return cut || self.user_wants;
        }
        if (self.user_wants && !cparams.cb_eval(node, false, cparams.cb_eval_user_data)) {
            return false;
        }
        return !cut || self.paging.pager->advance();
    }

    void write_kv_events() {
        const auto & count = paging.pager->get_pages()->count();
        const int64_t evicted = count.evicted_clean + count.evicted_dirty;
        if (evicted > n_kv_evicted) {
            write_line(LLAMA_METRICS_KV_PAGE_EVICTED);
        }
        if (count.restored > n_kv_restored) {
            write_line(LLAMA_METRICS_KV_PAGE_RESTORED);
        }
        n_kv_evicted = evicted;
        n_kv_restored = count.restored;
    }

    void collect_kv(struct superllama_stats & s) const {
        const llama_kv_counters & count = paging.pager->get_pages()->count();
        s.kv_pages_cpu = count.pages_cpu;
        s.kv_pages_disk = count.pages_disk;
        s.kv_pages_evicted = count.evicted_clean + count.evicted_dirty;
        s.kv_pages_prefetched = count.prefetched;
        s.kv_bytes_read = count.bytes_read;
        s.kv_bytes_written = count.bytes_written;
        s.stall_ms += (double) count.stall_us / 1000.0;
        if (paging.pool) {
            const auto jobs = paging.pool->count();
            s.prefetch_pending += jobs.pending;
            s.prefetch_completed += jobs.completed;
            s.prefetch_failed += jobs.failed;
        }
    }

    void write_line(llama_metrics_event event) {
        struct superllama_stats stats = {};
        collect(stats);
        rates.mark();
        t_line_us = ggml_time_us();
        const std::string line = llama_metrics_json(stats, event, params.metrics_pretty);
        for (const auto & sink : sinks) {
            sink->push(line);
        }
    }

    void collect(struct superllama_stats & s) {
        const llama_model & model = ctx.get_model();

        s.timestamp_ms = unix_ms();
        s.prompt_tokens = rates.n_prompt;
        s.generated_tokens = rates.n_generated;
        s.token = rates.n_prompt + rates.n_generated;

        for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
            ggml_backend_dev_t dev = model.dev_layer((int) il);
            const bool cpu = dev == nullptr || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
            (cpu ? s.cpu_layers_active : s.gpu_layers_active)++;
        }

        for (const llama_device_memory & mem : llama_device_memory_sample(devices)) {
            if (mem.total == 0) {
                continue;
            }
            const size_t used = mem.total - std::min(mem.free, mem.total);
            s.vram_used_bytes += (int64_t) used;
            s.vram_total_bytes += (int64_t) mem.total;
            s.gpu_memory_pressure = std::max(s.gpu_memory_pressure, (double) used / (double) mem.total);
        }

        const struct superllama_memory mem = telemetry.sample();
        s.ram_used_bytes = (int64_t) mem.resident;
        mem_peak_bytes = std::max(mem_peak_bytes, (int64_t) mem.resident_peak);
        s.mem_peak_bytes = mem_peak_bytes;
        if (mem.host_total > 0) {
            s.cpu_memory_pressure = 1.0 - (double) mem.host_available / (double) mem.host_total;
        }

        s.tokens_per_sec = rates.since_mark();
        s.avg_tokens_per_sec = rates.average();

        if (paging.pager != nullptr) {
            collect_kv(s);
        }

        for (const auto & sink : sinks) {
            s.metrics_dropped += sink->dropped();
        }
    }
};

llama_superllama::llama_superllama(llama_context & ctx, const superllama_context_params & params) :
    pimpl(std::make_unique<impl>(ctx, params)) {}

llama_superllama::~llama_superllama() {
    if (!pimpl->sinks.empty()) {
        pimpl->write_line(LLAMA_METRICS_FINAL);
        for (const auto & sink : pimpl->sinks) {
            sink->flush();
        }
    }
}

superllama_context_params llama_superllama::default_context_params() {
    superllama_context_params params = {};
    params.metrics_interval_ms = 1000;
    params.kv_page_size = 256;
    return params;
}

void llama_superllama::before_ubatch(const llama_ubatch & ubatch) {
    GGML_UNUSED(ubatch);
    pimpl->rates.begin(ggml_time_us());
    if (pimpl->paging.pager != nullptr && !pimpl->devices.empty()) {
        ggml_backend_sched_synchronize(pimpl->ctx.get_sched()); // a device may still copy from KV pages
    }
}

void llama_superllama::memory_created() {
    impl & self = *pimpl;
    if (llama_kv_paging::current() != &self.paging) {
        return; // nothing was offered
    }
    llama_kv_paging::current() = nullptr;
    llama_kv_paging & paging = self.paging;
    if (paging.pager == nullptr && paging.reason.empty()) {
        paging.reason = "the model has no KV cache of cells";
    }
    if (!paging.reason.empty()) {
        LLAMA_LOG_WARN("%s: --paged-kv: %s: %s\n", __func__,
                       paging.pager == nullptr ? "standard KV cache" : "a part of the KV cache is not paged",
                       paging.reason.c_str());
    }
}

void llama_superllama::before_compute(ggml_cgraph * gf) {
    impl & self = *pimpl;
    const bool streaming = self.paging.pager != nullptr && self.paging.pager->is_streaming();
    if (streaming) {
        self.paging.pager->plan(gf);
        ggml_backend_sched_set_eval_callback(self.ctx.get_sched(), impl::eval, &self);
    } else if (self.eval_is_ours) {
        const llama_cparams & cparams = self.ctx.get_cparams();
        ggml_backend_sched_set_eval_callback(self.ctx.get_sched(), cparams.cb_eval, cparams.cb_eval_user_data);
    }
    self.eval_is_ours = streaming;
}

bool llama_superllama::after_compute() {
    impl & self = *pimpl;
    if (!self.eval_is_ours) {
        return true;
    }
    const llama_cparams & cparams = self.ctx.get_cparams();
    ggml_backend_sched_set_eval_callback(self.ctx.get_sched(), cparams.cb_eval, cparams.cb_eval_user_data);
    self.eval_is_ours = false;
    return self.paging.pager->finish();
}

// A sequence with one token in the ubatch that asks for its output is generating; the rest is prompt.
static int64_t count_generated(const llama_ubatch & ubatch) {
    int64_t n_generated = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.output[i] == 0 || ubatch.n_seq_id[i] != 1) {
            continue;
        }
        bool alone = true;
        // tokens of one sequence are neighbours
        for (uint32_t j : { i - 1, i + 1 }) {
            alone = alone && !(j < ubatch.n_tokens && ubatch.seq_id[j][0] == ubatch.seq_id[i][0]);
        }
        n_generated += alone ? 1 : 0;
    }
    return n_generated;
}

void llama_superllama::after_ubatch(const llama_ubatch & ubatch) {
    impl & self = *pimpl;
    if (self.ctx.get_cparams().warmup) {
        return;
    }
    if (!self.sinks.empty()) {
        ggml_backend_sched_synchronize(self.ctx.get_sched()); // devices compute behind our back; time it all
    }
    const int64_t now = ggml_time_us();
    const int64_t n_generated = count_generated(ubatch);
    self.rates.end(now, ubatch.n_tokens - n_generated, n_generated);

    if (!self.sinks.empty() && self.paging.pager != nullptr) {
        self.write_kv_events();
    }

    if (!self.sinks.empty() && now - self.t_line_us >= 1000 * (int64_t) self.params.metrics_interval_ms) {
        self.write_line(LLAMA_METRICS_PERIODIC);
    }
}

bool llama_superllama::take_kv_failure() const {
    return pimpl->paging.pager != nullptr && pimpl->paging.pager->take_failure();
}

void llama_superllama::kv_pages(struct superllama_kv_pages & out) const {
    out = {};
    const llama_kv_paging & paging = pimpl->paging;
    if (paging.pager != nullptr) {
        paging.pager->count(out);
    }
    const std::string reason = pimpl->params.paged_kv ? paging.reason : "not asked for";
    strncpy(out.reason, reason.c_str(), sizeof(out.reason) - 1);
}

void llama_superllama::kv_seq_pages(llama_seq_id seq, struct superllama_kv_seq_pages & out) const {
    out = {};
    if (pimpl->paging.pager == nullptr) {
        return;
    }
    if (seq < 0 || (uint32_t) seq >= pimpl->ctx.get_cparams().n_seq_max) {
        throw std::runtime_error("sequence " + std::to_string(seq) + " is not in [0, " +
                                 std::to_string(pimpl->ctx.get_cparams().n_seq_max) + ")");
    }
    pimpl->paging.pager->count_seq(seq, out);
}

int llama_superllama::kv_prefetch(llama_seq_id seq) {
    struct superllama_kv_seq_pages checked;
    kv_seq_pages(seq, checked);
    return pimpl->paging.pager != nullptr ? pimpl->paging.pager->prefetch(seq) : 0;
}

void llama_superllama::stats(struct superllama_stats & out) const {
    out = {};
    pimpl->collect(out);
}

std::string llama_superllama::metrics_json() const {
    struct superllama_stats s = {};
    pimpl->collect(s);
    return llama_metrics_json(s, LLAMA_METRICS_PERIODIC, false);
}
