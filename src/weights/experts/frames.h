// Memory for experts of one size: frames side by side. An expert that comes takes the frame of one that went; they fill
// up from the front, and memory goes back to the system from the end.
#pragma once

#include "weights/experts/frame_memory.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

namespace superllama {

class expert_frames {
  public:
    // `locked`: a buffer type for host memory that a device reads well; null: none does.
    expert_frames(size_t frame_bytes, size_t n_max, ggml_backend_buffer_type_t locked = nullptr);

    bool has_free() const { return !free.empty(); } // one that has memory
    uint8_t * take(uint32_t block);                 // a free one, or one more
    void give_back(uint8_t * frame);

    size_t memory_bytes() const { return owners.size() * frame_bytes; } // of frames, free ones among them

    // Gives back the memory of the last frame; what is in it moves to a free one, if it may. False: it may not.
    bool shrink(const std::function<bool(uint32_t block)> & may_move,
                const std::function<void(uint32_t block, uint8_t * to)> & moved);

  private:
    size_t frame_bytes;
    size_t n_max;
    std::unique_ptr<frame_memory> memory;
    std::unordered_map<const uint8_t *, size_t> numbers; // of frames that have memory
    std::vector<int64_t> owners;                         // by frame; -1: free
    std::set<size_t> free;
};

} // namespace superllama
