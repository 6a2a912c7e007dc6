// Kept prompts of a server that gives its memory back: on disk, until it takes it again.
#pragma once

#include "io/file.h"
#include "server/lifecycle.h"
#include "server/logits.h"
#include "server/slots.h"
#include "superllama.h"

#include <cstdint>
#include <deque>
#include <vector>

namespace superllama {

using state_parts = std::vector<std::vector<uint8_t> *>;

// States of a prompt cache in a file without a name; what was written first is read first.
class aside_file {
  public:
    explicit aside_file(std::string folder);

    bool write(const state_parts & parts); // and frees them; false: there is no room on the disk
    uint64_t all_bytes() const;            // that are still to be read
    uint64_t next_bytes() const;           // of the next state
    bool read(const state_parts & parts);  // the same number of parts, in the same order
    void skip();

  private:
    descriptor file;
    uint64_t n_written = 0;
    uint64_t n_read = 0;
    std::deque<std::vector<uint64_t>> sizes; // of the parts of each state that is still to be read
};

template <class State>
state_parts parts_of(State & state) {
    state_parts parts = { &state.data.main, &state.data.drft };
    for (auto & checkpoint : state.prompt.checkpoints) {
        parts.insert(parts.end(), { &checkpoint.data_tgt, &checkpoint.data_dft, &checkpoint.data_spec });
    }
    return parts;
}

// Before the slots sleep. What finds no room on the disk is forgotten; upstream's own sleep forgets all of it.
template <class Cache>
void put_aside(const server_queue * queue, Cache * cache) {
    serve_with(nullptr); // what is kept is charged to no context that is gone
    lifecycle * life = lifecycle_of(queue);
    if (life == nullptr || !life->asks_for_sleep() || cache == nullptr || cache->states.empty()) {
        return;
    }
    life->aside = life->new_aside_file();
    for (auto state = cache->states.begin(); state != cache->states.end();) {
        const bool written = life->aside != nullptr && life->aside->write(parts_of(*state));
        state = written ? std::next(state) : cache->states.erase(state);
    }
}

// When they wake, with their new context: as many of the states as the budget has room for, the last ones rather than
// the first. Returns whether the cache is to be kept.
template <class Cache>
bool take_back(const server_queue * queue, Cache * cache, llama_context * ctx) {
    lifecycle * life = lifecycle_of(queue);
    const auto aside = life != nullptr ? std::move(life->aside) : nullptr;
    if (aside == nullptr || cache == nullptr) {
        return false;
    }
    serve_with(ctx);
    uint64_t bytes = aside->all_bytes();
    for (auto state = cache->states.begin(); state != cache->states.end();) {
        const uint64_t own = aside->next_bytes();
        if (charge_prompts(bytes) && aside->read(parts_of(*state))) {
            ++state;
        } else {
            log_dropped("a kept prompt", own);
            aside->skip();
            bytes -= own;
            state = cache->states.erase(state);
        }
    }
    charge_prompts(bytes);
    watch(cache->states);
    return true;
}

} // namespace superllama
