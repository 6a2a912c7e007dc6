// The parts of the device tier: how one gets to a device and back.

#include "devices/tier.h"

#include "devices/layer_kv.h"
#include "devices/upload.h"
#include "llama-impl.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cstdint>
#include <future>

namespace superllama {

static double mib(size_t bytes) {
    return (double) bytes / 1048576.0;
}

// To where another one lies, with what belongs to that place: experts have a table on the host.
static void put(ggml_tensor * t, const ggml_tensor & where) {
    t->buffer = where.buffer;
    t->data = where.data;
    t->extra = where.extra;
    t->flags = where.flags;
}

void device_tier::on_host(part & l) {
    for (weight & w : l.weights) {
        put(w.tensor, w.host);
        if (w.tensor == twin) {
            *cfg.output = tied;
        }
    }
    l.buffer.reset();
    l.device = -1;
}

void device_tier::place_on_paper(const std::vector<int> & to) {
    for (size_t il = 0; il < to.size(); ++il) { // no such device has banks
        part & l = parts[il];
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
    for (const weight & w : parts[(size_t) il].weights) {
        found.push_back(w.tensor);
    }
    return found;
}

bool device_tier::move_kv(int p, size_t dev, bool up) {
    if (is_experts(p)) {
        return true; // they have none
    }
    uint64_t copied = 0;
    const bool ok = std::all_of(contexts.begin(), contexts.end(),
                                [&](layer_kv * kv) { return kv->move(p, buft(up ? (int) dev : -1), &copied); });
    (up ? places[dev].bytes_up : places[dev].bytes_down) += copied;
    return ok;
}

bool device_tier::evict(int p, std::string * error) {
    part & l = parts[(size_t) p];
    const int il = layer_of(p);
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
    if (ok && !move_kv(p, (size_t) from, false)) {
        *error = format("no host memory for the %.0f MiB of KV of layer %d", mib(kv_bytes(il)), il);
        ok = false;
    }
    if (!ok || !store.load_resident(error)) {
        move_kv(p, (size_t) from, true);
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

bool device_tier::make_buffer(part & l, size_t dev) {
    l.buffer.reset(ggml_backend_buft_alloc_buffer(buft((int) dev), std::max<size_t>(1, l.bytes)));
    if (l.buffer == nullptr) {
        return false;
    }
    ggml_backend_buffer_set_usage(l.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    return true;
}

void device_tier::no_memory(int p, size_t dev) {
    size_t used = used_bytes(dev);
    for (size_t i = 0; arriving != nullptr && i < arriving->parts.size(); ++i) {
        used += arriving->to[i] == (int) dev ? part_bytes(arriving->parts[i]) : 0;
    }
    places[dev].budget_now = used;
    places[dev].t_grow_us = ggml_time_us() + retry_us;
    LLAMA_LOG_WARN("%s: %s has no memory for layer %d (%.0f MiB); trying again in %d s\n", __func__,
                   ggml_backend_dev_name(cfg.devices[dev]), layer_of(p), mib(parts[(size_t) p].bytes),
                   (int) (retry_us / 1000000));
}

// All or nothing per part: where a device has no memory for one, that one and those below it stay on the host.
bool device_tier::load(const std::vector<int> & coming, const layer_placement & to, bool beside, std::string * error) {
    arriving = std::make_unique<arrival>();
    bool out_of_memory = false;
    for (int p : coming) {
        part & l = parts[(size_t) p];
        const int dev = place_of(p, to);
        if (!make_buffer(l, (size_t) dev) ||
            (!beside && !move_kv(p, (size_t) dev, true))) { // KV goes along, once nobody writes it
            l.buffer.reset();
            move_kv(p, (size_t) dev, false);
            no_memory(p, (size_t) dev);
            out_of_memory = true;
            break;
        }
        arriving->parts.push_back(p);
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
    for (int p : a.parts) {
        n += parts[(size_t) p].weights.size();
    }
    a.tensors.reserve(n);
    std::vector<device_upload_tensor> list;
    for (int p : a.parts) {
        part & l = parts[(size_t) p];
        ggml_tallocr place = ggml_tallocr_new(l.buffer.get());
        for (const weight & w : l.weights) {
            std::vector<const uint8_t *> held;
            if (!beside) {
                held = cfg.keep(w.tensor == twin ? tied : w.tensor);
            }
            a.tensors.push_back(*w.tensor);
            ggml_tensor & t = a.tensors.back();
            put(&t, {}); // nowhere yet
            ggml_tallocr_alloc(&place, &t);
            list.push_back({ &t, w.source, held, store.is_locked(w.tensor) });
        }
    }
    // where there is no thread to be had, it happens when the layers land
    const auto when = beside ? std::launch::async | std::launch::deferred : std::launch::deferred;
    a.uploaded = std::async(when, [this, &a, list] {
        return device_upload(
            store, list, cfg.async, [this](ggml_backend_dev_t dev) { return staging_for(dev, moves); }, &a.error);
    });
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
    for (size_t i = 0; i < a->parts.size(); ++i) {
        const int p = a->parts[i];
        const int il = layer_of(p);
        const int dev = a->to[i];
        part & l = parts[(size_t) p];
        stays = stays || places[(size_t) dev].lost;
        places[(size_t) dev].bytes_up += ok ? l.bytes : 0;
        if (!stays && !move_kv(p, (size_t) dev, true)) {
            no_memory(p, (size_t) dev);
            stays = true;
        }
        if (stays) {
            move_kv(p, (size_t) dev, false);
            on_host(l);
            std::string ignored;
            cfg.layer_moves(il, false, true, &ignored); // it never left
            continue;
        }
        l.device = dev;
        l.n_loads++;
        for (weight & w : l.weights) {
            put(w.tensor, *t++);
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

} // namespace superllama
