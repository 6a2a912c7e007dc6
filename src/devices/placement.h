// Which layer is to be on which device, by sizes alone: nothing moves here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace superllama {

struct placement_sizes {
    std::vector<size_t> layers;     // bytes of each with its KV, the output matrix last
    int32_t n_layers_max;           // on all devices together
    std::vector<uint64_t> room;     // bytes on each device
    std::vector<int32_t> n_layers;  // upper bound of each device
    std::vector<double> crossing_s; // of each: what a token takes on its way there and back, 0 = next to nothing
};

// The device of each layer, -1: the host. As many layers as have room, and of these as few as can be on devices that
// are far, the farthest first.
std::vector<int> place_layers(const placement_sizes & sizes);

} // namespace superllama
