// Which experts the next layer will choose, guessed before it is computed: its router's weights times the input of
// this layer's router. The residual stream changes little from one layer to the next. A wrong guess costs a read.
#pragma once

#include <cstdint>
#include <vector>

struct ggml_tensor;

namespace superllama {

inline constexpr int64_t guess_tokens_max = 4; // more of them want most experts anyway

// The n_used experts with the highest scores for each token of `input`, of each token the highest first; none where the
// shapes do not match.
std::vector<int32_t> expert_guess(const ggml_tensor * router, const ggml_tensor * input, int64_t n_used);

} // namespace superllama
