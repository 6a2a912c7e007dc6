// A batch of the server's slots when one of them ends while it is put together or computed. Templates, for slots and
// batches are types of the patched source file; it needs nothing else of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace superllama {

// Takes the entries of slots that `gone` names out of the part of the batch that is not decoded yet; the others'
// places in it move up.
template <class Slots, class Batch, class Gone>
void remove_from_batch(Slots & slots, Batch & batch, int32_t off, const Gone & gone) {
    const auto moved = [&](int32_t i) {
        return i - (int32_t) std::count_if(batch.tokens.begin() + off, batch.tokens.begin() + std::max(off, i),
                                           [&](const auto & token) { return gone(token.id_slot); });
    };
    for (auto & slot : slots) {
        if (slot.i_batch >= off && slot.i_batch < batch.size()) {
            slot.i_batch = moved(slot.i_batch);
        }
        for (auto & i : slot.spec_i_batch) {
            i = i >= off && i < batch.size() ? moved(i) : i;
        }
    }
    batch.tokens.erase(std::remove_if(batch.tokens.begin() + off, batch.tokens.end(),
                                      [&](const auto & token) { return gone(token.id_slot); }),
                       batch.tokens.end());
}

// Before a batch is computed: slots that ended after they had entered it, by an error or to make room, leave it, and
// forget what they would have had of it. It takes its adapters, and whether it is for embeddings, from the first slot
// that is left.
template <class Slots, class Batch>
void leave_ended(Slots & slots, Batch & batch) {
    const auto slot_of = [&](int id) -> typename Slots::value_type & {
        return *std::find_if(slots.begin(), slots.end(), [&](const auto & slot) { return slot.id == id; });
    };
    for (auto & slot : slots) {
        const auto is_its = [&](const auto & token) { return token.id_slot == slot.id; };
        if (!slot.is_processing() && std::any_of(batch.tokens.begin(), batch.tokens.end(), is_its)) {
            slot.prompt_clear();
        }
    }
    remove_from_batch(slots, batch, 0, [&](int id) { return !slot_of(id).is_processing(); });
    if (batch.slot_batched == nullptr || !batch.slot_batched->is_processing()) {
        batch.slot_batched = batch.size() > 0 ? &slot_of(batch.tokens[0].id_slot) : nullptr;
        batch.alora_scale = -1.0f; // what was switched off in this batch is of the one that ended
    }
}

} // namespace superllama
