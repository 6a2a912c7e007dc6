#include "llama-superllama.h"

#include "llama-batch.h"
#include "llama-compute-memory.h"
#include "llama-context.h"
#include "llama-device-kv.h"
#include "llama-impl.h"
#include "llama-kv-cache-paged.h"
#include "llama-mem-telemetry.h"
#include "llama-metrics.h"
#include "llama-model.h"
#include "llama-prefetch.h"
#include "llama-recurrent-guard.h"
#include "llama-superllama-model.h"
#include "superllama-error.h"

#include "ggml-impl.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

static const uint64_t loan_step_bytes = 16u << 20; // memory comes from weights, and returns to them, in steps of this
static const int n_small_graphs_min = 4;           // one after another, before they have what larger ones used

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

    llama_superllama_model * weights = nullptr; // null: stock loading, nothing moves
    llama_device_tier * tier = nullptr;         // null: layers do not go to devices
    std::unique_ptr<llama_device_kv> device_kv; // with a tier
    bool lost = false;                          // a device that it computed on is gone
    int64_t placement = -1;                     // generation that the scheduler's buffers are reserved for
    int64_t n_device_moves[2] = {};             // loads, evictions: as of the last event line
    bool turn = false;                          // this context's graph is the one that runs
    std::string error;                          // of the graph that runs
    bool user_asked = false;

    llama_kv_paging paging;
    bool kv_cuts = false;     // KV pages come and go layer by layer in the graph that runs
    int64_t n_kv_evicted = 0; // as of the last event line
    int64_t n_kv_restored = 0;

    // Host memory that this context may take; what it does not use is lent to weights.
    struct loan {
        uint64_t bytes_max = 0;
        uint64_t granted = 0; // to this context: what the weights know of
    };
    uint64_t other_bytes = 0;      // used at any time
    uint64_t output_bytes_min = 0; // of the buffer of logits as it is made, a row for each sequence: not counted
    uint64_t output_bytes = 0;     // what it has grown by
    loan kv;                       // pages
    loan compute;                  // buffers
    llama_compute_memory compute_memory;
    int n_small_graphs = 0;

    std::unique_ptr<llama_recurrent_guard> recurrent; // where reads can fail in the middle of a graph

    impl(llama_context & ctx, const superllama_context_params & params) : ctx(ctx), params(params) {
        for (const auto & dev : ctx.get_model().devices) {
            devices.push_back(dev.dev);
        }
        if (ctx.get_model().hparams.no_alloc) {
            return; // a dry run that only measures sizes
        }
        weights = ctx.get_model().superllama.get();
        tier = weights != nullptr ? weights->tier() : nullptr;
        if (tier != nullptr) {
            device_kv = std::make_unique<llama_device_kv>(*tier);
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
            paging.pool = std::make_shared<llama_prefetcher>(params.prefetch_threads > 0 ? params.prefetch_threads : 4);
        }
        llama_kv_paging::current() = &paging;
    }

    // the caches exist: who took the offer, and why not
    void close_paging() {
        if (llama_kv_paging::current() != &paging) {
            return; // nothing was offered
        }
        llama_kv_paging::current() = nullptr;
        if (paging.pager == nullptr && paging.reason.empty()) {
            paging.reason = "the model has no KV cache of cells";
        }
        if (!paging.reason.empty()) {
            LLAMA_LOG_WARN("superllama: --paged-kv: %s: %s\n",
                           paging.pager == nullptr ? "standard KV cache" : "a part of the KV cache is not paged",
                           paging.reason.c_str());
        }
    }

    // Before memory is taken, and after it was given back: the weights have the rest.
    void grant(loan & l, uint64_t bytes) {
        const auto in_steps = [&l](uint64_t n) { return std::min(GGML_PAD(n, loan_step_bytes), l.bytes_max); };
        // not less before half a step more would fit: a page that comes and goes moves nothing
        const uint64_t granted = std::min(std::max(l.granted, in_steps(bytes)), in_steps(bytes + loan_step_bytes / 2));
        if (granted != l.granted) {
            l.granted = granted;
            weights->context_uses(this, other_bytes + output_bytes + kv.granted + compute.granted);
        }
    }

    void add_to_weights(uint64_t new_output_bytes) { // throws where there is no memory for it
        const uint64_t fixed = other_bytes + new_output_bytes;
        weights->add_context(this, fixed + kv.granted + compute.granted, fixed + kv.bytes_max + compute.bytes_max,
                             (int) ctx.n_ubatch());
        output_bytes = new_output_bytes;
    }

    void grant_compute(const ggml_cgraph * gf) {
        grant(compute, std::max<uint64_t>(compute_memory.add(gf), compute.granted));
        const bool small = compute_memory.bytes_of_graph() + loan_step_bytes < compute.granted;
        n_small_graphs = small ? n_small_graphs + 1 : 0;
        if (n_small_graphs >= n_small_graphs_min) {
            n_small_graphs = 0;
            compute_memory.give_back();
            grant(compute, compute_memory.bytes_of_graph());
        }
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

    void write_layer_events() {
        const llama_device_tier::counters c = tier->count();
        if (c.n_evictions > n_device_moves[1]) {
            write_line(LLAMA_METRICS_LAYER_EVICTED);
        }
        if (c.n_loads > n_device_moves[0]) {
            write_line(LLAMA_METRICS_LAYER_LOADED);
        }
        n_device_moves[0] = c.n_loads;
        n_device_moves[1] = c.n_evictions;
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

        for (const auto & sink : sinks) {
            s.metrics_dropped += sink->dropped();
        }

        if (weights != nullptr) {
            collect_weights(s);
        }
        if (paging.pager != nullptr) {
            collect_kv(s);
        }
    }

    void collect_weights(struct superllama_stats & s) {
        const llama_layer_sched::counters c = weights->sched().count();
        s.layers_loaded = c.blocks_loaded;
        s.layers_evicted = c.blocks_evicted;
        s.weight_bytes_read = c.bytes_read;
        s.weight_bytes_resident = c.bytes_resident;
        s.expert_hits = c.expert_hits;
        s.expert_misses = c.expert_misses;
        s.expert_guesses = c.expert_guesses;
        s.expert_guesses_used = c.expert_guesses_used;
        s.stall_ms = c.stall_ms;
        s.prefetch_pending = c.prefetch.pending;
        s.prefetch_completed = c.prefetch.completed;
        s.prefetch_failed = c.prefetch.failed;
        s.mem_budget_bytes = (int64_t) weights->budget_bytes();
        for (const llama_layer_sched::layer & l : weights->sched().layers()) {
            s.disk_layers_active += l.bytes_resident < l.bytes && weights->device_of(l.index) == nullptr ? 1 : 0;
        }
        if (tier != nullptr) {
            const llama_device_tier::counters d = tier->count();
            s.layers_loaded += d.n_loads;
            s.layers_evicted += d.n_evictions;
            s.vram_own_bytes = d.own_bytes;
            s.vram_budget_bytes = d.budget_bytes;
            s.move_ms = d.move_ms;
            s.gpu_memory_pressure = std::max(s.gpu_memory_pressure, d.pressure);
        }
        s.cpu_layers_active = std::max<int64_t>(0, s.cpu_layers_active - s.disk_layers_active);
    }

    // ggml asks before a node whether to stop after it, and calls again once it is computed
    static bool on_node(ggml_tensor * node, bool ask, void * data) {
        impl & self = *(impl *) data;
        const llama_cparams & cp = self.ctx.get_cparams();
        if (ask) {
            self.user_asked = cp.cb_eval != nullptr && cp.cb_eval(node, true, cp.cb_eval_user_data);
            const bool kv = self.kv_cuts && self.paging.pager->is_cut(node);
            return kv || (self.turn && self.weights->sched().stops_after(node)) || self.user_asked;
        }
        if (self.user_asked && !cp.cb_eval(node, false, cp.cb_eval_user_data)) {
            return false;
        }
        if (self.kv_cuts && self.paging.pager->is_cut(node) && !self.paging.pager->advance()) {
            return false;
        }
        return self.error.empty() && (!self.turn || self.weights->sched().after_node(node, &self.error));
    }
};

