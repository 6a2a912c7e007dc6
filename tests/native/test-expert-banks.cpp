// Banks of experts against a model of them: what a ubatch chose is in its slot when it computes, those used last stay,
// also when a bank becomes smaller or larger, and what is guessed comes before it is chosen. The device is the
// processor.

#include "devices/expert_banks.h"

#include "check.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

using namespace superllama;

static const int32_t n_layers = 3, n_expert = 16, n_used = 3;

struct machine {
    ggml_backend_ptr backend{ ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
    ggml_context_ptr ctx{ ggml_init({ 64 * ggml_tensor_overhead(), nullptr, true }) };
    ggml_backend_buffer_ptr buffer;
    std::vector<expert_banks::layer_weights> layers;
    std::vector<ggml_tensor *> routers;

    machine() {
        for (int32_t il = 0; il < n_layers; ++il) {
            routers.push_back(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 8, n_expert));
            layers.push_back({ il + 1, {}, routers.back() }); // the first layer has no experts
            for (int64_t rows : { 4, 6 }) {
                layers.back().weights.push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, 8, rows, n_expert));
            }
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        for (const auto & l : layers) {
            for (size_t i = 0; i < l.weights.size(); ++i) {
                float * data = (float *) l.weights[i]->data;
                for (int64_t k = 0; k < ggml_nelements(l.weights[i]); ++k) {
                    data[k] = (float) (1000 * l.layer + 100 * (int) i + (int) (k / (8 * l.weights[i]->ne[1])));
                }
            }
        }
        std::mt19937 random(5);
        for (const ggml_tensor * router : routers) {
            fill(router, random);
        }
    }

    static void fill(const ggml_tensor * t, std::mt19937 & random) {
        for (int64_t k = 0; k < ggml_nelements(t); ++k) {
            ((float *) t->data)[k] = (float) (random() % 1000) - 500;
        }
    }

    // What the router of a layer would choose for this token.
    std::vector<int32_t> chooses(int32_t il, const std::vector<float> & x) const {
        std::vector<std::pair<float, int32_t>> scores;
        for (int32_t e = 0; e < n_expert; ++e) {
            const float * row = (const float *) routers[(size_t) il - 1]->data + 8 * e;
            scores.emplace_back(-std::inner_product(row, row + 8, x.begin(), 0.0F), e);
        }
        std::sort(scores.begin(), scores.end());
        std::vector<int32_t> best;
        for (int32_t k = 0; k < n_used; ++k) {
            best.push_back(scores[(size_t) k].second);
        }
        return best;
    }
};

static const float * matrix(const ggml_tensor * t, int64_t e) {
    return (const float *) ((const char *) t->data + e * (int64_t) t->nb[2]);
}

// What one layer's bank holds, and when a ubatch chose it last.
struct model {
    std::map<int32_t, int64_t> held;
    size_t n_slots = 0;

    int use(const std::vector<int32_t> & chosen, int64_t now) { // how many were missing
        int missing = 0;
        for (int32_t e : std::set<int32_t>(chosen.begin(), chosen.end())) {
            missing += (int) (1 - held.count(e));
            held[e] = now;
        }
        return missing;
    }

    // As many have left as there are no slots for, and none that was used later than one that stayed.
    void forget(const std::function<bool(int32_t)> & is_there, bool all) {
        std::map<int32_t, int64_t> stays;
        int64_t oldest = INT64_MAX, youngest = 0; // that stayed, that left
        for (const auto & e : held) {
            if (is_there(e.first)) {
                stays.insert(e);
                oldest = std::min(oldest, e.second);
            } else {
                youngest = std::max(youngest, e.second);
            }
        }
        CHECK(stays.size() == (all ? 0 : std::min(held.size(), n_slots)));
        CHECK(stays.empty() || youngest <= oldest);
        held = stays;
    }
};

struct run_of {
    machine & m;
    expert_banks & banks;
    std::string error;
    std::vector<int32_t> left; // experts that were fetched back
    std::vector<float> x = {}; // what the router sees, of one token
    std::set<int32_t> not_on_host = {};
    std::vector<int32_t> guessed = {}; // that were to be sent

