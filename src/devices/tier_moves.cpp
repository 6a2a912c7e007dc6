// The moves of the device tier: which parts leave and come, and how large banks are.

#include "devices/tier.h"

#include "devices/layer_kv.h"
#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdint>

namespace superllama {

static const int32_t bank_step = 16; // of the slots of a bank: it grows by one of so many parts at least

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
        if (lacks && (to.sends[d] != sends[d] || !places[d].said_sending)) {
            LLAMA_LOG_INFO("%s: experts that %s lacks are %s\n", __func__, ggml_backend_dev_name(cfg.devices[d]),
                           !to.sends[d]      ? "computed here"
                           : banks->shares() ? "sent there, or computed here meanwhile"
                                             : "sent there");
            places[d].said_sending = true;
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
    }
    if (ok && arriving == nullptr) { // what came may be less than was wanted
        moved = resize_banks(target(), true) || moved;
    }
    if (moved) {
        n_generation++;
        move_us += ggml_time_us() - t_begin;
        refresh();
        LLAMA_LOG_INFO("%s: %d of %d layers on devices, %lld of %lld MiB used\n", __func__, (int) n_on_devices,
                       n_layers(), (long long) count().own_bytes >> 20, (long long) count().budget_bytes >> 20);
    }
    return ok;
}

// A part goes to the host. False: it stays, and with it what is above it, until a budget changes.
bool device_tier::leave(int p, const layer_placement & to, std::string * error) {
    part & l = parts[(size_t) p];
    const int from = l.device;
    const int il = layer_of(p);
    const int32_t n_slots = to.n_slots[(size_t) il];
    if (is_experts(p) && n_slots > 0) { // some of them stay there, where there is room for both a moment
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

} // namespace superllama
