// Which layer is to be on which device, and how many of its experts, by sizes alone: nothing moves here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace superllama {

// Of one layer's experts, where a device may hold some of them.
struct expert_sizes {
    size_t all = 0;       // bytes of all of them
    size_t slot = 0;      // of one more in a bank
    size_t bank = 0;      // of a bank besides its slots
    int32_t n_min = 0;    // those of one token: fewer slots are of no use
    int32_t n_expert = 0; // 0: the layer has none that could be apart from it
};

struct placement_sizes {
    std::vector<size_t> layers;        // bytes of each with its KV, without such experts, the output matrix last
    std::vector<expert_sizes> experts; // of each layer
    int32_t n_layers_max;              // on all devices together
    std::vector<uint64_t> room;        // bytes on each device
    std::vector<int32_t> n_layers;     // upper bound of each device
    std::vector<double> crossing_s;    // of each: what a token takes on its way there and back, 0 = next to nothing
    std::vector<bool> has_banks;       // of each: whether it can hold a layer without its experts, and some of these
    std::vector<double> link_share;    // of those: the speed of the way there, of that of the host's memory
    std::vector<bool> sends;           // of those, so far: as in layer_placement
};

struct layer_placement {
    std::vector<int> device;      // of each layer, -1: the host
    std::vector<bool> whole;      // with its experts
    std::vector<int32_t> n_slots; // else, of a bank for some of them there
    std::vector<bool> sends;      // of each device: whether experts come there when they are chosen
};

// As many layers as have room, and of these as few as can be on devices that are far, the farthest first. Where not all
// layers have room with their experts, they go without them, and experts have the room that is left: as many of each
// layer, for each layer asks for as many, and those that are missing are sent; or all of as many layers, and the host
// computes the others. What takes less time: of experts that are chosen a bank serves more than its share, so that with
// slots for a quarter three tenths are missing, instead of three quarters; but they go over the link.
layer_placement place_layers(const placement_sizes & sizes);

} // namespace superllama