    expert_banks::result compute(int32_t il, const std::vector<int32_t> & chosen, bool serves = true) {
        ggml_context_ptr ctx(ggml_init({ 16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        ggml_tensor * map = banks.slot_map(il, (int64_t) chosen.size() / n_used, n_used);
        CHECK(map != nullptr);
        ggml_tensor * copied = ggml_dup_tensor(ctx.get(), map);
        ggml_tensor * ids = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, (int64_t) chosen.size());
        ggml_tensor * seen = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 8, 1);
        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), m.buft));
        memcpy(ids->data, chosen.data(), ggml_nbytes(ids));
        if (!x.empty()) {
            memcpy(seen->data, x.data(), ggml_nbytes(seen));
        }
        ggml_tensor * slots = ggml_get_rows(ctx.get(), copied, ids);
        ggml_cgraph * graph = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(graph, slots);
        if (!x.empty()) { // what chose them
            ids->src[0] = ggml_mul_mat(ctx.get(), m.routers[(size_t) il - 1], seen);
        }

        const auto serve_guess = [&](const guessed_experts & g) {
            CHECK(g.weights == m.layers[(size_t) il - 1].weights[0]);
            std::vector<int32_t> going;
            const auto on_host = [&](int32_t e) { return not_on_host.count(e) == 0; };
            for (int32_t e : g.experts) {
                CHECK(!banks.holds(g.weights, e));
                if (on_host(e) && g.find_slot(e, on_host)) {
                    going.push_back(e);
                }
            }
            for (int32_t e : going) {
                g.send(e, [e](const ggml_tensor * t) { return (const uint8_t *) matrix(t, e); });
                CHECK(!banks.holds(g.weights, e)); // before it is there
            }
            g.finish();
            guessed = going;
        };
        guessed.clear();
        const auto serve = [&](const expert_request & r, std::string * why) {
            CHECK(r.chosen == chosen && r.weights == m.layers[(size_t) il - 1].weights[0]);
            for (int32_t e : r.leaving) {
                CHECK(banks.holds(r.weights, e));
                std::vector<float> row(8 * 4);
                r.fetch(e, r.weights, (uint8_t *) row.data());
                CHECK(memcmp(row.data(), matrix(r.weights, e), 8 * 4 * sizeof(float)) == 0);
                left.push_back(e);
            }
            for (size_t i = r.missing.size(); i-- > 0;) {
                const int32_t e = r.missing[i];
                if (!serves && i == 0) {
                    *why = "unreadable";
                    return false;
                }
                r.send(e, [e](const ggml_tensor * t) { return (const uint8_t *) matrix(t, e); });
            }
            r.finish();
            return true;
        };
        const auto same = [](const ggml_tensor * t) { return t; };
        const expert_banks::result result =
            banks.copy(m.backend.get(), map, copied, graph, { nullptr, same, serve, serve_guess }, &error);
        for (size_t i = 0; result == expert_banks::result::copied && i < chosen.size(); ++i) {
            const int32_t slot = ((const int32_t *) copied->data)[chosen[i]];
            for (const ggml_tensor * w : m.layers[(size_t) il - 1].weights) {
                const ggml_tensor * bank = banks.bank_of(w);
                CHECK(slot >= 0 && slot < bank->ne[2] && bank->ne[2] == banks.n_slots(il));
                CHECK(memcmp(matrix(bank, slot), matrix(w, chosen[i]), w->nb[2]) == 0);
            }
        }
        return result;
    }
};

static void test_random() {
    machine m;
    expert_banks banks(m.layers, n_used, { { ggml_backend_get_device(m.backend.get()), false, 1, false } });
    run_of run{ m, banks, {}, {} };
    std::map<int32_t, model> models;
    std::mt19937 random(3);
    int64_t hits = 0, misses = 0;
    for (int step = 0; step < 4000; ++step) {
        const int32_t il = 1 + (int32_t) (random() % n_layers);
        model & expected = models[il];
        const auto is_there = [&](int32_t e) { return banks.holds(m.layers[(size_t) il - 1].weights[1], e); };
        if (step < n_layers || random() % 50 == 0) {
            const int32_t n =
                step < n_layers ? 8 : (int32_t) (random() % 3 == 0 ? 0 : n_used + random() % (n_expert - n_used + 1));
            const bool room = random() % 4 > 0;
            const bool keeps = room && n > 0 && expected.n_slots > 0;
            if ((size_t) n != expected.n_slots) {
                CHECK(banks.resize(il, m.buft, n, room ? 1 << 20 : 0));
                expected.n_slots = (size_t) n;
                expected.forget(is_there, !keeps);
            }
            CHECK(banks.n_slots(il) == n && (banks.bytes(il) > 0) == (n > 0));
        }
        for (int32_t e = 0; e < n_expert; ++e) {
            CHECK(is_there(e) == (expected.held.count(e) > 0));
        }
        std::vector<int32_t> chosen;
        const int64_t n_tokens = 1 + random() % 4;
        for (int64_t t = 0; t < n_tokens; ++t) {
            const int32_t first = (int32_t) (random() % (random() % 2 == 0 ? 5 : n_expert));
            for (int32_t k = 0; k < n_used; ++k) {
                chosen.push_back((first + 3 * k) % n_expert);
            }
        }
        if (banks.slot_map(il, n_tokens, n_used) == nullptr) {
            CHECK(std::min<int64_t>(n_tokens * n_used, n_expert) > banks.n_slots(il));
            continue;
        }
        const size_t n_left = run.left.size();
        CHECK(run.compute(il, chosen) == expert_banks::result::copied);
        const size_t before = expected.held.size();
        const int missing = expected.use(chosen, step + 1);
        expected.forget(is_there, false);
        CHECK(run.left.size() - n_left == before + (size_t) missing - expected.held.size());
        misses += missing;
        hits += (int64_t) std::set<int32_t>(chosen.begin(), chosen.end()).size() - missing;
    }
    CHECK(hits > 1000 && misses > 1000);
    CHECK(banks.count().hits == hits && banks.count().misses == misses);
    const auto bytes = banks.traffic_of(ggml_backend_get_device(m.backend.get()));
    CHECK(bytes.up == misses * 8 * (4 + 6) * 4 && bytes.down == (int64_t) run.left.size() * 8 * 4 * 4);
}

