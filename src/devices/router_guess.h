// Which experts a layer on a device will choose, guessed while the one before it is about to be computed there: from
// what that one's router saw, and a copy of this one's in host memory (weights/experts/guess.h).
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace superllama {

class router_guess {
  public:
    void add(int32_t layer, const ggml_tensor * router);

    // Keeps what the router of this layer saw; `choice` is what it chose, in a graph that computed it. Nothing where
    // that is not to be seen from there, or for many tokens.
    void see(int32_t layer, const ggml_tensor * choice);
    void forget();
    // What this layer will choose, the most probable first, by what was seen last.
    const std::vector<int32_t> & guess(int32_t layer, int64_t n_chosen);

    size_t bytes() const; // of host memory, once all were needed

  private:
    struct router {
        const ggml_tensor * tensor;
        std::vector<float> numbers; // the same in host memory, once they were needed
    };

    std::map<int32_t, router> routers; // by layer
    int32_t seen_by = -1;              // the layer whose router saw it
    ggml_tensor input = {};            // its shape
    std::vector<float> seen;
    int32_t guessed_for = -1;
    std::vector<int32_t> guessed;
};

} // namespace superllama
