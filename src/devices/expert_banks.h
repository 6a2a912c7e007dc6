// Experts on devices: of each layer whose other weights are there, a bank with slots for some of its experts, those
// that were used least recently the first to leave (expert_bank.h).
//
// The layer's products are computed on the device with every expert that a ubatch chose, as if all of them were there:
// what is missing comes before, so that results do not depend on what a bank holds. Upstream's graphs of a cache of
// experts (llama-moe-cache.h) do that: they look an expert's slot up in a map, and multiply with the bank. Where
// results may depend on it, the host computes some of the missing ones meanwhile (host_experts.h).
#pragma once

#include "devices/expert_bank.h"
#include "devices/guessed_sends.h"
#include "devices/host_experts.h"
#include "devices/placement.h"
#include "devices/router_guess.h"
#include "weights/experts/request.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace superllama {

class expert_banks {
  public:
    struct layer_weights {
        int32_t layer;
        std::vector<ggml_tensor *> weights;   // one matrix of each expert in each of them; on the host
        const ggml_tensor * router = nullptr; // on the device with its layer; null: the choice is not guessed
    };

    struct device {
        ggml_backend_dev_t dev;
        bool shares;       // the host computes some of the missing experts
        double link_share; // the speed of the way there, of that of the host's memory; not infinite where it shares
        bool sends_ahead;  // experts that are guessed go there beside its products; not where it shares, for then
                           // results depend on what is there
    };

    expert_banks(const std::vector<layer_weights> & layers, int32_t n_expert_used, const std::vector<device> & devices);
    ~expert_banks();

    bool is_of_bank(const ggml_tensor * weights) const { return bank_tensors.count(weights) > 0; }
    const std::vector<ggml_tensor *> & weights(int32_t il) const;

    // What such a layer takes on devices of this type; nothing: it is none.
    expert_sizes sizes(int32_t il, ggml_backend_buffer_type_t buft) const;

    // While no graph runs, on the device where the layer is. Of its former bank, those used last stay, where both have
    // room for a moment: `room` bytes are free. Without a bank, `whole` may be tensors on the same device that hold all
    // of its experts; they stay, and without room beside them there is no bank. False: it has none, for lack of memory.
    bool resize(int32_t il, ggml_backend_buffer_type_t buft, int32_t n_slots, uint64_t room,
                const std::vector<ggml_tensor> & whole = {});
    int32_t n_slots(int32_t il) const; // 0: it has none
    size_t bytes(int32_t il) const;    // of its bank
    bool any() const;

    // For graphs: the map of a layer's slots, where its bank has room for what so many tokens choose at most, else
    // null; and the bank that has the experts of this tensor.
    ggml_tensor * slot_map(int32_t il, int64_t n_tokens, int64_t n_chosen) const;
    ggml_tensor * bank_of(const ggml_tensor * weights) const;

    struct host_side {
        ggml_backend_t backend;
        std::function<const ggml_tensor *(const ggml_tensor *)> original_of; // of what may be a copy from a device
        std::function<bool(const expert_request & r, std::string * error)> serve;
        guessed_sends::serve_guess serve_guess;
    };
    enum class result { not_ours, copied, failed };

    // Before a part of a graph begins on a device: where `src` is a map of slots, what is missing is brought, or
    // computed on the host, and the map is copied to `dst`. Failed: the reason is in `error`.
    result copy(ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * dst, ggml_cgraph * part,
                const host_side & host, std::string * error);

    // After a failure, whatever is in the bank. False: it is no map of slots.
    static bool copy_nothing(ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * dst);

    // After this node of the part, before the next one: what the host computed takes its place there.
    bool stops_after(const ggml_tensor * node) const { return node == by_host.node(); }
    void after_node(const ggml_tensor * node);
    void end_graph();
    size_t router_bytes() const { return routers.bytes(); } // of host memory, for guesses
    bool shares() const;                                    // whether the host computes any, as far as graphs were seen

    bool holds(const ggml_tensor * weights, int32_t expert) const; // from any thread
    // To a tensor of all experts of the layer, for a large batch; of one that is there.
    void copy_to(ggml_backend_t backend, const ggml_tensor * weights, int32_t expert, ggml_tensor * to) const;
    // From there, for the tokens that follow: some of those that the batch chose, by how often, if they are on the same
    // device. Asked for each tensor of the layer; without `may_leave` only those leave for them that no ubatch ever
    // chose, and of the batch's own none does.
    void keep(const ggml_tensor * weights, const ggml_tensor * from, const std::vector<int32_t> & most_chosen,
              bool may_leave);

    struct counters {
        int64_t hits;         // experts that ubatches chose and that were there
        int64_t misses;       // and those that were not
        int64_t stayed;       // of these, those that the host computed
        int64_t guesses;      // sent before they were chosen
        int64_t guesses_used; // and they were: hits
    };
    counters count() const { return { n_hits, n_misses, n_stayed, n_guesses, n_guesses_used }; }

    struct traffic {      // in bytes
        int64_t up = 0;   // experts that were missing, or guessed
        int64_t down = 0; // those that left for them
    };
    traffic traffic_of(ggml_backend_dev_t dev) const; // from any thread

  private:
    struct device_state {
        device is;
        traffic bytes;
        std::unique_ptr<guessed_sends> guesses; // null: what is guessed is not sent
    };

    bool has(int32_t il) const { return il >= 0 && (size_t) il < banks.size() && banks[(size_t) il] != nullptr; }
    expert_bank * next_of(const expert_bank & b) const;
    std::vector<int32_t> lacking(const expert_bank & next);
    void wait_for_choice(ggml_backend_t backend, expert_bank & b, const host_side & host, device_state & d);
    void add_bytes(int64_t & of, size_t bytes);
    void leave_to_host(expert_bank & b, double link, std::set<int32_t> * missing, expert_request * r);

    int32_t n_expert_used;
    ggml_context_ptr ctx_maps;
    ggml_backend_buffer_ptr maps_buffer;
    std::vector<std::unique_ptr<expert_bank>> banks; // by layer
    router_guess routers;
    std::unordered_map<const ggml_tensor *, std::pair<int32_t, size_t>> bank_tensors;
    std::unordered_map<const ggml_tensor *, int32_t> layer_of_map;
    mutable std::mutex mutex; // of traffic, for reports
    std::atomic<int64_t> n_hits{ 0 };
    std::atomic<int64_t> n_misses{ 0 };
    std::atomic<int64_t> n_stayed{ 0 };
    std::atomic<int64_t> n_guesses{ 0 };
    std::atomic<int64_t> n_guesses_used{ 0 };
    std::map<ggml_backend_dev_t, device_state> devices;
    std::atomic<bool> host_can{ true }; // do what graphs do with a bank; never again, once one says no
    host_experts by_host;               // of the layer that is being computed
    ggml_backend_t by_host_to = nullptr;
};

} // namespace superllama
