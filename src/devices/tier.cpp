#include "devices/tier.h"

#include "devices/layer_kv.h"
#include "telemetry/memory.h"
#include "telemetry/pressure.h"

#include "ggml-backend.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace superllama {

static const int64_t device_sample_us = 100000; // at most so often, near devices
static const uint64_t budget_unknown = 1ull << 50;
static const double device_grow_margin = 0.02; // below the high mark, so that growing never triggers shrinking

bool device_tier::holds_experts(ggml_backend_dev_t dev) {
    return ggml_backend_dev_host_buffer_type(dev) != nullptr || getenv("SUPERLLAMA_EXPERTS") != nullptr;
}

// From host memory that it reads well.
static bool copies_beside(ggml_backend_dev_t dev) {
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);
    return props.caps.async && ggml_backend_dev_host_buffer_type(dev) != nullptr;
}

// Of layers all of whose experts may go.
static std::unique_ptr<expert_banks> make_banks(const device_tier::config & cfg) {
    std::vector<expert_banks::layer_weights> layers;
    for (const expert_banks::layer_weights & l : cfg.experts) {
        if (std::none_of(l.weights.begin(), l.weights.end(), cfg.pinned)) {
            layers.push_back(l);
            layers.back().router = l.router != nullptr && cfg.pinned(l.router) ? nullptr : l.router;
        }
    }
    std::vector<expert_banks::device> devices;
    for (size_t d = 0; d < cfg.devices.size(); ++d) {
        const double link = cfg.link_share[d];
        const bool shares = cfg.share_misses && !std::isinf(link);
        devices.push_back({ cfg.devices[d], shares, link, cfg.async && !shares && copies_beside(cfg.devices[d]) });
    }
    const bool any = !layers.empty() && std::any_of(cfg.devices.begin(), cfg.devices.end(), device_tier::holds_experts);
    return any ? std::make_unique<expert_banks>(layers, cfg.n_expert_used, devices) : nullptr;
}

device_tier::device_tier(weight_store & store, const config & cfg) :
    store(store),
    cfg(cfg),
    banks(make_banks(cfg)),
    parts((size_t) cfg.n_layers_all * (banks != nullptr ? 2 : 1)),
    places(cfg.devices.size()),
    sample_us(device_sample_us) {
    const int n_output = cfg.n_layers_all - 1;
    for (const weight_tensor & t : store.tensors()) {
        const bool apart = banks != nullptr && banks->is_of_bank(t.tensor);
        const int il = apart ? t.layer + cfg.n_layers_all : t.layer >= 0 ? t.layer : n_output;
        if (cfg.pinned(t.tensor)) {
            any_pinned = any_pinned || t.layer >= 0;
            continue;
        }
        // an embedding that is the output matrix too is one tensor, or two of one name in buffers of two types
        const bool own_output = t.tensor == *cfg.output && t.tensor != cfg.tok_embd;
        if (t.layer >= 0 || own_output || strncmp(t.tensor->name, "output", 6) == 0) {
            parts[(size_t) il].weights.push_back({ t.tensor, t.source, *t.tensor });
        } else if (t.tensor == *cfg.output && t.tensor == cfg.tok_embd) {
            // rows are looked up on the host, so that the device gets a tensor of its own
            twin_ctx.reset(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
            twin = ggml_dup_tensor(twin_ctx.get(), t.tensor);
            ggml_set_name(twin, t.tensor->name);
            tied = t.tensor;
            parts[(size_t) il].weights.push_back({ twin, t.source, *twin });
        }
    }
    for (part & l : parts) {
        std::sort(l.weights.begin(), l.weights.end(), [](const weight & a, const weight & b) {
            return std::make_pair(a.source.file, a.source.offset) < std::make_pair(b.source.file, b.source.offset);
        });
        for (size_t d = 0; d < n_devices(); ++d) {
            size_t bytes = 0;
            for (const weight & w : l.weights) {
                bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(buft((int) d), w.tensor),
                                  ggml_backend_buft_get_alignment(buft((int) d)));
            }
            l.bytes = std::max(l.bytes, bytes);
        }
    }
    for (const weight_tensor & t : store.tensors()) {
        for (size_t d = 0; d < n_devices() && t.layer >= 0; ++d) {
            const size_t bytes = GGML_PAD(ggml_nbytes(t.tensor), ggml_backend_buft_get_alignment(buft((int) d)));
            largest_weights = std::max(largest_weights, bytes);
        }
    }
    for (int il = 0; il < n_layers(); ++il) {
        expert_sizes most;
        for (size_t d = 0; banks != nullptr && d < n_devices(); ++d) {
            const expert_sizes s = banks->sizes(il, buft((int) d));
            most = { std::max(most.all, s.all), std::max(most.slot, s.slot), std::max(most.bank, s.bank), s.n_min,
                     s.n_expert };
        }
        experts_of.push_back(most);
    }
    sends.resize(n_devices());
    const auto memory = device_memory_sample(cfg.devices);
    for (size_t d = 0; d < n_devices(); ++d) {
        set_budget(d, cfg.budgets[d], memory[d].free, memory[d].total);
        sample_us += (int64_t) (20e6 * cfg.crossing_s[d]); // asking far devices takes a twentieth of the time
    }
}

