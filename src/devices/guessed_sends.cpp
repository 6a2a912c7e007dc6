#include "devices/guessed_sends.h"

#include <algorithm>
#include <utility>

namespace superllama {

static const int wasted_max = 4;    // sends one after the other, after which fewer go at once
static const int left_out_max = 64; // times that none went, after which one does

guessed_sends::guessed_sends(ggml_backend_dev_t dev) : dev(dev) {}

bool guessed_sends::may_send() {
    if (!tried) { // for most models no expert is ever missing
        copies.reset(ggml_backend_dev_init(dev, nullptr));
        tried = true;
    }
    if (n_max == 0 && ++n_left_out == left_out_max) {
        n_max = 1;
        n_left_out = 0;
    }
    return copies != nullptr && n_max > 0;
}

// Until what was sent is there, and the device has chosen. Whether it was done before. Some backends begin to copy when
// they are waited for.
bool guessed_sends::wait(ggml_backend_t backend, int64_t t_begin_us) {
    sending.begin(copies.get());
    sending.wait(copies.get(), ggml_backend_synchronize);
    const int64_t t_there_us = ggml_time_us();
    ggml_backend_synchronize(backend);
    const int64_t t_chosen_us = ggml_time_us();
    return t_chosen_us - t_there_us < (t_chosen_us - t_begin_us) / 8;
}

void guessed_sends::send(ggml_backend_t backend, expert_bank & b, const std::vector<int32_t> & guessed,
                         int64_t t_begin_us, const serve_guess & serve) {
    last.clear();
    more = guessed.size() > n_max;
    guessed_experts g;
    g.experts.assign(guessed.begin(), guessed.begin() + (ptrdiff_t) std::min(guessed.size(), n_max));
    g.weights = b.weights.front();
    const std::vector<int32_t> by_age = b.slots_by_age();
    size_t next = 0;
    std::vector<std::pair<int32_t, int32_t>> coming;
    g.find_slot = [&](int32_t expert, const guessed_experts::is_on_host & on_host) {
        while (next < by_age.size()) {
            const int32_t slot = by_age[next++], owner = b.owner_of(slot);
            if (owner < 0 || on_host(owner)) {
                b.own(slot, -1);
                coming.emplace_back(expert, slot);
                return true;
            }
        }
        return false;
    };
    g.send = [&](int32_t expert, const expert_request::matrix_of & matrix) {
        const auto at = std::find_if(coming.begin(), coming.end(), [&](const auto & c) { return c.first == expert; });
        for (size_t i = 0; i < b.weights.size(); ++i) {
            ggml_tensor * to = b.tensor(i);
            ggml_backend_tensor_set_async(copies.get(), to, matrix(b.weights[i]), (size_t) at->second * to->nb[2],
                                          to->nb[2]);
        }
    };
    g.finish = [&] { late = wait(backend, t_begin_us); };
    serve(g);
    for (const auto & [expert, slot] : coming) {
        b.own_guessed(slot, expert);
        last.push_back(expert);
    }
}

std::vector<int32_t> guessed_sends::settle(const std::vector<int32_t> & chosen) {
    std::vector<int32_t> right;
    for (int32_t e : last) {
        if (std::find(chosen.begin(), chosen.end(), e) != chosen.end()) {
            right.push_back(e);
        }
    }
    if (!last.empty()) { // one that is right would have to be sent anyway
        n_wasted = late && 2 * right.size() < last.size() ? n_wasted + 1 : 0;
    }
    if (n_wasted == wasted_max) {
        n_max--;
        n_wasted = 0;
    } else if (!late && more && !last.empty()) {
        n_max++;
    }
    last.clear();
    return right;
}

} // namespace superllama
