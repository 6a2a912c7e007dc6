#include "weights/experts/guess.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace superllama {

std::set<int32_t> expert_guess(const ggml_tensor * router, const ggml_tensor * input, int64_t n_used) {
    std::set<int32_t> guess;
    if (router->type != GGML_TYPE_F32 || input->type != GGML_TYPE_F32 || router->ne[0] != input->ne[0] ||
        input->nb[0] != sizeof(float) || router->ne[1] < n_used) {
        return guess;
    }
    const auto dot = ggml_get_type_traits_cpu(GGML_TYPE_F32)->vec_dot;
    std::vector<float> score((size_t) router->ne[1]);
    std::vector<int32_t> best(score.size());
    for (int64_t i2 = 0; i2 < input->ne[2]; ++i2) {
        for (int64_t i1 = 0; i1 < input->ne[1]; ++i1) {
            const char * x = (const char *) input->data + i1 * (int64_t) input->nb[1] + i2 * (int64_t) input->nb[2];
            for (size_t e = 0; e < score.size(); ++e) {
                dot((int) router->ne[0], &score[e], 0, (const char *) router->data + e * router->nb[1], 0, x, 0, 1);
                score[e] = score[e] > -INFINITY ? score[e] : -INFINITY; // NaN cannot be sorted
            }
            std::iota(best.begin(), best.end(), 0);
            std::partial_sort(best.begin(), best.begin() + n_used, best.end(),
                              [&](int32_t a, int32_t b) { return score[(size_t) a] > score[(size_t) b]; });
            guess.insert(best.begin(), best.begin() + n_used);
        }
    }
    return guess;
}

} // namespace superllama
