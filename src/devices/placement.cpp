#include "devices/placement.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace superllama {

// Bytes of a layer there: with its experts, or without them where they may stay apart.
static size_t bytes_on(const placement_sizes & sizes, size_t il, int dev, bool apart) {
    return sizes.layers[il] + (apart && sizes.has_banks[(size_t) dev] ? 0 : sizes.experts[il].all);
}

// Whether a way is much longer than the shortest one: not by what measurements differ.
static bool is_far(double crossing_s, double shortest_s) {
    return crossing_s > 2 * shortest_s + 2e-3;
}

// From the output downwards, and from the last device to the first.
static std::vector<int> fill(const placement_sizes & sizes, bool apart) {
    std::vector<int> to(sizes.layers.size(), -1);
    std::vector<uint64_t> left = sizes.room;
    std::vector<int32_t> n_left = sizes.n_layers;
    int dev = (int) left.size() - 1;
    const int first = std::max(0, (int) to.size() - sizes.n_layers_max);
    for (int il = (int) to.size() - 1; il >= first; --il) {
        const auto fits = [&] {
            const size_t bytes = bytes_on(sizes, (size_t) il, dev, apart);
            return bytes <= left[(size_t) dev] && left[(size_t) dev] > 0 && n_left[(size_t) dev] > 0;
        };
        while (dev >= 0 && !fits()) {
            dev--;
        }
        if (dev < 0) {
            break;
        }
        left[(size_t) dev] -= bytes_on(sizes, (size_t) il, dev, apart);
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

static std::vector<int> devices_of_layers(const placement_sizes & sizes, bool apart) {
    std::vector<int> to = fill(sizes, apart);
    const auto n_at = [](const std::vector<int> & places, int dev) {
        return (int32_t) std::count(places.begin(), places.end(), dev);
    };
    placement_sizes bounded = sizes;
    for (size_t d : far_devices(sizes.crossing_s)) {
        const int32_t n_there = n_at(to, (int) d);
        for (int32_t n = 0; n < n_there; ++n) {
            bounded.n_layers[d] = n;
            const std::vector<int> fewer = fill(bounded, apart);
            if (n_at(fewer, -1) <= n_at(to, -1)) {
                to = fewer;
                break;
            }
            bounded.n_layers[d] = sizes.n_layers[d];
        }
    }
    return to;
}

// Of experts that are chosen, those that a bank with room for this share of a layer's lacks; measured, see "Which
// experts a made model asks for" in bench/RESULTS.md.
static double missing_of(double held) {
    static const std::pair<double, double> measured[] = { { 0, 1 },      { 0.125, 0.48 }, { 0.25, 0.30 },
                                                          { 0.5, 0.12 }, { 0.75, 0.03 },  { 1, 0 } };
    for (size_t i = 1; i < std::size(measured); ++i) {
        const auto & [x0, y0] = measured[i - 1];
        const auto & [x1, y1] = measured[i];
        if (held <= x1) {
            return y0 + (y1 - y0) * (held - x0) / (x1 - x0);
        }
    }
    return 0;
}

// Of a device's room, what its layers leave to their experts.
static uint64_t left_for_experts(const placement_sizes & sizes, int dev, const layer_placement & p) {
    uint64_t left = sizes.room[(size_t) dev];
    for (size_t il = 0; il < p.device.size(); ++il) {
        left -= p.device[il] == dev ? std::min<uint64_t>(left, sizes.layers[il]) : 0;
    }
    return left;
}

// What is left of a device to the experts of its layers: as many slots for each; where that is not enough for one
// token, that many for as few layers as have room, from the last downwards.
static void share_slots(const placement_sizes & sizes, int dev, layer_placement * p) {
    uint64_t left = left_for_experts(sizes, dev, *p);
    uint64_t slots = 0, banks = 0; // one slot for each layer, and what their banks take besides
    int32_t n_min = 0, n_max = 0;
    std::vector<size_t> layers; // the last first
    for (size_t il = p->device.size(); il-- > 0;) {
        const expert_sizes & e = sizes.experts[il];
        if (p->device[il] == dev && e.n_expert > 0) {
            layers.push_back(il);
            slots += e.slot;
            banks += e.bank;
            n_min = std::max(n_min, e.n_min);
            n_max = std::max(n_max, e.n_expert);
        }
    }
    const uint64_t n_each = layers.empty() || left < banks ? 0 : (left - banks) / slots;
    const int32_t n = (int32_t) std::min<uint64_t>(n_each, (uint64_t) n_max);
    for (size_t il : layers) {
        const expert_sizes & e = sizes.experts[il];
        const int32_t wanted = std::min(e.n_expert, std::max(n, n_min));
        if (e.bank + e.slot * (uint64_t) wanted <= left) {
            p->n_slots[il] = wanted;
            left -= e.bank + e.slot * (uint64_t) wanted;
        }
    }
    for (size_t il : layers) {
        const expert_sizes & e = sizes.experts[il];
        if (p->n_slots[il] > 0 && p->n_slots[il] < e.n_expert && e.slot <= left) {
            p->n_slots[il]++;
            left -= e.slot;
        }
    }
}

// Or to all experts of as many layers as have room, from the last downwards.
static void share_layers(const placement_sizes & sizes, int dev, layer_placement * p) {
    uint64_t left = left_for_experts(sizes, dev, *p);
    for (size_t il = p->device.size(); il-- > 0;) {
        const expert_sizes & e = sizes.experts[il];
        if (p->device[il] == dev && e.n_expert > 0 && e.all <= left) {
            p->whole[il] = true;
            left -= e.all;
        }
    }
}

// What takes less time: over the link the missing ones of banks, or on the host those of the layers that have none
// there. Where experts are sent already, that has to be worse by a quarter to end: budgets wander.
static void share(const placement_sizes & sizes, size_t dev, layer_placement * p) {
    layer_placement by_layers = *p;
    share_layers(sizes, (int) dev, &by_layers);
    uint64_t experts = 0, absent = 0;
    for (size_t il = 0; il < p->device.size(); ++il) {
        if (p->device[il] == (int) dev) {
            experts += sizes.experts[il].all;
            absent += by_layers.whole[il] ? 0 : sizes.experts[il].all;
        }
    }
    const double all = std::max(1.0, (double) experts);
    const double missing = missing_of((double) left_for_experts(sizes, (int) dev, *p) / all);
    const bool sends = missing * (sizes.sends[dev] ? 0.8 : 1.0) < sizes.link_share[dev] * (double) absent / all;
    if (sends) {
        share_slots(sizes, (int) dev, p);
    } else {
        *p = by_layers;
    }
    p->sends[dev] = sends;
}

layer_placement place_layers(const placement_sizes & sizes) {
    const size_t n = sizes.layers.size();
    layer_placement p = { devices_of_layers(sizes, false), std::vector<bool>(n), std::vector<int32_t>(n), sizes.sends };
    const auto n_placed = (int32_t) (n - (size_t) std::count(p.device.begin(), p.device.end(), -1));
    const auto has_experts = [](const expert_sizes & e) { return e.n_expert > 0; };
    const bool apart = n_placed < std::min((int32_t) n, sizes.n_layers_max) &&
                       std::any_of(sizes.experts.begin(), sizes.experts.end(), has_experts) &&
                       std::count(sizes.has_banks.begin(), sizes.has_banks.end(), true) > 0;
    if (apart) {
        p.device = devices_of_layers(sizes, true);
    }
    for (size_t il = 0; il < n; ++il) {
        const int dev = p.device[il];
        p.whole[il] = dev >= 0 && !(apart && sizes.has_banks[(size_t) dev] && sizes.experts[il].n_expert > 0);
    }
    for (size_t d = 0; apart && d < sizes.room.size(); ++d) {
        if (sizes.has_banks[d]) {
            share(sizes, d, &p);
        }
    }
    return p;
}

} // namespace superllama
