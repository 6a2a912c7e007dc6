// What a context tells of itself: counters, metrics lines, KV pages.

#include "context/hooks_impl.h"

#include "llama-batch.h"
#include "io/readers.h"
#include "telemetry/core_share.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace superllama {

static const int64_t experts_every_us = 60 * 1000 * 1000;

static int64_t unix_ms() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

void context_hooks::impl::collect(struct superllama_stats & s) {
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

    for (const device_memory & mem : device_memory_sample(devices)) {
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

    for (const metrics_sink * sink : { log_sink.get(), file_sink.get() }) {
        s.metrics_dropped += sink != nullptr ? sink->dropped() : 0;
    }

    s.threads = threads.used();
    core_share & cores = core_share::of_process();
    s.core_wait_ms = (double) cores.waited_us() / 1000.0;
    s.throttled_ms = (double) cores.throttled_us() / 1000.0;

    if (weights != nullptr) {
        collect_weights(s);
    }
    if (asked_pager() != nullptr) {
        collect_kv(s);
    }
}

void context_hooks::impl::collect_weights(struct superllama_stats & s) {
    const layer_sched::counters c = weights->sched().count();
    s.layers_loaded = c.blocks_loaded;
    s.layers_evicted = c.blocks_evicted;
    s.weight_bytes_read = c.bytes_read;
    s.weight_bytes_resident = c.bytes_resident;
    s.weight_bytes_ahead = c.bytes_ahead;
    s.expert_hits = c.expert_hits;
    s.expert_misses = c.expert_misses;
    s.expert_guesses = c.expert_guesses;
    s.expert_guesses_used = c.expert_guesses_used;
    if (const expert_banks * banks = weights->banks()) {
        s.expert_device_hits = banks->count().hits;
        s.expert_device_misses = banks->count().misses;
        s.expert_host_computed = banks->count().stayed;
        s.expert_device_guesses = banks->count().guesses;
        s.expert_device_guesses_used = banks->count().guesses_used;
    }
    s.stall_ms = c.stall_ms;
    s.prefetch_pending = c.prefetch.pending;
    s.prefetch_completed = c.prefetch.completed;
    s.prefetch_failed = c.prefetch.failed;
    s.mem_budget_bytes = (int64_t) weights->budget_bytes();
    const auto by_tag = weights->memory_by_tag();
    std::copy(by_tag.begin(), by_tag.end(), s.memory_by_tag);
    for (const layer_sched::layer & l : weights->sched().layers()) {
        s.disk_layers_active += l.bytes_resident < l.bytes && weights->device_of(l.index) == nullptr ? 1 : 0;
    }
    if (tier != nullptr) {
        const device_tier::counters d = tier->count();
        s.layers_loaded += d.n_loads;
        s.layers_evicted += d.n_evictions;
        s.vram_own_bytes = d.own_bytes;
        s.vram_budget_bytes = d.budget_bytes;
        s.move_ms = d.move_ms;
        s.gpu_memory_pressure = std::max(s.gpu_memory_pressure, d.pressure);
    }
    s.cpu_layers_active = std::max<int64_t>(0, s.cpu_layers_active - s.disk_layers_active);
}

void context_hooks::impl::collect_kv(struct superllama_stats & s) const {
    const kv_counters & count = paging.pager->get_pages()->count();
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

metrics_parts context_hooks::impl::collect_parts() const {
    metrics_parts parts;
    parts.sequences = sequences.all();
    if (tier != nullptr) {
        parts.devices = tier->count_devices();
    }
    return parts;
}

void context_hooks::impl::write_line(metrics_event event) {
    struct superllama_stats stats = {};
    collect(stats);
    rates.mark();
    t_line_us = ggml_time_us();
    if (event == METRICS_FINAL) { // what was removed since the last ubatch is told of as well
        sequences.look(ctx.get_memory(), paging.pager, params.paged_kv);
    }
    metrics_parts parts = collect_parts();
    const std::string line = superllama::metrics_json(stats, parts, event, params.metrics_pretty);
    if (log_sink != nullptr) {
        log_sink->push(line);
    }
    if (file_sink != nullptr) {
        parts.experts = experts_if_due(event);
        file_sink->push(parts.experts.empty() ? line
                                              : superllama::metrics_json(stats, parts, event, params.metrics_pretty));
    }
}

// Thousands of numbers, for the file only: in its last line, and now and then before. Empty: not in this one.
std::string context_hooks::impl::experts_if_due(metrics_event event) {
    const bool due = event == METRICS_FINAL || t_experts_us == 0 || t_line_us - t_experts_us >= experts_every_us;
    if (weights == nullptr || !due) {
        return "";
    }
    t_experts_us = t_line_us;
    return experts_json(weights->experts());
}

void context_hooks::impl::write_layer_events() {
    const device_tier::counters c = tier->count();
    if (c.n_evictions > n_device_moves[1]) {
        write_line(METRICS_LAYER_EVICTED);
    }
    if (c.n_loads > n_device_moves[0]) {
        write_line(METRICS_LAYER_LOADED);
    }
    n_device_moves[0] = c.n_loads;
    n_device_moves[1] = c.n_evictions;
}

void context_hooks::impl::write_kv_events() {
    const auto & count = paging.pager->get_pages()->count();
    const int64_t evicted = count.evicted_clean + count.evicted_dirty;
    if (evicted > n_kv_evicted) {
        write_line(METRICS_KV_PAGE_EVICTED);
    }
    if (count.restored > n_kv_restored) {
        write_line(METRICS_KV_PAGE_RESTORED);
    }
    n_kv_evicted = evicted;
    n_kv_restored = count.restored;
}

void context_hooks::after_ubatch(const llama_ubatch & ubatch) {
    pimpl->guarded([&] {
        count(ubatch);
        return true;
    });
}

void context_hooks::count(const llama_ubatch & ubatch) {
    impl & self = *pimpl;
    if (self.ctx.get_cparams().warmup) {
        return;
    }
    if (self.writes_lines()) {
        ggml_backend_sched_synchronize(self.ctx.get_sched()); // devices compute behind our back; time it all
    }
    const int64_t now = ggml_time_us();
    const int64_t n_generated = self.sequences.add(ubatch);
    self.rates.end(now, ubatch.n_tokens - n_generated, n_generated);
    self.sequences.look_after(ubatch, self.ctx.get_memory(), self.paging.pager, self.params.paged_kv);

    if (self.writes_lines() && self.tier != nullptr) {
        self.write_layer_events();
    }
    if (self.writes_lines() && self.asked_pager() != nullptr) {
        self.write_kv_events();
    }
    if (self.writes_lines() && now - self.t_line_us >= 1000 * (int64_t) self.params.metrics_interval_ms) {
        self.write_line(METRICS_PERIODIC);
    }
}

void context_hooks::kv_pages(struct superllama_kv_pages & out) const {
    out = {};
    if (pimpl->asked_pager() != nullptr) {
        pimpl->asked_pager()->count(out);
    }
    const std::string reason = pimpl->params.paged_kv ? pimpl->paging.reason : "not asked for";
    strncpy(out.reason, reason.c_str(), sizeof(out.reason) - 1);
}

void context_hooks::kv_seq_pages(llama_seq_id seq, struct superllama_kv_seq_pages & out) const {
    out = {};
    if (pimpl->asked_pager() == nullptr) {
        return;
    }
    const auto placement = hold();
    if (seq < 0 || (uint32_t) seq >= pimpl->ctx.get_cparams().n_seq_max) {
        throw std::runtime_error("sequence " + std::to_string(seq) + " is not in [0, " +
                                 std::to_string(pimpl->ctx.get_cparams().n_seq_max) + ")");
    }
    pimpl->asked_pager()->count_seq(seq, out);
}

int context_hooks::kv_prefetch(llama_seq_id seq) {
    struct superllama_kv_seq_pages checked;
    kv_seq_pages(seq, checked);
    const auto placement = hold();
    return pimpl->asked_pager() != nullptr ? pimpl->asked_pager()->prefetch(seq) : 0;
}

void context_hooks::charge_prompt_cache(uint64_t bytes) {
    if (pimpl->memory == nullptr) {
        return;
    }
    charge & kept = pimpl->memory->prompt_cache;
    const uint64_t most = bytes > 0 ? pimpl->weights->prompt_cache_max(kept.granted()) : 0;
    if (bytes <= most || bytes < kept.granted()) { // what is given back counts, if it is not enough
        pimpl->weights->change_charges({ { &kept, bytes, bytes } });
    }
    if (bytes > most) {
        throw std::runtime_error("kept prompts may have " + std::to_string(most >> 20) + " MiB of the budget, not " +
                                 std::to_string(bytes >> 20));
    }
}

std::vector<struct superllama_seq_stats> context_hooks::seq_stats() const {
    impl & self = *pimpl;
    const auto placement = hold();
    self.sequences.look(self.ctx.get_memory(), self.paging.pager, self.params.paged_kv);
    return self.sequences.all();
}

void context_hooks::stats(struct superllama_stats & out) const {
    out = {};
    pimpl->collect(out);
}

std::string context_hooks::metrics_json() const {
    struct superllama_stats s = {};
    pimpl->collect(s);
    return superllama::metrics_json(s, pimpl->collect_parts(), METRICS_PERIODIC, false);
}

} // namespace superllama
