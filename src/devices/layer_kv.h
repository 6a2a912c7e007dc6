// KV and state tensors of one context on a model with a device tier: each layer's in a buffer of its own, so that
// they can follow the layer from device to host and back.
#pragma once

#include "ggml-cpp.h"

#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

struct llama_model;

namespace superllama {

class device_tier;

// For a plan: the bytes of each layer's part of the caches that this thread creates while it lives, as layer_kv would
// place them. They are on the host, or have sizes only.
class layer_kv_sizes {
  public:
    layer_kv_sizes();
    ~layer_kv_sizes();
    std::vector<size_t> bytes(size_t n_layers) const;

  private:
    friend class layer_kv;
    struct impl;
    std::unique_ptr<impl> pimpl;
};

class layer_kv {
  public:
    using buffers = std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>>;

    // Until ready(), the caches that this thread creates belong to this context. They begin on the host, empty.
    // `finish` waits for what the context has given devices to compute.
    layer_kv(device_tier & tier, std::function<void()> finish);
    ~layer_kv();
    void ready();

    // A cache that moves its layers itself, for not all of them have a buffer.
    class cache {
      public:
        virtual ~cache() = default;
        virtual size_t device_bytes(int il) const = 0;
        virtual size_t spare_bytes() const = 0;
        virtual bool is_at(int il, ggml_backend_buffer_type_t buft) const = 0;
        virtual bool move(int il, ggml_backend_buffer_type_t to, uint64_t * copied) = 0;
    };
    void add(std::unique_ptr<cache> other);

    // Called by the constructors of caches: the buffer type of a layer, and what was allocated in the end.
    static ggml_backend_buffer_type_t buffer_type(int il, ggml_backend_buffer_type_t otherwise);
    static void add(buffers & allocated);

    // While the result lives, nothing moves.
    static std::unique_lock<std::recursive_mutex> hold(const llama_model & model);

    void finish_graphs() const { // one that is being made has computed nothing
        if (!empty) {
            finish();
        }
    }
    size_t host_bytes(int il) const;   // as long as it is there; a cache that moves its layers itself counts its own
    size_t device_bytes(int il) const; // that it has or would have
    size_t spare_bytes() const;        // of a device, while a cache there grows
    bool is_at(int il, ggml_backend_buffer_type_t buft) const; // all of it
    // False: no memory there; what did not move stays valid. `copied`: bytes of what did are added.
    bool move(int il, ggml_backend_buffer_type_t to, uint64_t * copied);

    // Of the compute buffers on each device: the most that was ever needed, and what is there.
    std::vector<size_t> compute_need;
    std::vector<size_t> compute_now;
    bool offloads = false; // large batches are computed there with weights of the host

    struct layer_buffer_types;

  private:
    struct part {
        int il;
        ggml_context * ctx;
        ggml_backend_buffer_ptr * buffer;
    };

    device_tier & tier;
    std::function<void()> finish;
    std::unique_ptr<layer_buffer_types> types;
    std::vector<part> parts;
    std::vector<std::unique_ptr<cache>> others;
    bool empty = true; // no cell was ever written: moving needs no copy
};

} // namespace superllama
