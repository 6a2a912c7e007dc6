#include "llama-superllama.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-mem-telemetry.h"
#include "llama-metrics.h"
#include "llama-model.h"
#include "llama-superllama-model.h"
#include "superllama-error.h"

#include "ggml-impl.h"

#include <algorithm>
#include <chrono>

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
    bool turn = false;                          // this context's graph is the one that runs
    std::string error;                          // of the graph that runs
    bool user_asked = false;

    impl(llama_context & ctx, const superllama_context_params & params) : ctx(ctx), params(params) {
        for (const auto & dev : ctx.get_model().devices) {
            devices.push_back(dev.dev);
        }
        if (ctx.get_model().hparams.no_alloc) {
            return; // a dry run that only measures sizes
        }
        weights = ctx.get_model().superllama.get();
        if (params.metrics) {
            sinks.push_back(llama_metrics_sink::open(""));
        }
        if (params.metrics_file != nullptr && params.metrics_file[0] != '\0') {
            sinks.push_back(llama_metrics_sink::open(params.metrics_file));
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
    }

    void collect_weights(struct superllama_stats & s) {
        const llama_layer_sched::counters c = weights->sched().count();
        s.layers_loaded = c.blocks_loaded;
        s.layers_evicted = c.blocks_evicted;
        s.weight_bytes_read = c.bytes_read;
        s.weight_bytes_resident = c.bytes_resident;
        s.expert_hits = c.expert_hits;
        s.expert_misses = c.expert_misses;
        s.stall_ms = c.stall_ms;
        s.prefetch_pending = c.prefetch.pending;
        s.prefetch_completed = c.prefetch.completed;
        s.prefetch_failed = c.prefetch.failed;
        s.mem_budget_bytes = (int64_t) weights->budget_bytes();
        for (const llama_layer_sched::layer & l : weights->sched().layers()) {
            s.disk_layers_active += l.bytes_resident < l.bytes ? 1 : 0;
        }
        s.cpu_layers_active = std::max<int64_t>(0, s.cpu_layers_active - s.disk_layers_active);
    }

    // ggml asks before a node whether to stop after it, and calls again once it is computed
    static bool on_node(ggml_tensor * node, bool ask, void * data) {
        impl & self = *(impl *) data;
        const llama_cparams & cp = self.ctx.get_cparams();
        if (ask) {
            self.user_asked = cp.cb_eval != nullptr && cp.cb_eval(node, true, cp.cb_eval_user_data);
            return self.weights->sched().stops_after(node) || self.user_asked;
        }
        if (self.user_asked && !cp.cb_eval(node, false, cp.cb_eval_user_data)) {
            return false;
        }
        return self.error.empty() && self.weights->sched().after_node(node, &self.error);
    }
};

llama_superllama::llama_superllama(llama_context & ctx, const superllama_context_params & params) :
    pimpl(std::make_unique<impl>(ctx, params)) {}

llama_superllama::~llama_superllama() {
    if (pimpl->weights != nullptr) {
        pimpl->weights->remove_context(this);
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
    return params;
}

void llama_superllama::context_ready() {
    impl & self = *pimpl;
    if (self.weights == nullptr) {
        return;
    }
    size_t host_bytes = 0;
    for (const auto & entry : self.ctx.memory_breakdown()) {
        if (ggml_backend_buft_is_host(entry.first)) {
            host_bytes += entry.second.context + entry.second.compute;
        }
    }
    self.weights->add_context(this, host_bytes, (int) self.ctx.n_ubatch());
}

void llama_superllama::before_ubatch(const llama_ubatch & ubatch) {
    GGML_UNUSED(ubatch);
    pimpl->rates.begin(ggml_time_us());
}

bool llama_superllama::before_graph(ggml_cgraph * gf) {
    impl & self = *pimpl;
    if (self.weights == nullptr) {
        return true;
    }
    self.error.clear();
    self.turn = true;
    self.weights->sample_pressure();
    ggml_backend_sched_set_eval_callback(self.ctx.get_sched(), impl::on_node, &self);
    self.weights->sched().begin_graph(gf, gf->uid, &self.error);
    return self.error.empty();
}

bool llama_superllama::after_graph() {
    impl & self = *pimpl;
    if (!self.turn) {
        return true;
    }
    self.turn = false;
    ggml_backend_sched_synchronize(self.ctx.get_sched());
    self.weights->sched().end_graph();
    if (!self.error.empty()) {
        superllama_set_error(self.error);
        LLAMA_LOG_ERROR("superllama: %s\n", self.error.c_str());
    }
    return self.error.empty();
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

    if (!self.sinks.empty() && now - self.t_line_us >= 1000 * (int64_t) self.params.metrics_interval_ms) {
        self.write_line(LLAMA_METRICS_PERIODIC);
    }
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
