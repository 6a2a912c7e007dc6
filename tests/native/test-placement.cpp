// Where layers and experts go, over random sizes: nothing exceeds its room, all that fits is placed, and a larger
// device never gets fewer.

#include "devices/placement.h"

#include "check.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

using namespace superllama;

static int32_t n_placed(const layer_placement & p) {
    return (int32_t) (p.device.size() - (size_t) std::count(p.device.begin(), p.device.end(), -1));
}

static uint64_t bytes_on(const placement_sizes & sizes, const layer_placement & p, int dev) {
    uint64_t bytes = 0;
    for (size_t il = 0; il < sizes.layers.size(); ++il) {
        const expert_sizes & e = sizes.experts[il];
        if (p.device[il] == dev) {
            bytes += sizes.layers[il] + (p.whole[il] ? e.all : 0);
            bytes += p.n_slots[il] > 0 ? e.bank + e.slot * (uint64_t) p.n_slots[il] : 0;
        }
    }
    return bytes;
}

static placement_sizes mixture(size_t n_layers, int32_t n_expert, size_t expert_bytes, uint64_t room) {
    placement_sizes sizes = {};
    for (size_t il = 0; il < n_layers; ++il) {
        sizes.layers.push_back(1000);
        sizes.experts.push_back({ expert_bytes * (size_t) n_expert, expert_bytes, expert_bytes, 4, n_expert });
    }
    sizes.layers.push_back(5000); // the output
    sizes.experts.emplace_back();
    sizes.n_layers_max = (int32_t) n_layers + 1;
    sizes.room = { room };
    sizes.n_layers = { sizes.n_layers_max };
    sizes.crossing_s = { 0 };
    sizes.has_banks = { true };
    sizes.link_share = { 1e9 }; // sending costs nothing
    sizes.sends = { false };
    return sizes;
}

static void test_mixture() {
    const uint64_t dense = 10 * 1000 + 5000, experts = 10 * 64 * 100;
    for (uint64_t room = 0; room < dense + experts + 5000; room += 97) {
        const placement_sizes sizes = mixture(10, 64, 100, room);
        const layer_placement p = place_layers(sizes);
        CHECK(bytes_on(sizes, p, 0) <= room);
        const int32_t n_whole = (int32_t) std::count(p.whole.begin(), p.whole.end(), true);
        const auto slots = std::minmax_element(p.n_slots.begin(), p.n_slots.end() - 1);
        if (room >= dense + experts) {
            CHECK(n_whole == 11 && *slots.second == 0);
        } else if (room >= dense) {
            CHECK(n_placed(p) == 11 && n_whole == 1); // the output, which has no experts
            const uint64_t banks = room - dense;
            if (banks >= 10 * 5 * 100) { // of four slots and one besides
                CHECK(*slots.second - *slots.first <= 1 && *slots.first >= 4);
                CHECK(bytes_on(sizes, p, 0) + 10 * 100 > room || *slots.first == 64); // no slot for each is left
            } else {
                CHECK(std::all_of(p.n_slots.begin(), p.n_slots.end(), [](int32_t n) { return n == 0 || n >= 4; }));
                CHECK((uint64_t) (10 - std::count(p.n_slots.begin(), p.n_slots.end() - 1, 0)) == banks / 500);
                CHECK(banks < 500 || p.n_slots[9] > 0); // the last layers first
            }
        }
    }
}

// Where nothing is sent while it computes, all experts of the last layers are there, and none of the others.
static void test_staying() {
    const uint64_t dense = 10 * 1000 + 5000;
    for (uint64_t n = 0; n < 10; ++n) {
        placement_sizes sizes = mixture(10, 64, 100, dense + n * 6400 + 6399);
        sizes.link_share = { 0 };
        const layer_placement p = place_layers(sizes);
        CHECK(n_placed(p) == 11 && !p.sends[0] && bytes_on(sizes, p, 0) == dense + n * 6400);
        for (size_t il = 0; il < 10; ++il) {
            CHECK(p.n_slots[il] == 0 && p.whole[il] == (il >= 10 - n));
        }
    }
}

