// What the device tier sends for large batches: weights of the host, when they are needed or before.

#include "devices/tier.h"

#include "devices/layer_kv.h"
#include "devices/upload.h"

#include "ggml-backend-impl.h"

#include <algorithm>

namespace superllama {

static const size_t n_ahead_min = 2; // of the largest matrices, those that wait on a device or go there
static const size_t n_ahead_max = 4;
static const uint64_t ahead_part = 8; // of the room on it, what they may take

// Upstream gives a large batch to the first device that takes any.
size_t device_tier::ahead_bytes(size_t dev, uint64_t room) const {
    const auto takes = [](ggml_backend_dev_t d) { return d->iface.offload_op != nullptr; };
    const auto first = std::find_if(cfg.devices.begin(), cfg.devices.end(), takes);
    const bool any = std::any_of(contexts.begin(), contexts.end(), [](const layer_kv * kv) { return kv->offloads; });
    const bool denied = ggml_time_us() < places[dev].t_ahead_us;
    if (!cfg.async || !any || denied || first == cfg.devices.end() || *first != cfg.devices[dev]) {
        return 0;
    }
    for (size_t n = n_ahead_max; n >= n_ahead_min; --n) {
        if (n * largest_weights <= room / ahead_part) {
            return n * largest_weights;
        }
    }
    return 0;
}

// Made when it is first needed, for most devices need none.
locked_staging * device_tier::staging_for(ggml_backend_dev_t dev, stagings & of) {
    const auto found = of.find(dev);
    return found != of.end() ? found->second.get() : (of[dev] = locked_staging::create(dev)).get();
}

// What is there for weights that are sent ahead: room is kept for it, where some stay on the host.
void device_tier::keep_ahead_memory(const layer_placement & to) {
    const bool all = is_all_there(to);
    for (size_t d = 0; d < n_devices(); ++d) {
        place_state & s = places[d];
        const uint64_t need = compute_need(d);
        const size_t there = s.ahead != nullptr ? ggml_backend_buffer_get_size(s.ahead.get()) : 0;
        s.ahead_bytes = all ? 0 : ahead_bytes(d, s.budget_now - std::min<uint64_t>(s.budget_now, need));
        if (there > s.ahead_bytes) {
            finish_graphs();
            s.ahead.reset();
            refresh();
        }
    }
}

sent_ahead::device device_tier::ahead(const ggml_tensor * to) {
    ggml_backend_dev_t dev = device_with(to);
    const auto found = std::find(cfg.devices.begin(), cfg.devices.end(), dev);
    if (found == cfg.devices.end()) {
        return {};
    }
    const auto d = (size_t) (found - cfg.devices.begin());
    place_state & s = places[d];
    if (s.ahead == nullptr && s.ahead_bytes > 0 && used_bytes(d) + s.ahead_bytes <= s.budget_now) {
        if (s.ahead_copies == nullptr) {
            s.ahead_copies.reset(ggml_backend_dev_init(dev, nullptr));
        }
        s.ahead.reset(s.ahead_copies != nullptr ? ggml_backend_buft_alloc_buffer(buft((int) d), s.ahead_bytes)
                                                : nullptr);
        s.ahead_bytes = s.ahead != nullptr ? s.ahead_bytes : 0; // until something moves
        refresh();
    }
    return { s.ahead.get(), s.ahead_copies.get() };
}

void device_tier::send(ggml_tensor * to, const uint8_t * data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(sending);
    if (locked_staging * by_way = staging_for(device_with(to), batches)) {
        by_way->send(to, 0, data, bytes);
    } else {
        ggml_backend_tensor_set(to, data, 0, bytes);
    }
}

size_t device_tier::staging_bytes() const {
    size_t bytes = banks != nullptr && banks->shares() ? host_experts::memory_bytes() : 0;
    bytes += banks != nullptr && cfg.async ? banks->router_bytes() : 0;
    bool any_without = false;
    for (ggml_backend_dev_t dev : cfg.devices) {
        const bool locked = ggml_backend_dev_host_buffer_type(dev) != nullptr;
        bytes += locked ? 2 * locked_staging::memory_bytes() : 0; // more than an upload takes where none can be locked
        any_without = any_without || !locked;
    }
    return bytes + (any_without ? device_upload_staging() : 0);
}

} // namespace superllama
