#include "server/prometheus.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <utility>
#include <vector>

namespace superllama {

using json = common_json;

namespace {

struct number {
    const char * name;
    const char * help;
    const char * field; // of the metrics line
    double scale;
};

// Counters end in _total, as their names have to.
const number gauges[] = {
    { "memory_budget_bytes", "host memory that the model may use", "mem_budget_bytes", 1 },
    { "memory_peak_bytes", "most host memory that was in use", "mem_peak_bytes", 1 },
    { "vram_budget_bytes", "memory that it may use on all devices", "vram_budget_bytes", 1 },
    { "vram_used_bytes", "memory in use on devices, of the model and its contexts", "vram_own_bytes", 1 },
    { "weight_resident_bytes", "weights in host memory", "weight_bytes_resident", 1 },
    { "prefetches_pending", "reads ahead that are not done", "prefetch_pending", 1 },
    { "threads", "threads that computed the last graph on the host", "threads", 1 },
};
const number counters[] = {
    { "layers_loaded_total", "layers that came into memory", "layers_loaded", 1 },
    { "layers_evicted_total", "layers that left memory", "layers_evicted", 1 },
    { "weight_read_bytes_total", "weights read from disk", "weight_bytes_read", 1 },
    { "kv_pages_evicted_total", "KV pages that left memory", "kv_pages_evicted", 1 },
    { "kv_pages_prefetched_total", "KV pages read ahead", "kv_pages_prefetched", 1 },
    { "kv_read_bytes_total", "KV pages read from disk", "kv_bytes_read", 1 },
    { "kv_written_bytes_total", "KV pages written to disk", "kv_bytes_written", 1 },
    { "stall_seconds_total", "time that kernels waited for reads", "stall_ms", 1e-3 },
    { "core_wait_seconds_total", "time that threads waited for a core, together", "core_wait_ms", 1e-3 },
    { "throttled_seconds_total", "time that a quota of CPU time held this process back", "throttled_ms", 1e-3 },
    { "move_seconds_total", "time spent moving layers to and from devices", "move_ms", 1e-3 },
    { "prefetches_total", "reads ahead that were done", "prefetch_completed", 1 },
    { "prefetches_failed_total", "reads ahead that failed", "prefetch_failed", 1 },
    { "expert_hits_total", "experts that were in memory when they were chosen", "expert_hits", 1 },
    { "expert_misses_total", "experts that were read when they were chosen", "expert_misses", 1 },
    { "expert_guesses_total", "experts read before they were chosen", "expert_guesses", 1 },
    { "expert_guesses_used_total", "those of them that were chosen", "expert_guesses_used", 1 },
    { "expert_device_hits_total", "experts that were on a device when they were chosen", "expert_device_hits", 1 },
    { "expert_device_misses_total", "experts that were not there", "expert_device_misses", 1 },
    { "expert_host_computed_total", "those of them that the host computed", "expert_host_computed", 1 },
    { "weight_ahead_bytes_total", "weights sent to devices for a large batch before their turn", "weight_bytes_ahead",
      1 },
    { "expert_device_guesses_total", "experts sent to a device before they were chosen", "expert_device_guesses", 1 },
    { "expert_device_guesses_used_total", "those of them that were chosen", "expert_device_guesses_used", 1 },
    { "metrics_lines_dropped_total", "lines of the metrics file that a slow disk could not take", "metrics_dropped",
      1 },
};
const char * const states[] = { "ready", "degraded", "draining", "pausing", "paused", "released", "resuming" };

class text {
  public:
    void family(const char * name, const char * kind, const char * help) {
        const std::string full = std::string("superllama:") + name;
        out += "# HELP " + full + " " + help + "\n# TYPE " + full + " " + kind + "\n";
        last = full;
    }
    void sample(double value, const std::string & labels = "") {
        char digits[32];
        snprintf(digits, sizeof(digits), "%.15g", value);
        out += last + (labels.empty() ? "" : "{" + labels + "}") + " " + digits + "\n";
    }
    std::string out;

  private:
    std::string last;
};

} // namespace

static std::string label(const std::string & name, const std::string & value) {
    std::string escaped;
    for (char c : value) {
        escaped += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c == '\n' ? ' ' : c);
    }
    return name + "=\"" + escaped + "\"";
}

