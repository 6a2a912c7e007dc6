// The bank of one layer: which of its experts are in which slot on a device, when they were used, and their memory
// there.
#pragma once

#include "devices/placement.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace superllama {

class expert_bank {
  public:
    // Of a map: it is copied to a device by who waits for that by itself; the scheduler does not (patches/0007).
    static constexpr int32_t flag_waits = 1 << 16;

    // `weights`: one matrix of each expert in each of them, on the host. The map of slots is made in `maps`, where it
    // is to be given memory, filled with -1.
    expert_bank(int32_t layer, const std::vector<ggml_tensor *> & weights, ggml_context * maps);

    const int32_t layer;
    const std::vector<ggml_tensor *> weights;

    int32_t n_expert() const { return (int32_t) weights.front()->ne[2]; }
    int32_t n_slots() const { return n; } // 0: there is none
    size_t bytes_of_expert() const;
    size_t bytes() const { return n > 0 ? ggml_backend_buffer_get_size(buffer.get()) : 0; }
    expert_sizes sizes(ggml_backend_buffer_type_t buft, int32_t n_expert_used) const;

    // As expert_banks::resize().
    bool resize(ggml_backend_buffer_type_t buft, int32_t n_slots, uint64_t room,
                const std::vector<ggml_tensor> & whole);

    ggml_tensor * map() const { return slot_map; } // the slot of each expert, -1: it has none
    // The same for a device, where one without a slot has this one.
    const int32_t * map_with(int32_t slot);
    ggml_tensor * tensor(size_t i) const { return tensors[i]; }
    ggml_tensor * host_twin(const ggml_tensor * of_bank) const; // null: it is none of ours

    int32_t slot_of(int32_t expert) const { return slots()[expert]; }
    bool holds(int32_t expert) const; // from any thread

    // A ubatch chose them: those without a slot. `n_there`: how many have one.
    std::set<int32_t> use(const std::vector<int32_t> & chosen, int64_t * n_there);
    // Of the missing, those that the host is to compute, by the speed of the link as a part of the memory's. Those that
    // were chosen before that most recently are sent.
    std::vector<int32_t> not_sent(const std::set<int32_t> & missing, double link_share);
    void note_asked(const std::vector<int32_t> & chosen);
    // Slots for so many, those that were used longest ago; fewer where there are no more. Who has them now: `leaving`.
    std::vector<int32_t> slots_for(size_t n_missing, std::vector<int32_t> * leaving) const;
    std::vector<int32_t> slots_by_age() const;
    int32_t owner_of(int32_t slot) const { return expert_of[(size_t) slot]; } // -1: nobody
    void own(int32_t slot, int32_t expert);
    void own_guessed(int32_t slot, int32_t expert); // the first to leave, unless it is used

    // As expert_banks::keep(), of the tensor i.
    void keep(size_t i, const ggml_tensor & from, const std::vector<int32_t> & most_chosen, bool may_leave);
    void copy_to(ggml_backend_t backend, size_t i, int32_t expert, ggml_tensor * to) const;

  private:
    struct held {
        int32_t expert;
        int32_t slot;
        int64_t last_use;
    };

    int32_t * slots() const { return (int32_t *) slot_map->data; }
    size_t place(ggml_backend_buffer_type_t buft, int32_t n_slots) const;
    std::vector<held> held_now() const;
    bool allocate(ggml_backend_buffer_type_t buft, int32_t n_slots);
    void plan_to_keep(const std::vector<int32_t> & most_chosen, bool may_leave);
    void forget_coming();

    std::vector<ggml_tensor *> tensors; // as the weights, as many as there are slots
    ggml_context_ptr ctx;
    ggml_tensor * slot_map;
    std::vector<int32_t> map_sent;
    ggml_backend_buffer_ptr buffer;
    std::atomic<int32_t> n{ 0 };
    mutable std::mutex mutex;       // of which expert is where, for reports
    std::vector<int32_t> expert_of; // by slot, -1: it is free
    std::vector<int64_t> last_use;  // by slot
    std::vector<int64_t> asked;     // by expert: when a ubatch chose it last
    int64_t now = 0;
    double owed = 0; // of the link's share of the missing ones so far, what was not sent
    std::vector<std::pair<int32_t, int32_t>> coming; // experts of a large batch and their slots
    std::set<size_t> came;                           // the tensors of which they are there
};

} // namespace superllama
