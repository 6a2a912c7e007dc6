// The device tier of a model with dynamic layers: which layers are on which device, and their way there and back.
//
// Layers are counted as -ngl counts them: the output matrix is the last layer and goes to a device first, then the
// layers from the last downwards. The layers on devices are those of a static -ngl with the same number, cut among
// the devices in their order. What is on a device is not held in host memory too.
//
// Where a mixture of experts does not fit as a whole, layers go without their experts, and banks have the room that is
// left for some of these (expert_banks.h).
#pragma once

#include "devices/expert_banks.h"
#include "devices/locked_staging.h"
#include "devices/placement.h"
#include "weights/sent_ahead.h"
#include "weights/store.h"
#include "superllama.h"
#include "superllama-params.h"

#include "ggml-cpp.h"

#include <atomic>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace superllama {

class layer_kv;

class device_tier {
  public:
    struct config {
        std::vector<ggml_backend_dev_t> devices;
        std::vector<uint64_t> budgets;  // of each, 0 = automatic
        std::vector<int32_t> n_layers;  // upper bound of each
        std::vector<double> link_share; // of each: the speed of the way there, of that of the host's memory
        std::vector<double> crossing_s; // of each: what a token takes on its way there and back, 0 = next to nothing
        int32_t n_layers_max;           // of all, as -ngl
        int32_t n_layers_all;           // that the model has, the output matrix counted
        float mem_pressure;
        float mem_pressure_low;
        bool async; // read the file in a thread while uploading, and upload while the model runs on

        std::vector<expert_banks::layer_weights> experts; // of layers that have any
        int32_t n_expert_used;
        bool share_misses; // the host computes some of the experts that a device lacks

        ggml_tensor ** output; // the model's, which may be its token embedding as well
        const ggml_tensor * tok_embd;

        // Whether the user pinned a tensor to the host: it stays when its layer goes.
        std::function<bool(const ggml_tensor *)> pinned;
        // A layer's host memory is about to be needed again, or no longer is. False with the reason in `error` where
        // the host has no room for it, which is not asked with `force`.
        std::function<bool(int32_t layer, bool on_device, bool force, std::string * error)> layer_moves;
        // Where a tensor is in host memory, as it is in the file, in equal shares; none: not all of it is. It stays
        // there until its layer moved or not.
        std::function<std::vector<const uint8_t *>(const ggml_tensor *)> keep;
    };

    device_tier(weight_store & store, const config & cfg);
    ~device_tier();

    // While the result lives, no layer moves. Contexts hold it from building a graph to its end.
    std::unique_lock<std::recursive_mutex> hold() const { return std::unique_lock<std::recursive_mutex>(mutex); }

    size_t n_devices() const { return cfg.devices.size(); }
    ggml_backend_dev_t device_of(int il) const; // null: the host. From any thread.
    int n_device_layers() const { return n_on_devices; }
    int64_t generation() const { return n_generation; } // changes with the placement

    // For the next apply_asked(), by whoever comes first: the caller, or a context between two ubatches. Any thread.
    void ask(const std::vector<uint64_t> & budgets);

    // All of these hold the tier. They move what has to move; false where something could not, the reason is in
    // `error` and it stays where it was.
    // `beside`: what only comes may do so while the model runs on, and is there at a later sample().
    bool place(std::string * error, bool beside = false);
    bool apply_asked(std::string * error); // budgets that were asked for, if any
    bool sample(std::string * error);      // follows the devices' memory, at most every 100 ms, far ones less often
    bool allocation_failed(size_t dev, std::string * error); // one layer less on it; false also if there was none
    bool device_lost(size_t dev, std::string * error);       // its layers are on the host from now on

    expert_banks * experts() const { return banks.get(); } // null: no device holds some of a layer's
    // Whether this device can: one of this machine, to which a miss is no journey. It knows host memory that it reads
    // well. Others do where the environment says what is to be done with a miss.
    static bool holds_experts(ggml_backend_dev_t dev);

    // From any thread: weights of the host to where a device computes a large batch with them.
    void send(ggml_tensor * to, const uint8_t * data, size_t bytes);
    // What the device of `to` has for such weights that are sent before the graph comes to them. While the tier is
    // held.
    sent_ahead::device ahead(const ggml_tensor * to);
    size_t staging_bytes() const; // of host memory, for what is on its way to devices

    size_t budget_of(size_t dev) const { return places[dev].budget_now; }
    bool has_room() const;               // for the compute buffers, where no layers were on the devices
    size_t used_bytes(size_t dev) const; // weights, KV, compute buffers

    // For a plan, in which nothing has memory: where layers would be, of which each has so much KV, on devices with
    // these budgets, compute buffers and ways there; and as if they were there, for the accounts of the host.
    layer_placement target(const std::vector<uint64_t> & budgets, const std::vector<size_t> & kv,
                           const std::vector<size_t> & compute, const std::vector<double> & crossing_s) const;
    void place_on_paper(const std::vector<int> & to);
    std::vector<const ggml_tensor *> weights_of(int il) const; // what a device gets
    static uint64_t automatic_budget(uint64_t used, uint64_t free, float mem_pressure);

    struct layer_info {
        ggml_backend_dev_t device;
        size_t bytes;
        int64_t n_loads;
        int64_t n_evictions;
    };
    int n_layers() const { return cfg.n_layers_all; }
    layer_info info(int il) const; // from any thread