// A layer that was there as a whole leaves some of its experts, and a failed read leaves none that is half there.
static void test_whole_and_failures() {
    machine m;
    expert_banks banks(m.layers, n_used, { { ggml_backend_get_device(m.backend.get()), false, 1, false } });
    run_of run{ m, banks, {}, {} };
    std::vector<ggml_tensor> whole;
    for (const ggml_tensor * t : m.layers[0].weights) {
        whole.push_back(*t);
    }
    CHECK(!banks.resize(1, m.buft, 9, 0, whole) && !banks.any()); // no room beside what is there still
    CHECK(banks.resize(1, m.buft, 9, 1 << 20, whole) && banks.any());
    CHECK(run.compute(1, { 0, 4, 8 }) == expert_banks::result::copied && banks.count().misses == 0);

    CHECK(run.compute(1, { 0, 10, 12 }, false) == expert_banks::result::failed && run.error == "unreadable");
    CHECK(!banks.holds(m.layers[0].weights[0], 10) && banks.holds(m.layers[0].weights[0], 12));
    CHECK(run.compute(1, { 0, 10, 12 }) == expert_banks::result::copied);

    CHECK(run.compute(1, { 0, 1, 16 }) == expert_banks::result::failed); // no such expert
    CHECK(run.error.find("does not exist") != std::string::npos);
    CHECK(run.compute(1, { 0, 1, 2 }) == expert_banks::result::copied);

    ggml_tensor other = whole[0];
    CHECK(banks.copy(m.backend.get(), &other, nullptr, nullptr, {}, &run.error) == expert_banks::result::not_ours);
    CHECK(banks.bank_of(&other) == nullptr && banks.bank_of(m.layers[1].weights[0]) == nullptr);
    CHECK(banks.slot_map(0, 1, n_used) == nullptr && banks.slot_map(1, 33, n_used) == nullptr);
    CHECK(banks.slot_map(1, 3, n_used) != nullptr && banks.slot_map(1, 4, n_used) == nullptr);

    const expert_sizes s = banks.sizes(1, m.buft);
    CHECK(s.n_expert == n_expert && s.n_min == n_used && s.slot == 8 * 10 * 4 && s.all >= 16 * s.slot);
    for (int32_t n = 1; n <= n_expert; ++n) {
        CHECK(banks.resize(2, m.buft, n, 0) && banks.bytes(2) <= s.bank + s.slot * (size_t) n);
    }
    CHECK(banks.sizes(0, m.buft).n_expert == 0);
}

// Of a large batch for which all are there for a moment, those that it chose most often stay: a quarter of the slots.
static void test_large_batches() {
    machine m;
    expert_banks banks(m.layers, n_used, { { ggml_backend_get_device(m.backend.get()), false, 1, false } });
    run_of run{ m, banks, {}, {} };
    const auto & weights = m.layers[0].weights;
    const auto holds = [&](int32_t e) { return banks.holds(weights[0], e); };
    const auto keep = [&](const std::vector<int32_t> & most_chosen, bool may_leave) {
        for (const ggml_tensor * w : weights) {
            CHECK(!holds(most_chosen[0]) || w == weights[0]); // not before all of it is there
            banks.keep(w, w, most_chosen, may_leave);
        }
    };
    keep({ 1, 2 }, true); // there is no bank
    CHECK(banks.resize(1, m.buft, 8, 1 << 20));
    keep({ 15, 3, 7, 9 }, false);
    CHECK(holds(15) && holds(3) && !holds(7));
    CHECK(run.compute(1, { 15, 3, 7 }) == expert_banks::result::copied &&
          banks.count().hits == 2);                                     // what came is right
    CHECK(run.compute(1, { 0, 1, 2 }) == expert_banks::result::copied); // six slots are taken
    keep({ 10, 15, 11, 12 }, false);
    CHECK(holds(10) && holds(11) && holds(15) && !holds(12));
    keep({ 12, 13 }, false); // all are taken
    CHECK(!holds(12) && holds(3));
    keep({ 12, 15, 13 }, true); // two that were used longest ago leave, and 15 is none of them any more
    CHECK(holds(12) && holds(13) && holds(15) && !holds(3) && !holds(7));
    CHECK(run.compute(1, { 12, 13, 10 }) == expert_banks::result::copied && run.left.empty());

    keep({ 14, 4, 10, 11, 12, 13, 15, 2, 1, 0 }, true); // the batch has eight of them from there: they stay
    CHECK(!holds(14) && holds(0) && holds(10));
    banks.keep(weights[0], weights[0], { 4, 5 }, true); // and then the batch fails
    CHECK(!holds(4) && !holds(5));
    CHECK(run.compute(1, { 4, 6, 8 }) == expert_banks::result::copied);
    keep({ 5, 14 }, true);
    CHECK(run.compute(1, { 5, 14, 4 }) == expert_banks::result::copied);
}