// Sending pays the more, the more experts are there, and does not end with every byte of the budget.
static void test_what_pays() {
    const auto sends = [](double held, double link_share, bool before) {
        placement_sizes sizes = mixture(10, 64, 100, 15000 + (uint64_t) (64000 * held));
        sizes.link_share = { link_share };
        sizes.sends = { before };
        const layer_placement p = place_layers(sizes);
        CHECK((p.n_slots[9] > 0) == p.sends[0]);
        return (bool) p.sends[0];
    };
    for (bool before : { false, true }) {
        CHECK(!sends(0.1, 0.1, before) && !sends(0.9, 0, before) && sends(0.1, 1, before) && sends(0.5, 0.4, before));
        bool last = false;
        for (int n_layers = 0; n_layers < 10; ++n_layers) {     // whose experts would have room
            CHECK(!last || sends(0.1 * n_layers, 0.3, before)); // once it pays, it does with more
            last = sends(0.1 * n_layers, 0.3, before);
        }
        CHECK(last);
    }
    CHECK(!sends(0.3, 0.35, false) && sends(0.3, 0.35, true));
}

// A device of another machine takes layers with their experts or not at all.
static void test_without_banks() {
    placement_sizes sizes = mixture(10, 64, 100, 30000);
    sizes.has_banks = { false };
    const layer_placement p = place_layers(sizes);
    CHECK(n_placed(p) == 1 + (30000 - 5000) / 7400);
    CHECK(std::all_of(p.n_slots.begin(), p.n_slots.end(), [](int32_t n) { return n == 0; }));
    CHECK(p.whole[9] && !p.whole[0]);

    sizes.room = { 30000, 20000 };
    sizes.n_layers = { 11, 11 };
    sizes.crossing_s = { 0, 0 };
    sizes.has_banks = { true, false };
    sizes.link_share = { 1e9, 0 };
    sizes.sends = { false, false };
    const layer_placement both = place_layers(sizes);
    for (size_t il = 0; il < 11; ++il) {
        CHECK(both.device[il] >= 0);
        CHECK(both.device[il] == 0 || (both.whole[il] && both.n_slots[il] == 0));
        CHECK(both.device[il] == 1 || both.n_slots[il] >= 4);
    }
}

static void test_random() {
    std::mt19937 random(11);
    const auto upto = [&random](uint64_t n) { return random() % n; };
    for (int round = 0; round < 3000; ++round) {
        placement_sizes sizes = {};
        const size_t n = 2 + upto(20), n_devices = 1 + upto(3);
        for (size_t il = 0; il < n; ++il) {
            sizes.layers.push_back(upto(1000));
            expert_sizes e;
            if (upto(3) > 0) {
                e = { 0, 1 + upto(50), upto(80), (int32_t) (1 + upto(4)), (int32_t) (4 + upto(60)) };
                e.all = e.slot * (size_t) e.n_expert;
            }
            sizes.experts.push_back(e);
        }
        sizes.n_layers_max = (int32_t) upto(n + 1);
        for (size_t d = 0; d < n_devices; ++d) {
            sizes.room.push_back(upto(2) * upto(20000));
            sizes.n_layers.push_back((int32_t) upto(n + 1));
            sizes.crossing_s.push_back(upto(2) > 0 ? 0.0 : 0.01);
            sizes.has_banks.push_back(upto(3) > 0);
            sizes.link_share.push_back((double) upto(4) / 4);
            sizes.sends.push_back(upto(2) > 0);
        }
        const layer_placement p = place_layers(sizes);
        CHECK(n_placed(p) <= sizes.n_layers_max);
        for (size_t d = 0; d < n_devices; ++d) {
            CHECK(bytes_on(sizes, p, (int) d) <= sizes.room[d]);
            CHECK(std::count(p.device.begin(), p.device.end(), (int) d) <= sizes.n_layers[d]);
        }
        for (size_t il = 0; il < n; ++il) {
            CHECK(p.n_slots[il] == 0 ||
                  (p.device[il] >= 0 && !p.whole[il] && p.n_slots[il] >= sizes.experts[il].n_min));
            CHECK(p.n_slots[il] <= sizes.experts[il].n_expert);
            CHECK(il == 0 || p.device[il - 1] < 0 || p.device[il] >= p.device[il - 1]); // from the last one downwards
        }
        placement_sizes larger = sizes;
        larger.room[0] += 5000;
        CHECK(n_placed(place_layers(larger)) >= n_placed(p));
    }
}

int main() {
    test_mixture();
    test_staying();
    test_what_pays();
    test_without_banks();
    test_random();
    printf("ok\n");
    return 0;
}
