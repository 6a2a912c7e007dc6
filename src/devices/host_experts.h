// Of a layer on a device, the experts that a ubatch chose, the device lacks and the host computes, while others are on
// their way there.
//
// What the part of a graph does with a bank is done with the host's weights, for the pairs of a token and such an
// expert alone. The device computes these rows too, with whatever is in a slot; before it adds up what the experts of a
// token say, the host's rows take the place of its own.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace superllama {

class host_experts {
  public:
    // From a tensor of a bank to that of the host; null: it is of no bank of this layer.
    using weights_of = std::function<ggml_tensor *(const ggml_tensor * bank)>;

    // What the part that looks slots up computes with the bank's tensors, so many. False: nothing that the host could
    // do as well, and all of them have to be on the device.
    bool begin(ggml_cgraph * part, const ggml_tensor * lookup, const weights_of & weights, size_t n_weights);
    void end();

    // How many of the pairs of a token and an expert there is memory for.
    size_t pairs_max() const { return n_pairs_max; }

    // Rows of these experts. `chosen`: by the ubatch's tokens, one after the other. False without an error: the user's
    // abort callback ended it.
    bool compute(ggml_backend_t host, const std::vector<int32_t> & chosen, const std::set<int32_t> & experts,
                 std::string * error);

    // The node whose rows are replaced, once a device has computed it; null: none is to be.
    const ggml_tensor * node() const { return rows.empty() ? nullptr : weighted; }
    void write(ggml_backend_t device) const;

    static size_t memory_bytes(); // of the host, at most

  private:
    struct graph_of;

    size_t pair_bytes() const;

    weights_of host_weights;
    std::vector<const ggml_tensor *> steps; // from the first product to the last, as the device computes them
    const ggml_tensor * input = nullptr;    // of the first ones, a row of each token
    const ggml_tensor * factors = nullptr;  // of each pair
    ggml_tensor * weighted = nullptr;       // what they make of the last product: [row, expert of a token, token]
    size_t n_pairs_max = 0;
    std::vector<uint8_t> memory;
    std::vector<size_t> pairs; // of the rows: a place in `chosen`
    std::vector<float> rows;
};

} // namespace superllama