static void write_metrics(text & t, const json & metrics) {
    const auto write = [&](const number & n, const char * kind) {
        t.family(n.name, kind, n.help);
        t.sample(metrics.at(n.field).get<double>() * n.scale);
    };
    for (const number & n : gauges) {
        write(n, "gauge");
    }
    for (const number & n : counters) {
        write(n, "counter");
    }
    t.family("memory_used_bytes", "gauge", "host memory in use, by what it is for");
    for (const auto & tag : metrics.at("memory_by_tag").items()) {
        t.sample(metrics.at("memory_by_tag").at(tag.k).get<double>(), label("tag", tag.k));
    }
    t.family("tokens_total", "counter", "tokens that were processed");
    t.sample(metrics.at("prompt_tokens").get<double>(), label("kind", "prompt"));
    t.sample(metrics.at("generated_tokens").get<double>(), label("kind", "generated"));
    const auto by_tier = [&](const char * name, const char * help, const char * device, const char * host,
                             const char * disk) {
        t.family(name, "gauge", help);
        t.sample(metrics.at(device).get<double>(), label("tier", "device"));
        t.sample(metrics.at(host).get<double>(), label("tier", "host"));
        t.sample(metrics.at(disk).get<double>(), label("tier", "disk"));
    };
    by_tier("layers", "layers by where they are; on disk: not whole in memory", "gpu_layers_active",
            "cpu_layers_active", "disk_layers_active");
    by_tier("kv_pages", "pages of the KV cache by where they are", "kv_pages_gpu", "kv_pages_cpu", "kv_pages_disk");
}

// Of a family, the numbers that each of several has: by the field that names it, and by a label that a field may have.
static void sample_each(text & t, const json & several, const char * named_by,
                        const std::vector<std::pair<const char *, std::string>> & fields) {
    for (const json & one : several) {
        const json & name = one.at(named_by);
        const std::string whose = label(named_by, name.is_string() ? name.get<std::string>() : name.dump());
        for (const auto & [field, more] : fields) {
            t.sample(one.at(field).get<double>(), whose + (more.empty() ? "" : ",") + more);
        }
    }
}

static void write_sequences(text & t, const json & sequences) {
    t.family("sequence_tokens_total", "counter", "tokens that were processed, by the slot's sequence");
    sample_each(t, sequences, "sequence",
                { { "prompt_tokens", label("kind", "prompt") }, { "generated_tokens", label("kind", "generated") } });
    t.family("sequence_kv_tokens", "gauge", "how long a sequence is");
    sample_each(t, sequences, "sequence", { { "kv_tokens", "" } });
    t.family("sequence_kv_bytes", "gauge", "memory of its part of a KV cache that comes and goes");
    sample_each(t, sequences, "sequence", { { "kv_bytes", "" } });
    t.family("sequence_kv_pages", "gauge", "its KV pages by where they are; those of several count for each");
    sample_each(t, sequences, "sequence",
                { { "kv_pages_cpu", label("tier", "host") }, { "kv_pages_disk", label("tier", "disk") } });
}

// Of 0 to 1, as endpoint pickers want it. What sequences share counts for each of them.
static void write_kv_usage(text & t, const json & sequences, double n_ctx) {
    double held = 0;
    for (const json & sequence : sequences) {
        held += sequence.at("kv_tokens").get<double>();
    }
    t.family("kv_usage_ratio", "gauge", "part of the context's tokens that sequences hold, 0 to 1");
    t.sample(std::min(1.0, held / n_ctx));
}

static void write_devices(text & t, const json & devices) {
    t.family("device_used_bytes", "gauge", "memory in use on a device, of the model and its contexts");
    sample_each(t, devices, "device", { { "bytes", "" } });
    t.family("device_budget_bytes", "gauge", "memory that the model may use on a device");
    sample_each(t, devices, "device", { { "budget_bytes", "" } });
    t.family("device_moved_bytes_total", "counter", "weights and KV that moved to a device, and KV that moved back");
    sample_each(t, devices, "device",
                { { "bytes_up", label("direction", "up") }, { "bytes_down", label("direction", "down") } });
}

std::string prometheus_text(const json & status, int64_t n_refused) {
    text t;
    t.family("build_info", "gauge", "the version that runs");
    t.sample(1, label("version", status.at("version").get<std::string>()) + "," +
                    label("upstream_build", status.at("upstream_build").get<std::string>()));
    t.family("state", "gauge", "1 for the state that the server is in");
    for (const char * state : states) {
        t.sample(status.at("state").get<std::string>() == state, label("state", state));
    }
    t.family("requests_in_flight", "gauge", "requests that run or wait for a slot");
    t.sample(status.at("requests_in_flight").get<double>());
    t.family("requests_refused_total", "counter", "requests that came while the server drained or was paused");
    t.sample((double) n_refused);
    if (status.contains("metrics")) { // not while the memory is given back
        write_metrics(t, status.at("metrics"));
        write_kv_usage(t, status.at("metrics").at("sequences"), status.at("n_ctx").get<double>());
        if (!status.at("metrics").at("sequences").empty()) { // a family has samples
            write_sequences(t, status.at("metrics").at("sequences"));
        }
        if (!status.at("metrics").at("devices").empty()) {
            write_devices(t, status.at("metrics").at("devices"));
        }
    }
    return t.out;
}

} // namespace superllama
