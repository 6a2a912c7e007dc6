#include "devices/placement.h"

#include <algorithm>

namespace superllama {

// Whether a way is much longer than the shortest one: not by what measurements differ.
static bool is_far(double crossing_s, double shortest_s) {
    return crossing_s > 2 * shortest_s + 2e-3;
}

// From the output downwards, and from the last device to the first.
static std::vector<int> fill(const placement_sizes & sizes) {
    std::vector<int> to(sizes.layers.size(), -1);
    std::vector<uint64_t> left = sizes.room;
    std::vector<int32_t> n_left = sizes.n_layers;
    int dev = (int) left.size() - 1;
    const int first = std::max(0, (int) to.size() - sizes.n_layers_max);
    for (int il = (int) to.size() - 1; il >= first; --il) {
        const size_t bytes = sizes.layers[(size_t) il];
        while (dev >= 0 && (bytes > left[(size_t) dev] || left[(size_t) dev] == 0 || n_left[(size_t) dev] == 0)) {
            dev--;
        }
        if (dev < 0) {
            break;
        }
        left[(size_t) dev] -= bytes;
        n_left[(size_t) dev]--;
        to[(size_t) il] = dev;
    }
    return to;
}

static std::vector<size_t> far_devices(const std::vector<double> & crossing_s) {
    std::vector<size_t> far;
    for (size_t d = 0; d < crossing_s.size(); ++d) {
        if (is_far(crossing_s[d], *std::min_element(crossing_s.begin(), crossing_s.end()))) {
            far.push_back(d);
        }
    }
    std::stable_sort(far.begin(), far.end(), [&](size_t a, size_t b) { return crossing_s[a] > crossing_s[b]; });
    return far;
}

std::vector<int> place_layers(const placement_sizes & sizes) {
    std::vector<int> to = fill(sizes);
    const auto n_at = [](const std::vector<int> & places, int dev) {
        return (int32_t) std::count(places.begin(), places.end(), dev);
    };
    placement_sizes bounded = sizes;
    for (size_t d : far_devices(sizes.crossing_s)) {
        const int32_t n_there = n_at(to, (int) d);
        for (int32_t n = 0; n < n_there; ++n) {
            bounded.n_layers[d] = n;
            const std::vector<int> fewer = fill(bounded);
            if (n_at(fewer, -1) <= n_at(to, -1)) {
                to = fewer;
                break;
            }
            bounded.n_layers[d] = sizes.n_layers[d];
        }
    }
    return to;
}

} // namespace superllama
