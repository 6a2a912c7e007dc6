#include "devices/tier.h"

#include "devices/layer_kv.h"
#include "devices/placement.h"
#include "devices/upload.h"
#include "llama-impl.h"
#include "telemetry/memory.h"
#include "telemetry/pressure.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

namespace superllama {

static double mib(size_t bytes) {
    return (double) bytes / 1048576.0;
}

static const int64_t device_sample_us = 100000; // at most so often, near devices
static const int device_retry_us = 10000000;
static const uint64_t budget_unknown = 1ull << 50;
static const double device_grow_margin = 0.02; // below the high mark, so that growing never triggers shrinking

device_tier::device_tier(weight_store & store, const config & cfg) :
    store(store),
    cfg(cfg),
    layers((size_t) cfg.n_layers_all),
    places(cfg.devices.size()),
    sample_us(device_sample_us) {
    const int n_output = (int) layers.size() - 1;
    for (const weight_tensor & t : store.tensors()) {
        const int il = t.layer >= 0 ? t.layer : n_output;
        if (cfg.pinned(t.tensor)) {
            continue;
        }
        // an embedding that is the output matrix too is one tensor, or two of one name in buffers of two types
        const bool own_output = t.tensor == *cfg.output && t.tensor != cfg.tok_embd;
        if (t.layer >= 0 || own_output || strncmp(t.tensor->name, "output", 6) == 0) {
            layers[(size_t) il].weights.push_back({ t.tensor, t.source, *t.tensor });
        } else if (t.tensor == *cfg.output && t.tensor == cfg.tok_embd) {
            // rows are looked up on the host, so that the device gets a tensor of its own
            twin_ctx.reset(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
            twin = ggml_dup_tensor(twin_ctx.get(), t.tensor);
            ggml_set_name(twin, t.tensor->name);
            tied = t.tensor;
            layers[(size_t) il].weights.push_back({ twin, t.source, *twin });
        }
    }
    for (layer & l : layers) {
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
    const int dev = layers[(size_t) il].device;
    return dev < 0 ? nullptr : cfg.devices[(size_t) dev];
}

// ------------------------------------------------------------------------------------------------- policy

size_t device_tier::kv_bytes(int il) const {
    size_t bytes = 0;
    for (const layer_kv * kv : contexts) {
        bytes += kv->bytes(il);
    }
    return bytes;
}

size_t device_tier::placed_bytes(size_t dev) const {
    size_t bytes = 0;
    for (size_t il = 0; il < layers.size(); ++il) {
        bytes += layers[il].device == (int) dev ? layers[il].bytes + kv_bytes((int) il) : 0;
    }
    return bytes;
}

size_t device_tier::used_bytes(size_t dev) const {
    size_t bytes = placed_bytes(dev);
    for (const layer_kv * kv : contexts) {
        bytes += kv->compute_now[dev];
    }
    return bytes;
}

size_t device_tier::compute_need(size_t dev) const {
    size_t bytes = 0;
    for (const layer_kv * kv : contexts) {
        bytes += kv->compute_need[dev];
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

std::vector<int> device_tier::target() const {
    std::vector<uint64_t> budgets;
    std::vector<size_t> kv, compute;
    for (size_t d = 0; d < n_devices(); ++d) {
        budgets.push_back(places[d].budget_now);
        compute.push_back(compute_need(d));
    }
    for (int il = 0; il < (int) layers.size(); ++il) {
        kv.push_back(kv_bytes(il));
    }
    return target(budgets, kv, compute, cfg.crossing_s);
}

std::vector<int> device_tier::target(const std::vector<uint64_t> & budgets, const std::vector<size_t> & kv,
                                     const std::vector<size_t> & compute,
                                     const std::vector<double> & crossing_s) const {
    placement_sizes sizes = { {}, cfg.n_layers_max, {}, cfg.n_layers, crossing_s };
    for (size_t il = 0; il < layers.size(); ++il) {
        sizes.layers.push_back(layers[il].bytes + kv[il]);
    }
    for (size_t d = 0; d < n_devices(); ++d) {
        sizes.room.push_back(budgets[d] - std::min<uint64_t>(budgets[d], compute[d]));
    }
    return place_layers(sizes);
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
    for (size_t il = 0; il < layers.size(); ++il) {
        if (layers[il].device == (int) dev) {
            places[dev].budget_now = used - std::min(used, layers[il].bytes + kv_bytes((int) il));
            places[dev].t_grow_us = ggml_time_us() + device_retry_us;
            return place(error);
        }
    }
    return false;
}

bool device_tier::device_lost(size_t dev, std::string * error) {
    places[dev].budget_now = 0;
    places[dev].t_grow_us = ggml_time_us() + device_retry_us;
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

// ------------------------------------------------------------------------------------------------- moving

// Graphs without stops run on behind the call that began them: before what they use moves.
void device_tier::finish_graphs() {
    for (const layer_kv * kv : contexts) {
        kv->finish_graphs();
    }
}

bool device_tier::place(std::string * error, bool beside) {
    const int64_t t_begin = ggml_time_us();
    bool moved = arriving != nullptr;
    if (moved) {
        finish_graphs();
    }
    bool ok = !moved || land(error);
    const std::vector<int> to = target();
    std::vector<int> coming;
    for (int il = 0; ok && il < (int) layers.size(); ++il) {
        const int from = layers[(size_t) il].device;
        if (from < 0 || from == to[(size_t) il]) {
            continue;
        }
        finish_graphs();
        ok = evict(il, error);
        moved = true;
        if (!ok) { // it stays, and what is above it, until a budget changes
            place_state & p = places[(size_t) from];
            p.budget_now = placed_bytes((size_t) from) + compute_need((size_t) from);
            p.budget_max = std::max<uint64_t>(p.budget_max, p.budget_now);
            p.t_shrink_us = ggml_time_us() + device_retry_us;
        }
    }
    for (int il = (int) layers.size() - 1; ok && il >= 0; --il) {
        const int dev = layers[(size_t) il].device;
        if (dev < 0 && to[(size_t) il] >= 0) {
            coming.push_back(il);
        }
        // the KV of a new context
        const bool late = dev >= 0 && std::any_of(contexts.begin(), contexts.end(),
                                                  [&](const layer_kv * kv) { return !kv->is_at(il, buft(dev)); });
        moved = moved || late;
        if (late) {
            finish_graphs();
        }
        if (late && !move_kv(il, (size_t) dev, true)) {
            return allocation_failed((size_t) dev, error);
        }
    }
    if (!coming.empty()) {
        beside = beside && !moved;
        if (!beside) {
            finish_graphs();
        }
        ok = load(coming, to, beside, error) && ok;
        moved = !beside;
    }
    if (moved) {
        n_generation++;
        move_us += ggml_time_us() - t_begin;
        refresh();
        LLAMA_LOG_INFO("%s: %d of %zu layers on devices, %.0f of %.0f MiB used\n", __func__, (int) n_on_devices,
                       layers.size(), mib((size_t) count().own_bytes), mib((size_t) count().budget_bytes));
    }
    return ok;
}

void device_tier::on_host(layer & l) {
    for (weight & w : l.weights) {
        w.tensor->buffer = w.host.buffer;
        w.tensor->data = w.host.data;
        w.tensor->extra = w.host.extra;
        w.tensor->flags = w.host.flags;
        if (w.tensor == twin) {
            *cfg.output = tied;
        }
    }
    l.buffer.reset();
    l.device = -1;
}

void device_tier::place_on_paper(const std::vector<int> & to) {
    for (size_t il = 0; il < layers.size(); ++il) {
        layer & l = layers[il];
        on_host(l);
        if (to[il] >= 0) {
            l.buffer.reset(ggml_backend_buft_alloc_buffer(buft(to[il]), 0));
            l.device = to[il];
        }
        for (weight & w : l.weights) {
            store.hold_resident(w.tensor, to[il] < 0);
            w.tensor->buffer = to[il] < 0 ? w.host.buffer : l.buffer.get();
        }
    }
}

std::vector<const ggml_tensor *> device_tier::weights_of(int il) const {
    std::vector<const ggml_tensor *> found;
    for (const weight & w : layers[(size_t) il].weights) {
        found.push_back(w.tensor);
    }
    return found;
}

bool device_tier::move_kv(int il, size_t dev, bool up) {
    uint64_t copied = 0;
    const bool ok = std::all_of(contexts.begin(), contexts.end(),
                                [&](layer_kv * kv) { return kv->move(il, buft(up ? (int) dev : -1), &copied); });
    (up ? places[dev].bytes_up : places[dev].bytes_down) += copied;
    return ok;
}

bool device_tier::evict(int il, std::string * error) {
    layer & l = layers[(size_t) il];
    const int from = l.device;
    std::vector<ggml_tensor> on_device;
    for (weight & w : l.weights) {
        on_device.push_back(*w.tensor);
        *w.tensor = w.host;
        store.hold_resident(w.tensor, true);
    }
    l.device = -1;
    refresh();
    bool ok = cfg.layer_moves(il, false, places[(size_t) from].lost, error);
    if (ok && !move_kv(il, (size_t) from, false)) {
        *error = format("no host memory for the %.0f MiB of KV of layer %d", mib(kv_bytes(il)), il);
        ok = false;
    }
    if (!ok || !store.load_resident(error)) {
        move_kv(il, (size_t) from, true);
        for (size_t i = 0; i < l.weights.size(); ++i) {
            *l.weights[i].tensor = on_device[i];
            store.hold_resident(l.weights[i].tensor, false);
        }
        l.device = from;
        refresh();
        std::string ignored;
        cfg.layer_moves(il, true, false, &ignored);
        *error =
            format("layer %d stays on %s: %s", il, ggml_backend_dev_name(cfg.devices[(size_t) from]), error->c_str());
        return false;
    }
    error->clear();
    on_host(l);
    l.n_evictions++;
    return true;
}

bool device_tier::make_buffer(layer & l, size_t dev) {
    l.buffer.reset(ggml_backend_buft_alloc_buffer(buft((int) dev), std::max<size_t>(1, l.bytes)));
    if (l.buffer == nullptr) {
        return false;
    }
    ggml_backend_buffer_set_usage(l.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    return true;
}

void device_tier::no_memory(int il, size_t dev) {
    size_t used = used_bytes(dev);
    for (size_t i = 0; arriving != nullptr && i < arriving->layers.size(); ++i) {
        const int other = arriving->layers[i];
        used += arriving->to[i] == (int) dev ? layers[(size_t) other].bytes + kv_bytes(other) : 0;
    }
    places[dev].budget_now = used;
    places[dev].t_grow_us = ggml_time_us() + device_retry_us;
    LLAMA_LOG_WARN("%s: %s has no memory for layer %d (%.0f MiB); trying again in %d s\n", __func__,
                   ggml_backend_dev_name(cfg.devices[dev]), il, mib(layers[(size_t) il].bytes),
                   device_retry_us / 1000000);
}

// All or nothing per layer: where a device has no memory for one, that one and those below it stay on the host.
bool device_tier::load(const std::vector<int> & coming, const std::vector<int> & to, bool beside, std::string * error) {
    arriving = std::make_unique<arrival>();
    bool out_of_memory = false;
    for (int il : coming) {
        layer & l = layers[(size_t) il];
        const int dev = to[(size_t) il];
        if (!make_buffer(l, (size_t) dev) ||
            (!beside && !move_kv(il, (size_t) dev, true))) { // KV goes along, once nobody writes it
            l.buffer.reset();
            move_kv(il, (size_t) dev, false);
            no_memory(il, (size_t) dev);
            out_of_memory = true;
            break;
        }
        arriving->layers.push_back(il);
        arriving->to.push_back(dev);
    }
    upload(beside);
    // what is below may fit on another device
    return beside || (land(error) && (!out_of_memory || place(error)));
}

// Fills the buffers, now or in a thread.
void device_tier::upload(bool beside) {
    arrival & a = *arriving;
    size_t n = 0;
    for (int il : a.layers) {
        n += layers[(size_t) il].weights.size();
    }
    a.tensors.reserve(n);
    std::vector<device_upload_tensor> list;
    for (int il : a.layers) {
        layer & l = layers[(size_t) il];
        ggml_tallocr place = ggml_tallocr_new(l.buffer.get());
        for (const weight & w : l.weights) {
            std::vector<const uint8_t *> held;
            if (!beside) {
                held = cfg.keep(w.tensor == twin ? tied : w.tensor);
            }
            a.tensors.push_back(*w.tensor);
            ggml_tensor & t = a.tensors.back();
            t.buffer = nullptr;
            t.data = nullptr;
            t.extra = nullptr;
            t.flags = 0; // experts have a table on the host
            ggml_tallocr_alloc(&place, &t);
            list.push_back({ &t, w.source, held });
        }
    }
    // where there is no thread to be had, it happens when the layers land
    const auto when = beside ? std::launch::async | std::launch::deferred : std::launch::deferred;
    a.uploaded = std::async(when, [this, &a, list] { return device_upload(store, list, cfg.async, &a.error); });
}

// Points the tensors of what has arrived at their new memory.
bool device_tier::land(std::string * error) {
    const std::unique_ptr<arrival> a = std::move(arriving);
    const bool ok = a->uploaded.get();
    if (!ok) {
        *error = a->error;
    }
    bool stays = !ok;
    const ggml_tensor * t = a->tensors.data();
    for (size_t i = 0; i < a->layers.size(); ++i) {
        const int il = a->layers[i];
        const int dev = a->to[i];
        layer & l = layers[(size_t) il];
        stays = stays || places[(size_t) dev].lost;
        places[(size_t) dev].bytes_up += ok ? l.bytes : 0;
        if (!stays && !move_kv(il, (size_t) dev, true)) {
            no_memory(il, (size_t) dev);
            stays = true;
        }
        if (stays) {
            move_kv(il, (size_t) dev, false);
            on_host(l);
            std::string ignored;
            cfg.layer_moves(il, false, true, &ignored); // it never left
            continue;
        }
        l.device = dev;
        l.n_loads++;
        for (weight & w : l.weights) {
            w.tensor->buffer = t->buffer;
            w.tensor->data = t->data;
            w.tensor->extra = t->extra;
            w.tensor->flags = t->flags;
            t++;
            store.hold_resident(w.tensor, false);
            if (w.tensor == twin) {
                *cfg.output = twin;
            }
        }
        refresh();
        cfg.layer_moves(il, true, false, error);
    }
    return ok;
}

// ------------------------------------------------------------------------------------------------- reports

void device_tier::refresh() {
    int n = 0;
    size_t on_host = 0;
    for (size_t il = 0; il < layers.size(); ++il) {
        n += layers[il].device >= 0 ? 1 : 0;
        on_host += layers[il].device < 0 ? kv_bytes((int) il) : 0;
    }
    for (size_t d = 0; d < n_devices(); ++d) {
        places[d].own = used_bytes(d);
    }
    n_on_devices = n;
    n_kv_host = on_host;
}

device_tier::layer_info device_tier::info(int il) const {
    const layer & l = layers[(size_t) il];
    return { device_of(il), l.bytes, l.n_loads, l.n_evictions };
}

device_tier::counters device_tier::count() const {
    counters c = {};
    for (const layer & l : layers) {
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
        found.push_back({ ggml_backend_dev_name(cfg.devices[d]), (int64_t) p.own, (int64_t) p.budget_now,
                          (int64_t) p.bytes_up, (int64_t) p.bytes_down });
    }
    return found;
}

} // namespace superllama
