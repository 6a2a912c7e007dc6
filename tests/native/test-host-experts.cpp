// Experts of a layer on a device that the host computes: each row is what the device would have computed with them,
// whatever form the layer has and whatever the bank holds. The device is the processor, so bits must not differ.

#include "devices/expert_banks.h"

#include "check.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

using namespace superllama;

static const int64_t n_expert = 12, n_used = 3, n_ff = 24;

enum class form { gated, merged, clamped, squared, biased, before };

struct layer {
    form kind;
    int64_t n_embd;
    ggml_backend_ptr backend{ ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
    ggml_context_ptr ctx{ ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true }) };
    ggml_tensor * bias = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_expert);
    std::vector<ggml_tensor *> weights; // the last one is that of the last product
    ggml_backend_buffer_ptr buffer;

    layer(form kind, int64_t n_embd) : kind(kind), n_embd(n_embd) {
        // one thread: ThreadSanitizer does not see how those of OpenMP wait for each other
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
        ((ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))(
            backend.get(), 1);
        const bool two = kind == form::gated || kind == form::clamped;
        for (int i = 0; i < (two ? 2 : 1); ++i) {
            const int64_t rows = kind == form::merged ? 2 * n_ff : n_ff;
            weights.push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd, rows, n_expert));
        }
        weights.push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_ff, n_embd, n_expert));
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        std::mt19937 random(1);
        for (ggml_tensor * t : { weights[0], weights[1], weights.back(), bias }) {
            fill(t, random);
        }
    }

    static void fill(ggml_tensor * t, std::mt19937 & random) {
        std::uniform_real_distribution<float> value(-0.5F, 0.5F);
        std::generate_n((float *) t->data, ggml_nelements(t), [&] { return value(random); });
    }

    // What each chosen expert says, times its factor; `of` finds the weights to compute with.
    template <typename F>
    ggml_tensor * build(ggml_context * c, ggml_tensor * x, ggml_tensor * ids, ggml_tensor * at, ggml_tensor * factors,
                        const F & of) const {
        if (kind == form::before) {
            x = ggml_mul(c, ggml_repeat_4d(c, x, n_embd, n_used, x->ne[2], 1), factors);
        }
        ggml_tensor * first = ggml_mul_mat_id(c, of(weights[0]), x, at);
        ggml_tensor * cur = first;
        if (kind == form::gated) {
            cur = ggml_swiglu_split(c, first, ggml_mul_mat_id(c, of(weights[1]), x, at));
        } else if (kind == form::clamped) {
            ggml_tensor * up = ggml_clamp(c, ggml_mul_mat_id(c, of(weights[1]), x, at), -0.1F, 0.1F);
            cur = ggml_mul(c, ggml_clamp(c, ggml_silu(c, first), -INFINITY, 0.1F), up);
        } else if (kind == form::merged) {
            ggml_tensor * half[2];
            for (size_t i = 0; i < 2; ++i) {
                half[i] = ggml_view_3d(c, first, n_ff, first->ne[1], first->ne[2], first->nb[1], first->nb[2],
                                       i * (size_t) n_ff * first->nb[0]);
            }
            cur = ggml_geglu_split(c, half[0], half[1]);
        } else {
            cur = ggml_sqr(c, ggml_relu(c, first));
        }
        cur = ggml_mul_mat_id(c, of(weights.back()), cur, at);
        if (kind == form::biased) {
            cur = ggml_add_id(c, cur, bias, ids);
        }
        return kind == form::before ? cur : ggml_mul(c, cur, factors);
    }
};

struct result {
    int64_t stayed;
    int64_t missing;
};