    struct counters {
        int64_t n_loads;
        int64_t n_evictions;
        int64_t own_bytes;
        int64_t budget_bytes;
        double pressure; // of the fullest device, 0..1
        double move_ms;
    };
    void refresh();                                              // what count() says, after a change
    counters count() const;                                      // from any thread
    std::vector<struct superllama_device> count_devices() const; // the same of each
    size_t kv_host_bytes() const { return n_kv_host; }           // KV of layers that are on the host

    // Of all contexts on the model.
    std::vector<layer_kv *> contexts;
    void forget(layer_kv * kv);

  private:
    struct weight {
        ggml_tensor * tensor;
        weight_source source;
        ggml_tensor host; // as it is on the host
    };

    using stagings = std::map<ggml_backend_dev_t, std::unique_ptr<locked_staging>>; // null: a device has none
    static locked_staging * staging_for(ggml_backend_dev_t dev, stagings & of);

    static constexpr int64_t retry_us = 10000000; // where a device, or the host, had no memory

    // What moves together: a layer, or its experts, which are the same number of layers after it.
    struct part {
        std::vector<weight> weights;
        size_t bytes = 0; // in the buffer of a device
        ggml_backend_buffer_ptr buffer;
        std::atomic<int> device{ -1 };
        std::atomic<int64_t> n_loads{ 0 };
        std::atomic<int64_t> n_evictions{ 0 };
    };

    struct place_state {
        uint64_t budget_max = 0; // as asked for; automatic: all there is
        std::atomic<uint64_t> budget_now{ 0 };
        std::atomic<size_t> own{ 0 }; // used_bytes(), as of refresh()
        std::atomic<uint64_t> bytes_up{ 0 };
        std::atomic<uint64_t> bytes_down{ 0 };
        uint64_t most = 0;             // bytes there, while something moves
        ggml_backend_buffer_ptr ahead; // memory for what is sent ahead
        ggml_backend_ptr ahead_copies;
        size_t ahead_bytes = 0;  // that it is to have, 0: there is to be none
        int64_t t_ahead_us = 0;  // a layer could not leave for it: not before this time
        int64_t t_grow_us = 0;   // an allocation failed: not before this time
        int64_t t_shrink_us = 0; // the host had no room: not before this time
        bool lost = false;       // its layers go to the host, whatever the host's budget
        bool said_sending = false;
    };

    // Parts on their way to devices, into buffers that they have there; until they land, those on the host are used.
    struct arrival {
        std::vector<int> parts;
        std::vector<int> to;              // the device of each
        std::vector<ggml_tensor> tensors; // their weights, as they will be
        std::string error;
        std::future<bool> uploaded;
    };

    void finish_graphs(); // of all contexts
    void set_budget(size_t dev, uint64_t bytes, size_t free, size_t total);
    layer_placement target() const;
    int layer_of(int p) const { return p % cfg.n_layers_all; } // of a part
    bool is_experts(int p) const { return p >= cfg.n_layers_all; }
    size_t kv_bytes(int p) const; // of all contexts, on a device
    size_t part_bytes(int p) const { return parts[(size_t) p].bytes + kv_bytes(p); }
    size_t placed_bytes(size_t dev) const; // weights and KV there
    size_t compute_need(size_t dev) const; // of all contexts, and what is spare for their KV to grow
    int place_of(int p, const layer_placement & to) const;
    bool is_all_there(const layer_placement & to) const;
    size_t ahead_bytes(size_t dev, uint64_t room) const;
    void keep_ahead_memory(const layer_placement & to);
    void note_sending(const layer_placement & to);
    bool move(std::string * error, bool beside);
    bool leave(int p, const layer_placement & to, std::string * error);
    uint64_t room_on(size_t dev) const;
    bool resize_bank(int il, int32_t n_slots);
    bool resize_banks(const layer_placement & to, bool grow);
    bool evict(int p, std::string * error);
    bool load(const std::vector<int> & coming, const layer_placement & to, bool beside, std::string * error);
    bool land(std::string * error);
    void no_memory(int p, size_t dev);
    bool make_buffer(part & l, size_t dev);
    void upload(bool beside);
    bool move_kv(int p, size_t dev, bool up); // to the device, or from there to the host
    void on_host(part & l);
    ggml_backend_buffer_type_t buft(int dev) const;

    weight_store & store;
    const config cfg;
    ggml_context_ptr twin_ctx; // of an output matrix that is the token embedding as well: its device copy
    ggml_tensor * twin = nullptr;
    ggml_tensor * tied = nullptr;

    mutable std::recursive_mutex mutex;
    std::mutex asked_mutex;
    std::vector<uint64_t> asked;
    std::unique_ptr<expert_banks> banks;
    std::vector<part> parts;              // layers; and the experts of each, where there are banks
    std::vector<expert_sizes> experts_of; // of each layer, on the device that takes the most for them
    std::vector<place_state> places;
    size_t largest_weights = 0; // of one tensor of a layer, on a device
    bool any_pinned = false;    // of a layer
    bool ahead_denied = false;  // by the last move(), see place_state
    std::atomic<int> n_on_devices{ 0 };
    std::atomic<int64_t> n_generation{ 0 };
    std::atomic<size_t> n_kv_host{ 0 };
    std::atomic<double> fullest{ 0 };
    std::atomic<int64_t> move_us{ 0 };
    std::vector<bool> sends; // of each device: experts that it lacks, as of the last place()
    int64_t t_sample_us = 0;
    int64_t sample_us; // between two samples
    stagings moves;
    stagings batches;                  // of send()
    std::mutex sending;                // by those
    std::unique_ptr<arrival> arriving; // null: nothing is on its way. Last: its thread uses what is above
};

} // namespace superllama