llama_superllama::llama_superllama(llama_context & ctx, const superllama_context_params & params) :
    pimpl(std::make_unique<impl>(ctx, params)) {
    if (pimpl->weights != nullptr && !pimpl->devices.empty()) {
        ctx.cparams.op_offload = false; // the scheduler would copy weights that may not be there
    }
}

llama_superllama::~llama_superllama() {
    const auto placement = hold();
    if (pimpl->weights != nullptr) {
        pimpl->weights->remove_context(pimpl.get());
    }
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

void llama_superllama::context_ready() {
    impl & self = *pimpl;
    self.close_paging();
    if (self.weights != nullptr || self.paging.pager != nullptr) {
        self.recurrent = llama_recurrent_guard::create(self.ctx.get_memory());
    }
    if (self.weights == nullptr) {
        return;
    }
    llama_kv_pages * pages = self.paging.pager != nullptr ? self.paging.pager->get_pages() : nullptr;
    const bool lends_compute = self.devices.empty(); // with devices, copies of their tensors lie there too
    size_t host_bytes = 0;
    for (const auto & entry : self.ctx.memory_breakdown()) {
        if (pages != nullptr && entry.first == self.paging.pager->buffer_type()) {
            self.kv.bytes_max += std::min<uint64_t>(entry.second.context, pages->budget_bytes());
        } else if (ggml_backend_buft_is_host(entry.first)) {
            host_bytes += entry.second.context;
            (lends_compute ? self.compute.bytes_max : host_bytes) += entry.second.compute;
        }
    }
    std::string error;
    if (self.tier != nullptr && lost_device(&error)) {
        throw std::runtime_error(error);
    }
    if (self.tier != nullptr) {
        const auto placement = hold();
        for (int il = 0; il < self.tier->n_layers(); ++il) { // the tier says how much of its KV is on the host
            host_bytes -= self.tier->device_of(il) == nullptr ? self.device_kv->bytes(il) : 0;
        }
        self.device_kv->ready();
    }
    self.other_bytes = host_bytes;
    self.kv.granted = self.kv.bytes_max;
    self.output_bytes_min = ggml_backend_buffer_get_size(self.ctx.buf_output.get());
    self.add_to_weights(0);
    if (pages != nullptr) {
        self.grant(self.kv, (uint64_t) pages->count().resident_bytes);
        pages->before_growth(
            [&self](uint64_t bytes) { self.grant(self.kv, std::max<uint64_t>(bytes, self.kv.granted)); });
    }
}

std::unique_lock<std::recursive_mutex> llama_superllama::hold() const {
    return pimpl->tier != nullptr ? pimpl->tier->hold() : std::unique_lock<std::recursive_mutex>();
}

// Before upstream looks where operations would run, which tells it what the devices support.
std::unique_lock<std::recursive_mutex> llama_superllama::begin_reserve() {
    auto placement = hold();
    std::string error;
    if (pimpl->tier != nullptr && !pimpl->tier->place(&error)) {
        LLAMA_LOG_WARN("superllama: %s\n", error.c_str());
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
std::vector<size_t> llama_superllama::buffer_sizes() const {
    const llama_context & ctx = pimpl->ctx;
    std::vector<size_t> sizes;
    for (ggml_backend_t backend : ctx.backend_ptrs) {
        sizes.push_back(ggml_backend_sched_get_buffer_size(ctx.sched.get(), backend));
    }
    return by_device(ctx.model.devices, ctx.backend_ptrs, sizes);
}

void llama_superllama::count_compute_buffers() {
    pimpl->device_kv->compute_now = buffer_sizes();
    pimpl->placement = pimpl->tier->generation();
    pimpl->tier->refresh();
}

using backend_lost = bool (*)(ggml_backend_t);

static bool is_lost(ggml_backend_t backend) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    const auto lost = (backend_lost) ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_lost");
    return lost != nullptr && lost(backend);
}

bool llama_superllama::lost_device(std::string * error) {
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

// The scheduler knows how it would cut the graph and has allocated nothing yet.
void llama_superllama::before_reserve(const llama_memory_context_i * mctx) {
    llama_context & ctx = pimpl->ctx;
    llama_device_tier * tier = pimpl->tier;
    if (tier == nullptr) {
        return;
    }
    llama_device_kv & kv = *pimpl->device_kv;
    const uint32_t n_seqs = ctx.cparams.n_seq_max;
    const uint32_t n_tokens = std::min(ctx.cparams.n_ctx, ctx.cparams.n_ubatch);
    const uint32_t n_outputs = std::min(n_tokens, ctx.cparams.n_outputs_max);
    std::string error;
    if (lost_device(&error)) {
        return; // nothing is left there; the next ubatch says so
    }
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
        if (!error.empty()) {
            throw std::runtime_error(error);
        }
        if (!fits) {
            continue; // with these needs, fewer layers may
        }
        if (tier->n_device_layers() == 0 || ctx.graph_reserve(n_tokens, n_seqs, n_outputs, mctx) != nullptr) {
            break;
        }
        const std::vector<size_t> got = buffer_sizes();
        bool fewer = false;
        for (size_t d = 0; d < need.size() && !fewer; ++d) { // the first whose buffer is missing, or too small still
            fewer = got[d] < need[d] && tier->allocation_failed(d, &error);
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

bool llama_superllama::before_outputs(size_t bytes) {
    if (pimpl->output_bytes_min == 0) {
        return true; // nothing is dynamic, or the context is being made
    }
    try {
        pimpl->add_to_weights(bytes - std::min<uint64_t>(bytes, pimpl->output_bytes_min));
    } catch (const std::exception & e) {
        superllama_set_error(e.what());
        LLAMA_LOG_ERROR("superllama: %s\n", e.what());
        return false;
    }
    return true;
}

bool llama_superllama::before_ubatch(const llama_ubatch & ubatch) {
    pimpl->rates.begin(ggml_time_us());
    if (pimpl->tier != nullptr) {
        std::string error;
        if (lost_device(&error)) {
            superllama_set_error(error);
            LLAMA_LOG_ERROR("superllama: %s\n", error.c_str());
            return false;
        }
        if (!pimpl->tier->apply_asked(&error) || !pimpl->tier->sample(&error)) {
            LLAMA_LOG_WARN("superllama: %s\n", error.c_str());
        }
        if (pimpl->placement != pimpl->tier->generation()) {
            pimpl->ctx.sched_need_reserve = true;
        }
        try {
            pimpl->ctx.sched_reserve();
        } catch (const std::exception & e) {
            superllama_set_error(e.what());
            LLAMA_LOG_ERROR("superllama: %s\n", e.what());
            pimpl->placement = -1; // the next call tries again
            return false;
        }
    }
    if (pimpl->paging.pager != nullptr && !pimpl->devices.empty()) {
        ggml_backend_sched_synchronize(pimpl->ctx.get_sched()); // a device may still copy from KV pages
    }
    std::string error;
    if (pimpl->recurrent && !pimpl->recurrent->before_ubatch(ubatch, &error)) {
        superllama_set_error(error);
        LLAMA_LOG_ERROR("superllama: %s\n", error.c_str());
        return false;
    }
    return true;
}

void llama_superllama::before_inputs(const ggml_cgraph * gf) {
    if (pimpl->compute.bytes_max > 0) {
        pimpl->grant_compute(gf);
    }
}

bool llama_superllama::before_graph(ggml_cgraph * gf) {
    impl & self = *pimpl;
    self.error.clear();
    self.kv_cuts = self.paging.pager != nullptr && self.paging.pager->is_streaming();
    if (self.kv_cuts) {
        ggml_backend_sched_set_eval_callback(self.ctx.get_sched(), impl::on_node, &self);
        if (!self.paging.pager->plan(gf)) {
            return false;
        }
    }
    if (self.weights != nullptr) {
        if (self.paging.pager != nullptr) { // pages that come and go in the middle of a graph have their memory before
            const int64_t resident = self.paging.pager->get_pages()->count().resident_bytes;
            self.grant(self.kv, self.kv_cuts ? self.kv.bytes_max : (uint64_t) resident);
        }
        self.turn = true;
        ggml_backend_sched_set_eval_callback(self.ctx.get_sched(), impl::on_node, &self);
        self.weights->sched().begin_graph(gf, gf->uid, &self.error);
    }
    if (self.recurrent && self.error.empty()) {
        // a copy costs nothing beside reading KV for every layer; weights may all be there, and every token would pay
        self.recurrent->before_graph(self.kv_cuts);
    }
    return self.error.empty();
}

bool llama_superllama::after_graph(bool computed) {
    impl & self = *pimpl;
    const bool ok = end_graph() && computed;
    if (self.recurrent && !ok) {
        ggml_backend_sched_synchronize(self.ctx.get_sched());
        self.recurrent->undo(computed ? superllama_last_error() : "it was stopped");
    }
    return ok;
}

bool llama_superllama::end_graph() {
    impl & self = *pimpl;
    const bool kv_ok = !self.kv_cuts || self.paging.pager->finish();
    if (self.kv_cuts) { // other graphs, a context shift, run with the user's callback
        const llama_cparams & cp = self.ctx.get_cparams();
        ggml_backend_sched_set_eval_callback(self.ctx.get_sched(), cp.cb_eval, cp.cb_eval_user_data);
        self.kv_cuts = false;
    }
    if (!self.turn) {
        return kv_ok;
    }
    self.turn = false;
    ggml_backend_sched_synchronize(self.ctx.get_sched());
    self.weights->sched().end_graph();
    if (!self.error.empty()) {
        self.error = "the weights could not be read: " + self.error;
    }
    if (self.tier != nullptr) {
        lost_device(&self.error);
    }
    if (!self.error.empty()) {
        superllama_set_error(self.error);
        LLAMA_LOG_ERROR("superllama: %s\n", self.error.c_str());
    }
    return kv_ok && self.error.empty();
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

    if (!self.sinks.empty() && self.tier != nullptr) {
        self.write_layer_events();
    }
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

void llama_superllama::copy_tensor(const ggml_tensor * src, ggml_tensor * dst) {
    if (llama_kv_pager::is_paged(src)) {
        ggml_backend_tensor_get(src, dst->data, 0, ggml_nbytes(src));
    } else {
        ggml_backend_tensor_copy(src, dst);
    }
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
