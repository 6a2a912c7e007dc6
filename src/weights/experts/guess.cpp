#include "weights/experts/guess.h"

#include "ggml.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

// A backend that is loaded at run time has no symbols to link to, and the kernels of the one that is chosen cannot be
// named here: so the product is our own, compiled for three generations of x86, one of which is taken at the start:
// before ThreadSanitizer works, which crashes in what takes it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) &&                           \
    !defined(__SANITIZE_THREAD__)
#    define FOR_EACH_CPU __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#    define FOR_EACH_CPU
#endif

namespace superllama {

FOR_EACH_CPU static float dot(const float * x, const float * y, size_t n) {
    std::array<float, 64> sums{}; // independent, so that they become a few vectors
    size_t i = 0;
    for (; i + sums.size() <= n; i += sums.size()) {
        for (size_t j = 0; j < sums.size(); ++j) {
            sums[j] += x[i + j] * y[i + j];
        }
    }
    for (; i < n; ++i) {
        sums[0] += x[i] * y[i];
    }
    return std::accumulate(sums.begin(), sums.end(), 0.0F);
}

std::vector<int32_t> expert_guess(const ggml_tensor * router, const ggml_tensor * input, int64_t n_used) {
    std::vector<int32_t> guess;
    if (router->type != GGML_TYPE_F32 || input->type != GGML_TYPE_F32 || router->ne[0] != input->ne[0] ||
        input->nb[0] != sizeof(float) || router->ne[1] < n_used) {
        return guess;
    }
    std::vector<float> score((size_t) router->ne[1]);
    std::vector<int32_t> best(score.size());
    for (int64_t i2 = 0; i2 < input->ne[2]; ++i2) {
        for (int64_t i1 = 0; i1 < input->ne[1]; ++i1) {
            const auto * x = (const float *) ((const char *) input->data + i1 * (int64_t) input->nb[1] +
                                              i2 * (int64_t) input->nb[2]);
            for (size_t e = 0; e < score.size(); ++e) {
                const auto * row = (const float *) ((const char *) router->data + e * router->nb[1]);
                score[e] = dot(row, x, (size_t) router->ne[0]);
                score[e] = score[e] > -INFINITY ? score[e] : -INFINITY; // NaN cannot be sorted
            }
            std::iota(best.begin(), best.end(), 0);
            std::partial_sort(best.begin(), best.begin() + n_used, best.end(),
                              [&](int32_t a, int32_t b) { return score[(size_t) a] > score[(size_t) b]; });
            for (int64_t k = 0; k < n_used; ++k) {
                if (std::find(guess.begin(), guess.end(), best[(size_t) k]) == guess.end()) {
                    guess.push_back(best[(size_t) k]);
                }
            }
        }
    }
    return guess;
}

} // namespace superllama
