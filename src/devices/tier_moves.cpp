// The moves of the device tier: what leaves, what comes, the sizes of banks.

#include "devices/tier.h"

#include "devices/layer_kv.h"
#include "devices/upload.h"
#include "llama-impl.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cstdint>

namespace superllama {

static const int32_t bank_step = 16; // of the slots of a bank: it grows by one of so many parts at least

static double mib(size_t bytes) {
    return (double) bytes / 1048576.0;
}

// Graphs without stops run on behind the call that began them: before what they use moves.
void device_tier::finish_graphs() {
    for (const layer_kv * kv : contexts) {
        kv->finish_graphs();
    }
}

// Where a part is to be.
int device_tier::place_of(int p, const layer_placement & to) const {
    const auto il = (size_t) layer_of(p);
    return is_experts(p) && !to.whole[il] ? -1 : to.device[il];
}

void device_tier::note_sending(const layer_placement & to) {
    for (size_t d = 0; d < n_devices(); ++d) {
        bool lacks = false;
        for (size_t il = 0; il < to.device.size(); ++il) {
            lacks = lacks || (to.device[il] == (int) d && !to.whole[il]);
        }
        if (lacks && (to.sends[d] != sends[d] || !said_sending)) {
            LLAMA_LOG_INFO("%s: experts that %s lacks are %s\n", __func__, ggml_backend_dev_name(cfg.devices[d]),
                           !to.sends[d]      ? "computed here"
                           : banks->shares() ? "sent there, or computed here meanwhile"
                                             : "sent there");
            said_sending = true;
        }
    }
    sends = to.sends;
}

bool device_tier::place(std::string * error, bool beside) {
    ahead_denied = false;
    if (move(error, beside)) {
        return true;
    }
    if (!ahead_denied) {
        return false;
    }
    error->clear(); // it was of a layer that need not leave now
    return move(error, beside);
}

bool device_tier::move(std::string * error, bool beside) {
    const int64_t t_begin = ggml_time_us();
    bool moved = arriving != nullptr;
    if (moved) {
        finish_graphs();
    }
    bool ok = !moved || land(error);
    const layer_placement to = target();
    note_sending(to);
    for (size_t d = 0; d < n_devices(); ++d) { // while something moves, there is no more on a device than there was
        places[d].most = std::max<uint64_t>(places[d].budget_now, used_bytes(d));
    }
    keep_ahead_memory(to);
    const int n_parts = (int) parts.size();
    for (int i = 0; ok && i < n_parts; ++i) {
        const int p = (i + n_parts - n_layers()) % n_parts; // experts before layers, the lowest ones first
        const int from = parts[(size_t) p].device;
        if (from >= 0 && from != place_of(p, to)) {
            finish_graphs();
            ok = leave(p, to, error);
            moved = true;
        }
    }
    moved = resize_banks(to, false) || moved;
    std::vector<int> coming;
    for (int il = n_layers() - 1; ok && il >= 0; --il) {
        for (int p = il; p < n_parts; p += n_layers()) { // a layer, then its experts
            if (parts[(size_t) p].device < 0 && place_of(p, to) >= 0) {
                coming.push_back(p);
            }
        }
        // the KV of a new context
        const int dev = parts[(size_t) il].device;
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
    } else if (ok) {
        moved = resize_banks(to, true) || moved;
    }
    if (moved) {
        n_generation++;
        move_us += ggml_time_us() - t_begin;
        refresh();
        LLAMA_LOG_INFO("%s: %d of %d layers on devices, %.0f of %.0f MiB used\n", __func__, (int) n_on_devices,
                       n_layers(), mib((size_t) count().own_bytes), mib((size_t) count().budget_bytes));
    }
    return ok;
}

// A part goes to the host. False: it stays, and with it what is above it, until a budget changes.
bool device_tier::leave(int p, const layer_placement & to, std::string * error) {
    part & l = parts[(size_t) p];
    const int from = l.device;
    const int il = layer_of(p);
    const int32_t n_slots = to.n_slots[(size_t) il];
    if (is_experts(p) && n_slots > 0) { // some of them stay there
        std::vector<ggml_tensor> whole;
        for (const ggml_tensor * t : banks->weights(il)) {
            whole.push_back(*t);
        }
        banks->resize(il, buft(from), n_slots, room_on((size_t) from), whole);
    }
    if (!is_experts(p) && banks != nullptr) {
        banks->resize(il, buft(from), 0, 0);
    }
    if (evict(p, error)) {
        return true;
    }
    if (is_experts(p)) {
        banks->resize(il, buft(from), 0, 0);
    }
    place_state & s = places[(size_t) from];
    if (s.ahead_bytes > 0) { // for which no layer has to leave
        s.t_ahead_us = ggml_time_us() + retry_us;
        ahead_denied = true;
        return false;
    }
    s.budget_now = placed_bytes((size_t) from) + compute_need((size_t) from);
    s.budget_max = std::max<uint64_t>(s.budget_max, s.budget_now);
    s.t_shrink_us = ggml_time_us() + retry_us;
    return false;
}

// ------------------------------------------------------------------------------------------------- banks

uint64_t device_tier::room_on(size_t dev) const {
    const uint64_t used = used_bytes(dev);
    return places[dev].most - std::min(places[dev].most, used);
}

bool device_tier::resize_bank(int il, int32_t n_slots) {
    const int dev = parts[(size_t) il].device;
    finish_graphs();
    if (banks->resize(il, buft(dev), n_slots, room_on((size_t) dev))) {
        return true;
    }
    places[(size_t) dev].t_grow_us = ggml_time_us() + retry_us;
    LLAMA_LOG_WARN("%s: %s has no memory for %d experts of layer %d\n", __func__,
                   ggml_backend_dev_name(cfg.devices[(size_t) dev]), n_slots, il);
    return false;
}

// Banks that have to shrink, or may grow by so much that it is worth copying what is in them. Whether there were any.
bool device_tier::resize_banks(const layer_placement & to, bool grow) {
    bool any = false;
    for (size_t d = 0; banks != nullptr && d < n_devices(); ++d) {
        std::vector<int> changing;
        uint64_t largest = 0;
        for (int il = n_layers() - 1; il >= 0; --il) {
            const int32_t now = banks->n_slots(il);
            const int32_t wanted = to.n_slots[(size_t) il];
            const bool changes = grow ? wanted >= now + std::max(1, now / bank_step) : wanted < now;
            if (parts[(size_t) il].device == (int) d && changes) {
                changing.push_back(il);
                const expert_sizes & s = experts_of[(size_t) il];
                largest = std::max<uint64_t>(largest, wanted > 0 ? s.bank + s.slot * (size_t) wanted : 0);
            }
        }
        if (changing.empty() || (grow && ggml_time_us() < places[d].t_grow_us)) {
            continue;
        }
        any = true;
        bool ok = true;
        if (room_on(d) < largest) { // one gives up what it holds, that the others may be copied
            ok = resize_bank(changing.front(), 0);
            std::rotate(changing.begin(), changing.begin() + 1, changing.end());
        }
        for (size_t i = 0; ok && i < changing.size(); ++i) {
            ok = resize_bank(changing[i], to.n_slots[(size_t) changing[i]]);
        }
    }
    return any;
}

// ------------------------------------------------------------------------------------------------- parts

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
