#include "devices/router_guess.h"

#include "weights/experts/guess.h"

#include "ggml-backend.h"

namespace superllama {

void router_guess::add(int32_t layer, const ggml_tensor * router) {
    if (router != nullptr) {
        routers[layer] = { router, {} };
    }
}

size_t router_guess::bytes() const {
    size_t sum = 0;
    for (const auto & entry : routers) {
        sum += (size_t) ggml_nelements(entry.second.tensor) * sizeof(float);
    }
    return sum;
}

// What a router was multiplied with, for what came of it; null: it is not in the way of it.
static const ggml_tensor * input_of(const ggml_tensor * router, const ggml_tensor * t) {
    static const int steps_max = 32;
    for (int i = 0; i < steps_max && t != nullptr; ++i) {
        if (t->op == GGML_OP_MUL_MAT && t->src[0] == router) {
            return t->src[1];
        }
        t = t->view_src != nullptr ? t->view_src : t->src[0];
    }
    return nullptr;
}

static std::vector<float> numbers_of(const ggml_tensor * t) {
    std::vector<float> numbers((size_t) ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(t, numbers.data(), 0, ggml_nbytes(t));
    } else {
        std::vector<uint8_t> data(ggml_nbytes(t));
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
        ggml_get_type_traits(t->type)->to_float(data.data(), numbers.data(), (int64_t) numbers.size());
    }
    return numbers;
}

// As if they were this tensor, in F32.
static ggml_tensor in_numbers(const ggml_tensor & t, std::vector<float> & numbers) {
    ggml_tensor here = t;
    here.type = GGML_TYPE_F32;
    here.nb[0] = sizeof(float);
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        here.nb[i] = here.nb[i - 1] * (size_t) here.ne[i - 1];
    }
    here.data = numbers.data();
    return here;
}

void router_guess::see(int32_t layer, const ggml_tensor * choice) {
    if (seen_by == layer) {
        return;
    }
    forget();
    seen_by = layer;
    const auto from = routers.find(layer);
    const ggml_tensor * t = from != routers.end() ? input_of(from->second.tensor, choice) : nullptr;
    if (t != nullptr && ggml_is_contiguous(t) && ggml_nrows(t) <= guess_tokens_max) {
        input = *t;
        seen = numbers_of(t);
    }
}

void router_guess::forget() {
    seen_by = guessed_for = -1;
    seen.clear();
    guessed.clear();
}

const std::vector<int32_t> & router_guess::guess(int32_t layer, int64_t n_chosen) {
    if (guessed_for == layer) {
        return guessed;
    }
    guessed_for = layer;
    guessed.clear();
    const auto to = routers.find(layer);
    if (seen.empty() || to == routers.end()) {
        return guessed;
    }
    router & r = to->second;
    if (r.numbers.empty()) {
        r.numbers = numbers_of(r.tensor);
    }
    const ggml_tensor here = in_numbers(*r.tensor, r.numbers), x = in_numbers(input, seen);
    guessed = expert_guess(&here, &x, n_chosen);
    return guessed;
}

} // namespace superllama
