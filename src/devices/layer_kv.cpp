#include "devices/layer_kv.h"

#include "devices/tier.h"
#include "llama-model.h"

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"

#include <algorithm>
#include <map>
#include <string>

namespace superllama {

// --------------------------------------------------------------------------------- a buffer type for each layer
// Caches put what has the same buffer type into one buffer: these are all the CPU's, but not the same.

struct layer_kv::layer_buffer_types {
    struct entry {
        std::string name;
        ggml_backend_buffer_type buft;
    };
    std::map<int, entry> entries;

    static const char * get_name(ggml_backend_buffer_type_t buft) {
        return ((const entry *) buft->context)->name.c_str();
    }

    static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t, size_t size) {
        return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    }

    static size_t get_alignment(ggml_backend_buffer_type_t) {
        return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
    }

    ggml_backend_buffer_type_t get(int il) {
        entry & e = entries[il];
        if (e.name.empty()) {
            e.name = "KV of layer " + std::to_string(il);
            e.buft = *ggml_backend_cpu_buffer_type();
            e.buft.iface.get_name = get_name;
            e.buft.iface.alloc_buffer = alloc_buffer;
            e.buft.iface.get_alignment = get_alignment;
            e.buft.context = &e;
        }
        return &e.buft;
    }
};

static layer_kv *& current_kv() {
    static thread_local layer_kv * kv = nullptr;
    return kv;
}

struct layer_kv_sizes::impl {
    layer_kv::layer_buffer_types types;
    std::map<int, size_t> bytes;
};

static layer_kv_sizes *& current_sizes() {
    static thread_local layer_kv_sizes * sizes = nullptr;
    return sizes;
}

layer_kv_sizes::layer_kv_sizes() : pimpl(std::make_unique<impl>()) {
    current_sizes() = this;
}

layer_kv_sizes::~layer_kv_sizes() {
    current_sizes() = nullptr;
}

std::vector<size_t> layer_kv_sizes::bytes(size_t n_layers) const {
    std::vector<size_t> result(n_layers);
    for (const auto & [il, n] : pimpl->bytes) {
        if (il >= 0 && (size_t) il < n_layers) {
            result[(size_t) il] = n;
        }
    }
    return result;
}

layer_kv::layer_kv(device_tier & tier, std::function<void()> finish) :
    compute_need(tier.n_devices()),
    compute_now(tier.n_devices()),
    tier(tier),
    finish(std::move(finish)),
    types(std::make_unique<layer_buffer_types>()) {
    const auto placement = tier.hold();
    tier.contexts.push_back(this);
    current_kv() = this;
}

layer_kv::~layer_kv() {
    const auto placement = tier.hold();
    ready();
    tier.forget(this);
}

void layer_kv::ready() {
    empty = false;
    if (current_kv() == this) {
        current_kv() = nullptr;
    }
}

ggml_backend_buffer_type_t layer_kv::buffer_type(int il, ggml_backend_buffer_type_t otherwise) {
    if (current_sizes() != nullptr) {
        return current_sizes()->pimpl->types.get(il);
    }
    return current_kv() != nullptr ? current_kv()->types->get(il) : otherwise;
}

// the tensors of caches are named like "cache_k_l12"
static int layer_of_cache(ggml_context * ctx) {
    const std::string name = ggml_get_first_tensor(ctx)->name;
    return std::stoi(name.substr(name.rfind("_l") + 2));
}

void layer_kv::add(buffers & allocated) {
    if (layer_kv_sizes * sizes = current_sizes()) {
        for (auto & [ctx, buffer] : allocated) { // a dry run's have no bytes yet
            const size_t there = ggml_backend_buffer_get_size(buffer.get());
            ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buffer.get());
            sizes->pimpl->bytes[layer_of_cache(ctx.get())] +=
                there > 0 ? there : ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
        }
        return;
    }
    layer_kv * self = current_kv();
    if (self == nullptr) {
        return;
    }
    const auto placement = self->tier.hold();
    for (auto & [ctx, buffer] : allocated) {
        self->parts.push_back({ layer_of_cache(ctx.get()), ctx.get(), &buffer });
    }
    self->tier.refresh();
}

std::unique_lock<std::recursive_mutex> layer_kv::hold(const llama_model & model) {
    device_tier * tier = model.superllama ? model.superllama->tier() : nullptr;
    return tier != nullptr ? tier->hold() : std::unique_lock<std::recursive_mutex>();
}

void layer_kv::add(std::unique_ptr<cache> other) {
    const auto placement = tier.hold();
    others.push_back(std::move(other));
    tier.refresh();
}

size_t layer_kv::host_bytes(int il) const {
    size_t sum = 0;
    for (const part & p : parts) {
        sum += p.il == il ? ggml_backend_buffer_get_size(p.buffer->get()) : 0;
    }
    return sum;
}

size_t layer_kv::device_bytes(int il) const {
    size_t sum = host_bytes(il); // a buffer is as large there
    for (const auto & other : others) {
        sum += other->device_bytes(il);
    }
    return sum;
}

size_t layer_kv::spare_bytes() const {
    size_t sum = 0;
    for (const auto & other : others) {
        sum += other->spare_bytes();
    }
    return sum;
}

bool layer_kv::is_at(int il, ggml_backend_buffer_type_t buft) const {
    return std::all_of(
               parts.begin(), parts.end(),
               [=](const part & p) { return p.il != il || ggml_backend_buffer_get_type(p.buffer->get()) == buft; }) &&
           std::all_of(others.begin(), others.end(), [=](const auto & other) { return other->is_at(il, buft); });
}

bool layer_kv::move(int il, ggml_backend_buffer_type_t to, uint64_t * copied) {
    const auto moves = [=](const auto & other) { return other->move(il, to, copied); };
    if (!std::all_of(others.begin(), others.end(), moves)) {
        return false;
    }
    for (part & p : parts) {
        if (p.il != il || ggml_backend_buffer_get_type(p.buffer->get()) == to) {
            continue;
        }
        std::vector<ggml_tensor> before;
        for (ggml_tensor * t = ggml_get_first_tensor(p.ctx); t != nullptr; t = ggml_get_next_tensor(p.ctx, t)) {
            before.push_back(*t);
            t->data = nullptr;
            t->buffer = nullptr;
            t->extra = nullptr;
        }
        ggml_backend_buffer_ptr moved(ggml_backend_alloc_ctx_tensors_from_buft(p.ctx, to));
        size_t i = 0;
        if (moved == nullptr) {
            for (ggml_tensor * t = ggml_get_first_tensor(p.ctx); t != nullptr; t = ggml_get_next_tensor(p.ctx, t)) {
                *t = before[i++];
            }
            return false;
        }
        ggml_backend_buffer_clear(moved.get(), 0);
        for (ggml_tensor * t = ggml_get_first_tensor(p.ctx); t != nullptr; t = ggml_get_next_tensor(p.ctx, t)) {
            if (!empty && t->view_src == nullptr) {
                ggml_backend_tensor_copy(&before[i], t);
                *copied += ggml_nbytes(t);
            }
            i++;
        }
        *p.buffer = std::move(moved);
    }
    return true;
}

} // namespace superllama