// One ubatch, with what the bank holds and without it.
static result compute(const layer & l, expert_banks & banks, const std::vector<int32_t> & chosen,
                      std::mt19937 & random) {
    const int64_t n_tokens = (int64_t) chosen.size() / n_used;
    const ggml_context_ptr in(ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * map = banks.slot_map(0, n_tokens, n_used);
    CHECK(map != nullptr);
    ggml_tensor * seen = ggml_dup_tensor(in.get(), map);
    ggml_tensor * ids = ggml_new_tensor_1d(in.get(), GGML_TYPE_I32, n_used * n_tokens);
    ggml_tensor * x = ggml_new_tensor_3d(in.get(), GGML_TYPE_F32, l.n_embd, 1, n_tokens);
    ggml_tensor * factors = ggml_new_tensor_3d(in.get(), GGML_TYPE_F32, 1, n_used, n_tokens);
    const ggml_backend_buffer_ptr inputs(ggml_backend_alloc_ctx_tensors_from_buft(in.get(), l.buft));
    memcpy(ids->data, chosen.data(), ggml_nbytes(ids));
    layer::fill(x, random);
    layer::fill(factors, random);

    const ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr, true }));
    ggml_tensor * at = ggml_reshape_2d(ctx.get(), ggml_get_rows(ctx.get(), seen, ids), n_used, n_tokens);
    ids = ggml_reshape_2d(ctx.get(), ids, n_used, n_tokens);
    ggml_tensor * out = l.build(ctx.get(), x, ids, at, factors, [&](ggml_tensor * w) { return banks.bank_of(w); });
    ggml_tensor * want = l.build(ctx.get(), x, ids, ids, factors, [](ggml_tensor * w) { return w; });
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_cgraph * other = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, out);
    ggml_build_forward_expand(other, want);
    const ggml_backend_buffer_ptr results(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), l.buft));

    result n = {};
    std::string error;
    const auto serve = [&](const expert_request & r, std::string * why) {
        n = { (int64_t) r.staying.size(), (int64_t) (r.missing.size() + r.staying.size()) };
        for (size_t i = r.missing.size(); i-- > 0;) {
            const int32_t e = r.missing[i];
            r.send(e, [e](const ggml_tensor * t) { return (const uint8_t *) t->data + (size_t) e * t->nb[2]; });
        }
        const bool ok = r.staying.empty() || r.compute(why);
        r.finish();
        return ok;
    };
    ggml_backend_t backend = l.backend.get();
    const auto same = [](const ggml_tensor * t) { return t; };
    CHECK(banks.copy(backend, map, seen, graph, { backend, same, serve, {} }, &error) == expert_banks::result::copied);
    CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
    CHECK(banks.stops_after(out) == (n.stayed > 0));
    banks.after_node(out);
    CHECK(ggml_backend_graph_compute(backend, other) == GGML_STATUS_SUCCESS);
    CHECK(memcmp(out->data, want->data, ggml_nbytes(out)) == 0);
    banks.end_graph();
    CHECK(!banks.stops_after(out));
    return n;
}

static std::vector<int32_t> choose(int64_t n_tokens, std::mt19937 & random) {
    std::vector<int32_t> all((size_t) n_expert), chosen;
    std::iota(all.begin(), all.end(), 0);
    for (int64_t t = 0; t < n_tokens; ++t) {
        std::shuffle(all.begin(), all.end(), random);
        chosen.insert(chosen.end(), all.begin(), all.begin() + n_used);
    }
    return chosen;
}

static void test_form(form kind, double link) {
    const layer l(kind, 32);
    ggml_backend_dev_t dev = ggml_backend_get_device(l.backend.get());
    expert_banks banks({ { 0, l.weights } }, (int32_t) n_used, { { dev, true, link, false } });
    CHECK(banks.resize(0, l.buft, 9, 0));
    CHECK(banks.shares());
    std::mt19937 random(7);
    result sum = {};
    for (int step = 0; step < 200; ++step) {
        const result n = compute(l, banks, choose(1 + random() % 3, random), random);
        sum = { sum.stayed + n.stayed, sum.missing + n.missing };
    }
    const bool can = kind != form::biased && kind != form::before;
    CHECK(sum.missing > 100);
    CHECK(banks.shares() == can);
    const int64_t most = sum.missing - (int64_t) (link / (1 + link) * (double) sum.missing - 1); // that may stay
    CHECK(can ? sum.stayed <= most && (link > 0 || sum.stayed == sum.missing) && (link > 5) == (sum.stayed == 0)
              : sum.stayed == 0);
    CHECK(banks.count().misses == sum.missing && banks.count().stayed == sum.stayed);
}

// Experts for which the host has no memory are sent, whatever the share.
static void test_memory_of_the_host() {
    const layer l(form::gated, 30000);
    ggml_backend_dev_t dev = ggml_backend_get_device(l.backend.get());
    expert_banks banks({ { 0, l.weights } }, (int32_t) n_used, { { dev, true, 0, false } });
    CHECK(banks.resize(0, l.buft, (int32_t) n_expert, 0));
    std::mt19937 random(7);
    const result n = compute(l, banks, choose(4, random), random);
    CHECK(0 < n.stayed && n.stayed < n.missing);
}

// Those that were chosen more recently are sent.
static void test_which_are_sent() {
    const layer l(form::gated, 32);
    ggml_backend_dev_t dev = ggml_backend_get_device(l.backend.get());
    expert_banks banks({ { 0, l.weights } }, (int32_t) n_used, { { dev, true, 1, false } });
    CHECK(banks.resize(0, l.buft, (int32_t) n_used, 0));
    std::mt19937 random(7);
    const auto holds = [&](int32_t e) { return banks.holds(l.weights[0], e); };
    compute(l, banks, { 0, 1, 2 }, random); // two of them are sent
    CHECK((int) holds(0) + (int) holds(1) + (int) holds(2) == 2);
    const int32_t before = !holds(0) ? 0 : !holds(1) ? 1 : 2; // was chosen, and not sent
    compute(l, banks, { before, 7, 8 }, random);
    CHECK(holds(before));
}

int main() {
    for (form kind : { form::gated, form::merged, form::clamped, form::squared, form::biased, form::before }) {
        for (double link : { 0.0, 0.3, 1.0, 100.0 }) {
            test_form(kind, link);
        }
    }
    test_memory_of_the_host();
    test_which_are_sent();
    printf("ok\n");
    return 0;
}
