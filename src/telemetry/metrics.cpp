#include "telemetry/metrics.h"

#include "base/ledger.h"

#include <algorithm>
#include <cinttypes>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <functional>

namespace superllama {

// ---------------------------------------------------------------------------------------------- JSON line

enum field_kind { FIELD_COUNT, FIELD_MB, FIELD_PRESSURE, FIELD_RATE, FIELD_MS };

struct field {
    const char * name;
    field_kind kind;
    size_t offset; // in superllama_stats
};

#define FIELD(name, kind) { #name, kind, offsetof(struct superllama_stats, name) }
#define FIELD_AS(name, member, kind) { #name, kind, offsetof(struct superllama_stats, member) }

// Order and names are a contract: additions go at the end. `event` stands after prefetch_failed.
static const field fields_before_event[] = {
    FIELD(token, FIELD_COUNT),
    FIELD(prompt_tokens, FIELD_COUNT),
    FIELD(generated_tokens, FIELD_COUNT),
    FIELD(gpu_layers_active, FIELD_COUNT),
    FIELD(cpu_layers_active, FIELD_COUNT),
    FIELD(layers_evicted, FIELD_COUNT),
    FIELD(layers_loaded, FIELD_COUNT),
    FIELD(kv_pages_gpu, FIELD_COUNT),
    FIELD(kv_pages_cpu, FIELD_COUNT),
    FIELD(kv_pages_evicted, FIELD_COUNT),
    FIELD(kv_pages_prefetched, FIELD_COUNT),
    FIELD_AS(vram_used_mb, vram_used_bytes, FIELD_MB),
    FIELD_AS(vram_total_mb, vram_total_bytes, FIELD_MB),
    FIELD_AS(ram_used_mb, ram_used_bytes, FIELD_MB),
    FIELD(gpu_memory_pressure, FIELD_PRESSURE),
    FIELD(cpu_memory_pressure, FIELD_PRESSURE),
    FIELD(tokens_per_sec, FIELD_RATE),
    FIELD(avg_tokens_per_sec, FIELD_RATE),
    FIELD(prefetch_pending, FIELD_COUNT),
    FIELD(prefetch_completed, FIELD_COUNT),
    FIELD(prefetch_failed, FIELD_COUNT),
};

static const field fields_after_event[] = {
    FIELD(disk_layers_active, FIELD_COUNT),
    FIELD(kv_pages_disk, FIELD_COUNT),
    FIELD(weight_bytes_resident, FIELD_COUNT),
    FIELD(weight_bytes_read, FIELD_COUNT),
    FIELD(kv_bytes_read, FIELD_COUNT),
    FIELD(kv_bytes_written, FIELD_COUNT),
    FIELD(stall_ms, FIELD_MS),
    FIELD(expert_hits, FIELD_COUNT),
    FIELD(expert_misses, FIELD_COUNT),
    FIELD(mem_budget_bytes, FIELD_COUNT),
    FIELD(mem_peak_bytes, FIELD_COUNT),
    FIELD(metrics_dropped, FIELD_COUNT),
    FIELD(vram_own_bytes, FIELD_COUNT),
    FIELD(vram_budget_bytes, FIELD_COUNT),
    FIELD(move_ms, FIELD_MS),
    FIELD(expert_guesses, FIELD_COUNT),
    FIELD(expert_guesses_used, FIELD_COUNT),
};

static const field fields_at_end[] = {
    FIELD(threads, FIELD_COUNT),
    FIELD(core_wait_ms, FIELD_MS),
    FIELD(throttled_ms, FIELD_MS),
    FIELD(expert_device_hits, FIELD_COUNT),
    FIELD(expert_device_misses, FIELD_COUNT),
    FIELD(expert_host_computed, FIELD_COUNT),
    FIELD(weight_bytes_ahead, FIELD_COUNT),
    FIELD(expert_device_guesses, FIELD_COUNT),
    FIELD(expert_device_guesses_used, FIELD_COUNT),
};

static std::string memory_by_tag(const struct superllama_stats & stats) {
    std::string json = "{";
    for (size_t i = 0; i < n_memory_tags; ++i) {
        json += std::string(i > 0 ? "," : "") + "\"" + name_of((memory_tag) i) +
                "\":" + std::to_string(stats.memory_by_tag[i]);
    }
    return json + "}";
}

static std::string number(const char * name, int64_t n) {
    return std::string(",\"") + name + "\":" + std::to_string(n);
}

static std::string sequences_json(const std::vector<struct superllama_seq_stats> & sequences) {
    std::string json;
    for (size_t seq = 0; seq < sequences.size(); ++seq) {
        const struct superllama_seq_stats & s = sequences[seq];
        if (s.prompt_tokens + s.generated_tokens + s.kv_tokens > 0) {
            json += std::string(json.empty() ? "" : ",") + "{\"sequence\":" + std::to_string(seq) +
                    number("prompt_tokens", s.prompt_tokens) + number("generated_tokens", s.generated_tokens) +
                    number("kv_tokens", s.kv_tokens) + number("kv_pages_cpu", s.kv_pages_cpu) +
                    number("kv_pages_disk", s.kv_pages_disk) + number("kv_bytes", s.kv_bytes) + "}";
        }
    }
    return "[" + json + "]";
}

static std::string devices_json(const std::vector<struct superllama_device> & devices) {
    std::string json;
    for (const struct superllama_device & d : devices) {
        std::string name;
        for (const char * c = d.name; *c != 0; ++c) { // a backend's own
            name += (unsigned char) *c < ' ' || *c == '"' || *c == '\\' ? '_' : *c;
        }
        json += std::string(json.empty() ? "" : ",") + "{\"device\":\"" + name + "\"" + number("bytes", d.bytes) +
                number("budget_bytes", d.budget_bytes) + number("bytes_up", d.bytes_up) +
                number("bytes_down", d.bytes_down) + "}";
    }
    return "[" + json + "]";
}

static const char * event_name(metrics_event event) {
    switch (event) {
        case METRICS_PERIODIC:
            return "periodic";
        case METRICS_LAYER_EVICTED:
            return "layer_evicted";
        case METRICS_LAYER_LOADED:
            return "layer_loaded";
        case METRICS_KV_PAGE_EVICTED:
            return "kv_page_evicted";
        case METRICS_KV_PAGE_RESTORED:
            return "kv_page_restored";
        case METRICS_FINAL:
            return "final";
    }
    return "";
}

static std::string iso8601(int64_t unix_ms) {
    const time_t seconds = (time_t) (unix_ms / 1000);
    struct tm utc = {};
#ifdef _WIN32
    gmtime_s(&utc, &seconds);
#else
    gmtime_r(&seconds, &utc);
#endif
    char date[32];
    char text[48];
    strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(text, sizeof(text), "%s.%03dZ", date, (int) (unix_ms % 1000));
    return text;
}

static std::string field_text(const struct superllama_stats & stats, const field & f) {
    const char * at = (const char *) &stats + f.offset;
    int64_t n = 0;
    double x = 0;
    memcpy(&n, at, sizeof(n));
    memcpy(&x, at, sizeof(x));

    char text[64];
    switch (f.kind) {
        case FIELD_COUNT:
            snprintf(text, sizeof(text), "%" PRId64, n);
            break;
        case FIELD_MB:
            snprintf(text, sizeof(text), "%.1f", (double) n / 1e6);
            break;
        case FIELD_PRESSURE:
            snprintf(text, sizeof(text), "%.3f", std::min(std::max(x, 0.0), 1.0));
            break;
        case FIELD_RATE:
            snprintf(text, sizeof(text), "%.2f", x);
            break;
        case FIELD_MS:
            snprintf(text, sizeof(text), "%.3f", x);
            break;
    }
    // a locale with a decimal comma is the host program's choice, JSON's is a point
    std::replace(text, text + strlen(text), ',', '.');
    return text;
}

// One row for each layer.
static std::string rows_json(const std::vector<struct superllama_expert> & experts,
                             const std::function<int64_t(const struct superllama_expert &)> & value) {
    std::string json = "[";
    for (size_t i = 0; i < experts.size(); ++i) {
        const bool begins = i == 0 || experts[i].layer != experts[i - 1].layer;
        json += begins ? (i == 0 ? "[" : "],[") : ",";
        json += std::to_string(value(experts[i]));
    }
    return json + "]]";
}

std::string experts_json(const std::vector<struct superllama_expert> & experts) {
    if (experts.empty()) {
        return "null";
    }
    std::string layers;
    for (size_t i = 0; i < experts.size(); ++i) {
        if (i == 0 || experts[i].layer != experts[i - 1].layer) {
            layers += (i == 0 ? "" : ",") + std::to_string(experts[i].layer);
        }
    }
    using expert = struct superllama_expert;
    return "{\"layers\":[" + layers + "],\"uses\":" + rows_json(experts, [](const expert & e) { return e.uses; }) +
           ",\"misses\":" + rows_json(experts, [](const expert & e) { return e.misses; }) +
           ",\"tier\":" + rows_json(experts, [](const expert & e) { return (int64_t) e.tier; }) + "}";
}

std::string metrics_json(const struct superllama_stats & stats, const metrics_parts & parts, metrics_event event,
                         bool pretty) {
    std::string json = "{";
    const auto put = [&](const char * name, const std::string & value) {
        json += json.size() > 1 ? "," : "";
        json += pretty ? "\n  \"" : "\"";
        json += std::string(name) + (pretty ? "\": " : "\":") + value;
    };
    put("timestamp", "\"" + iso8601(stats.timestamp_ms) + "\"");
    for (const field & f : fields_before_event) {
        put(f.name, field_text(stats, f));
    }
    put("event", std::string("\"") + event_name(event) + "\"");
    for (const field & f : fields_after_event) {
        put(f.name, field_text(stats, f));
    }
    put("memory_by_tag", memory_by_tag(stats));
    for (const field & f : fields_at_end) {
        put(f.name, field_text(stats, f));
    }
    put("experts", parts.experts);
    put("sequences", sequences_json(parts.sequences));
    put("devices", devices_json(parts.devices));
    return json + (pretty ? "\n}" : "}");
}

// -------------------------------------------------------------------------------------------------- rates

void metrics_rates::begin(int64_t now_us) {
    t_begin_us = now_us;
}

void metrics_rates::end(int64_t now_us, int64_t n_prompt_new, int64_t n_generated_new) {
    n_prompt += n_prompt_new;
    n_generated += n_generated_new;
    if (n_generated_new > 0) {
        // between two generated tokens the time runs on: sampling belongs to the token
        const bool follows = last_was_generated && t_begin_us - t_end_us < idle_us;
        busy_us += now_us - (follows ? t_end_us : t_begin_us);
    }
    last_was_generated = n_generated_new > 0;
    t_end_us = now_us;
}

static double per_second(int64_t n, int64_t us) {
    return us > 0 ? 1e6 * (double) n / (double) us : 0.0;
}

double metrics_rates::since_mark() const {
    return per_second(n_generated - mark_n_generated, busy_us - mark_busy_us);
}

double metrics_rates::average() const {
    return per_second(n_generated, busy_us);
}

void metrics_rates::mark() {
    mark_busy_us = busy_us.load();
    mark_n_generated = n_generated.load();
}

} // namespace superllama
