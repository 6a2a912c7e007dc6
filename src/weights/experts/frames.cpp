#include "weights/experts/frames.h"

#include <cstring>
#include <stdexcept>

namespace superllama {

expert_frames::expert_frames(size_t frame_bytes, size_t n_max, ggml_backend_buffer_type_t locked) :
    frame_bytes(frame_bytes),
    n_max(n_max),
    memory(frame_memory::create(frame_bytes, n_max, locked)) {}

uint8_t * expert_frames::take(uint32_t block) {
    if (free.empty()) {
        if (owners.size() == n_max) {
            throw std::logic_error("more experts than there are");
        }
        const size_t i = owners.size();
        memory->grow(i);
        owners.push_back(block);
        numbers[memory->at(i)] = i;
        return memory->at(i);
    }
    const size_t i = *free.begin();
    free.erase(free.begin());
    owners[i] = block;
    return memory->at(i);
}

void expert_frames::give_back(uint8_t * frame) {
    const size_t i = numbers.at(frame);
    owners[i] = -1;
    free.insert(i);
}

bool expert_frames::shrink(const std::function<bool(uint32_t block)> & may_move,
                           const std::function<void(uint32_t block, uint8_t * to)> & moved) {
    if (owners.empty()) {
        return false;
    }
    const size_t last = owners.size() - 1;
    const int64_t owner = owners[last];
    if (owner < 0) {
        free.erase(last);
    } else {
        if (free.empty() || !may_move((uint32_t) owner)) {
            return false;
        }
        uint8_t * to = take((uint32_t) owner);
        memcpy(to, memory->at(last), frame_bytes);
        moved((uint32_t) owner, to);
    }
    owners.pop_back();
    numbers.erase(memory->at(last));
    memory->shrink(last);
    return true;
}

} // namespace superllama