device_tier::~device_tier() = default;

ggml_backend_buffer_type_t device_tier::buft(int dev) const {
    return dev < 0 ? ggml_backend_cpu_buffer_type() : ggml_backend_dev_buffer_type(cfg.devices[(size_t) dev]);
}

ggml_backend_dev_t device_tier::device_of(int il) const {
    const int dev = parts[(size_t) il].device;
    return dev < 0 ? nullptr : cfg.devices[(size_t) dev];
}

// ------------------------------------------------------------------------------------------------- policy

size_t device_tier::kv_bytes(int p) const {
    size_t bytes = 0;
    for (const layer_kv * kv : contexts) {
        bytes += is_experts(p) ? 0 : kv->device_bytes(p);
    }
    return bytes;
}

size_t device_tier::placed_bytes(size_t dev) const {
    size_t bytes = 0;
    for (int p = 0; p < (int) parts.size(); ++p) {
        const bool here = parts[(size_t) p].device == (int) dev;
        bytes += here ? part_bytes(p) : 0;
        bytes += here && banks != nullptr && !is_experts(p) ? banks->bytes(p) : 0;
    }
    return bytes;
}

size_t device_tier::used_bytes(size_t dev) const {
    size_t bytes = placed_bytes(dev);
    for (const layer_kv * kv : contexts) {
        bytes += kv->compute_now[dev];
    }
    return bytes + (places[dev].ahead != nullptr ? ggml_backend_buffer_get_size(places[dev].ahead.get()) : 0);
}

size_t device_tier::compute_need(size_t dev) const {
    size_t bytes = 0;
    for (const layer_kv * kv : contexts) {
        bytes += kv->compute_need[dev] + kv->spare_bytes();
    }
    return bytes;
}

bool device_tier::has_room() const {
    for (size_t d = 0; d < n_devices(); ++d) {
        if (compute_need(d) > places[d].budget_now) {
            return false;
        }
    }
    return true;
}

layer_placement device_tier::target() const {
    std::vector<uint64_t> budgets;
    std::vector<size_t> kv, compute;
    for (size_t d = 0; d < n_devices(); ++d) {
        budgets.push_back(places[d].budget_now);
        compute.push_back(compute_need(d));
    }
    for (int il = 0; il < n_layers(); ++il) {
        kv.push_back(kv_bytes(il));
    }
    return target(budgets, kv, compute, cfg.crossing_s);
}

layer_placement device_tier::target(const std::vector<uint64_t> & budgets, const std::vector<size_t> & kv,
                                    const std::vector<size_t> & compute, const std::vector<double> & crossing_s) const {
    placement_sizes sizes = {
        {}, experts_of, cfg.n_layers_max, {}, cfg.n_layers, crossing_s, {}, cfg.link_share, sends
    };
    for (int il = 0; il < n_layers(); ++il) {
        sizes.layers.push_back(parts[(size_t) il].bytes + kv[(size_t) il]);
    }
    for (size_t d = 0; d < n_devices(); ++d) {
        // the host computes some of those that a bank lacks: that adds its speed to the link's
        sizes.link_share[d] += banks != nullptr && banks->shares() && sizes.link_share[d] > 0 ? 1 : 0;
        sizes.room.push_back(budgets[d] - std::min<uint64_t>(budgets[d], compute[d]));
        sizes.has_banks.push_back(banks != nullptr && holds_experts(cfg.devices[d]));
    }
    const layer_placement to = place_layers(sizes);
    bool less = false;
    for (size_t d = 0; d < n_devices(); ++d) {
        const size_t bytes = ahead_bytes(d, sizes.room[d]);
        sizes.room[d] -= bytes;
        less = less || bytes > 0;
    }
    return less && !is_all_there(to) ? place_layers(sizes) : to;
}

bool device_tier::is_all_there(const layer_placement & to) const {
    for (int p = 0; p < (int) parts.size(); ++p) {
        if (!parts[(size_t) p].weights.empty() && place_of(p, to) < 0) {
            return false;
        }
    }
    return !any_pinned;
}

void device_tier::set_budget(size_t dev, uint64_t bytes, size_t free, size_t total) {
    place_state & p = places[dev];
    p.t_grow_us = 0;
    if (bytes > 0 || total == 0) { // a device that does not tell is filled until an allocation fails
        p.budget_max = bytes > 0 ? bytes : budget_unknown;
        p.budget_now = p.budget_max;
    } else {
        p.budget_max = total;
        p.budget_now = automatic_budget(used_bytes(dev), free, cfg.mem_pressure);
    }
}

uint64_t device_tier::automatic_budget(uint64_t used, uint64_t free, float mem_pressure) {
    return used + (uint64_t) ((double) free * (double) mem_pressure);
}

void device_tier::ask(const std::vector<uint64_t> & budgets) {
    const std::lock_guard<std::mutex> lock(asked_mutex);
    asked = budgets;
}