// What a router will choose is there before, if the one before it saw much the same. Guesses only cost those that were
// used longest ago, and none that the host lacks.
static void test_guesses() {
    machine m;
    expert_banks banks(m.layers, n_used, { { ggml_backend_get_device(m.backend.get()), false, 1, true } });
    run_of run{ m, banks, {}, {} };
    std::mt19937 random(11);
    for (int32_t il = 1; il <= n_layers; ++il) {
        CHECK(banks.resize(il, m.buft, 6 + il, 1 << 20));
    }
    const auto held = [&](int32_t il) {
        std::set<int32_t> found;
        const auto * slots = (const int32_t *) banks.slot_map(il, 1, n_used)->data;
        for (int32_t e = 0; e < n_expert; ++e) {
            if (slots[e] < 0) {
                continue;
            }
            found.insert(e);
            for (const ggml_tensor * w : m.layers[(size_t) il - 1].weights) {
                CHECK(memcmp(matrix(banks.bank_of(w), slots[e]), matrix(w, e), w->nb[2]) == 0);
            }
        }
        return found;
    };
    int64_t n_chosen = 0, n_guessed = 0, n_wrong = 0;
    for (int token = 0; token < 2000; ++token) {
        run.x.assign(8, 0);
        std::generate(run.x.begin(), run.x.end(), [&] { return (float) (random() % 1000) - 500; });
        run.not_on_host.clear();
        for (int k = 0; k < 4 && token % 2 == 0; ++k) {
            run.not_on_host.insert((int32_t) (random() % n_expert));
        }
        for (int32_t il = 1; il <= n_layers; ++il) {
            const bool is_wrong = random() % 4 == 0;
            const std::vector<int32_t> guess = m.chooses(il, run.x);
            const std::vector<int32_t> chosen = is_wrong ? std::vector<int32_t>{ 1, 7, 13 } : guess;
            const std::set<int32_t> before = held(il);
            const size_t n_left = run.left.size();
            CHECK(run.compute(il, chosen) == expert_banks::result::copied);
            CHECK(il > 1 || run.guessed.empty()); // nothing was seen before
            for (int32_t e : run.guessed) {
                CHECK(std::count(guess.begin(), guess.end(), e) == 1 && before.count(e) == 0);
                n_wrong += std::count(chosen.begin(), chosen.end(), e) == 0;
            }
            const std::set<int32_t> after = held(il);
            for (int32_t e : before) {
                const bool was_fetched = std::count(run.left.begin() + (ptrdiff_t) n_left, run.left.end(), e) > 0;
                CHECK(after.count(e) > 0 || was_fetched || run.not_on_host.count(e) == 0);
            }
            n_chosen += n_used;
            n_guessed += (int64_t) run.guessed.size();
        }
        banks.end_graph();
    }
    const auto n = banks.count();
    CHECK(n.hits + n.misses == n_chosen && n.guesses == n_guessed && n.guesses_used == n_guessed - n_wrong);
    CHECK(n.guesses_used > 1000 && n_wrong > 100);
    const auto bytes = banks.traffic_of(ggml_backend_get_device(m.backend.get()));
    CHECK(bytes.up == (n.misses + n.guesses) * 8 * (4 + 6) * 4);

    const int64_t before = n.guesses; // after a graph that saw nothing, or many tokens, nothing is sent
    run.x.clear();
    CHECK(run.compute(1, { 0, 1, 2 }) == expert_banks::result::copied);
    CHECK(run.compute(2, { 3, 4, 5 }) == expert_banks::result::copied);
    CHECK(banks.count().guesses == before);
}

int main() {
    test_random();
    test_guesses();
    test_large_batches();
    test_whole_and_failures();
    printf("ok\n");
    return 0;
}