bool device_tier::apply_asked(std::string * error) {
    std::vector<uint64_t> budgets;
    {
        const std::lock_guard<std::mutex> lock(asked_mutex);
        budgets.swap(asked);
    }
    if (budgets.empty()) {
        return true;
    }
    const auto memory = device_memory_sample(cfg.devices);
    for (size_t d = 0; d < n_devices(); ++d) {
        set_budget(d, budgets[d], memory[d].free, memory[d].total);
    }
    return place(error);
}

bool device_tier::sample(std::string * error) {
    if (arriving != nullptr) {
        const bool waits = arriving->uploaded.wait_for(std::chrono::seconds(0)) == std::future_status::timeout;
        return waits || place(error);
    }
    const int64_t now = ggml_time_us();
    if (now - t_sample_us < sample_us) {
        return true;
    }
    t_sample_us = now;
    const auto memory = device_memory_sample(cfg.devices);
    const pressure_marks marks = { cfg.mem_pressure, cfg.mem_pressure_low, device_grow_margin };
    double highest = 0;
    bool changed = false;
    for (size_t d = 0; d < n_devices(); ++d) {
        if (memory[d].total == 0) {
            continue; // the device does not tell
        }
        place_state & p = places[d];
        const double total = (double) memory[d].total;
        const double used = (double) used_bytes(d);
        const auto available = (double) memory[d].free;
        const double pressure = pressure_marks::of(total, available);
        highest = std::max({ highest, pressure, used / (double) std::max<uint64_t>(1, p.budget_now) });
        double budget = (double) p.budget_now;
        const double change = marks.change(total, available);
        if (change < 0 && now >= p.t_shrink_us) {
            budget = std::max(0.0, used + change);
        } else if (change > 0 && now >= p.t_grow_us) {
            budget = std::max(budget, used + change);
        }
        const uint64_t next = (uint64_t) std::min(budget, (double) p.budget_max);
        changed = changed || next != p.budget_now;
        p.budget_now = next;
    }
    fullest = highest;
    return !changed || place(error, cfg.async);
}

bool device_tier::allocation_failed(size_t dev, std::string * error) {
    const size_t used = used_bytes(dev);
    for (int il = 0; il < n_layers(); ++il) {
        if (parts[(size_t) il].device == (int) dev) {
            places[dev].budget_now = used - std::min(used, part_bytes(il));
            places[dev].t_grow_us = ggml_time_us() + retry_us;
            return place(error);
        }
    }
    return false;
}

bool device_tier::device_lost(size_t dev, std::string * error) {
    places[dev].budget_now = 0;
    places[dev].t_grow_us = ggml_time_us() + retry_us;
    places[dev].lost = true;
    const bool ok = place(error);
    places[dev].lost = false;
    return ok;
}

void device_tier::forget(layer_kv * kv) {
    contexts.erase(std::remove(contexts.begin(), contexts.end(), kv), contexts.end());
    n_generation++; // servers drop their copies of graphs when a buffer is freed
    refresh();
}

// ------------------------------------------------------------------------------------------------- reports

void device_tier::refresh() {
    int n = 0;
    size_t on_host = 0;
    for (int il = 0; il < n_layers(); ++il) {
        n += parts[(size_t) il].device >= 0 ? 1 : 0;
        for (const layer_kv * kv : contexts) {
            on_host += parts[(size_t) il].device < 0 ? kv->host_bytes(il) : 0;
        }
    }
    for (size_t d = 0; d < n_devices(); ++d) {
        places[d].own = used_bytes(d);
    }
    n_on_devices = n;
    n_kv_host = on_host;
}

device_tier::layer_info device_tier::info(int il) const {
    const part & l = parts[(size_t) il];
    const part * experts = banks != nullptr ? &parts[(size_t) (il + n_layers())] : nullptr;
    const size_t there = experts == nullptr        ? 0
                         : experts->device >= 0    ? experts->bytes
                         : banks->n_slots(il) == 0 ? 0
                                                   : banks->bytes(il);
    return { device_of(il), l.bytes + there, l.n_loads, l.n_evictions };
}

device_tier::counters device_tier::count() const {
    counters c = {};
    for (const part & l : parts) {
        c.n_loads += l.n_loads;
        c.n_evictions += l.n_evictions;
    }
    for (const place_state & p : places) {
        c.budget_bytes += (int64_t) p.budget_now;
        c.own_bytes += (int64_t) p.own;
    }
    c.pressure = fullest;
    c.move_ms = (double) move_us / 1000.0;
    return c;
}

std::vector<struct superllama_device> device_tier::count_devices() const {
    std::vector<struct superllama_device> found;
    for (size_t d = 0; d < n_devices(); ++d) {
        const place_state & p = places[d];
        const expert_banks::traffic of_banks =
            banks != nullptr ? banks->traffic_of(cfg.devices[d]) : expert_banks::traffic();
        found.push_back({ ggml_backend_dev_name(cfg.devices[d]), (int64_t) p.own, (int64_t) p.budget_now,
                          (int64_t) p.bytes_up + of_banks.up, (int64_t) p.bytes_down + of_banks.down });
    }
    return found;
}

} // namespace superllama
