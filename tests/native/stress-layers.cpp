// Random budgets, evictions, cancellations, failing reads, saved and loaded states while a model decodes: every logit
// must stay what it was, or the call fails and the next one goes on.
//
//   stress-layers MODEL N_STEPS SEED [REPACK] [SYNC]
//
// The reference is the same model, loaded without superllama's features, in the same process. Reads fail where
// tests/fault_shim.c is preloaded.

#include "check.h"
#include "llama.h"
#include "superllama.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

static std::atomic<int> abort_after{ -1 }; // graph nodes until the running decode is cancelled, -1: never

static bool on_abort(void *) {
    return abort_after >= 0 && --abort_after < 0;
}

struct session {
    llama_model * model;
    llama_context * ctx;
};

static session open_session(const char * path, bool dynamic, bool repack, bool async) {
    llama_model_params mparams = llama_model_default_params();
    mparams.use_extra_bufts = repack;
    mparams.n_gpu_layers = 0;
    mparams.superllama.dynamic_layers = dynamic;
    mparams.superllama.async_prefetch = async;
    llama_model * model = llama_model_load_from_file(path, mparams);
    CHECK(model != nullptr);

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = 512;
    cparams.n_batch = 64;
    cparams.n_ubatch = 32;
    cparams.n_outputs_max = 1;
    cparams.n_threads = 2;
    cparams.n_threads_batch = 2;
    if (dynamic) {
        cparams.abort_callback = on_abort;
    }
    llama_context * ctx = llama_init_from_model(model, cparams);
    CHECK(ctx != nullptr);
    return { model, ctx };
}

static int decode(session & s, std::vector<llama_token> tokens) {
    return llama_decode(s.ctx, llama_batch_get_one(tokens.data(), (int32_t) tokens.size()));
}

// To `n_past` tokens, after a call that did not end well; what cannot go back begins anew: recurrent states, and
// windows that were written over. Returns where it is.
static int go_back(session & stock, session & dynamic, int n_past) {
    llama_memory_t memory = llama_get_memory(dynamic.ctx);
    const bool recurrent = llama_model_is_recurrent(dynamic.model) || llama_model_is_hybrid(dynamic.model);
    const int n_window = llama_model_n_swa(dynamic.model);
    bool is_there = !recurrent && llama_memory_seq_rm(memory, 0, n_past, -1);
    is_there = is_there && llama_memory_seq_pos_max(memory, 0) == n_past - 1;
    if (is_there && n_past > 0 && n_window > 0) {
        is_there = llama_memory_seq_pos_min(memory, 0) <= std::max(0, n_past - n_window);
    }
    if (!is_there) {
        llama_memory_clear(llama_get_memory(stock.ctx), true);
        llama_memory_clear(llama_get_memory(dynamic.ctx), true);
        n_past = 0;
    }
    CHECK(llama_memory_seq_pos_max(memory, 0) == n_past - 1);
    return n_past;
}

// A state goes on where it was saved.
static void save_and_load(session & s) {
    std::vector<uint8_t> state(llama_state_seq_get_size(s.ctx, 0));
    CHECK(llama_state_seq_get_data(s.ctx, state.data(), state.size(), 0) == state.size());
    llama_memory_clear(llama_get_memory(s.ctx), true);
    CHECK(llama_state_seq_set_data(s.ctx, state.data(), state.size(), 0) == state.size());
}

int main(int argc, char ** argv) {
    CHECK(argc >= 4);
    const int n_steps = atoi(argv[2]);
    const bool repack = argc > 4 && atoi(argv[4]) != 0;
    const bool async = !(argc > 5 && atoi(argv[5]) != 0);

    std::mt19937 rng((unsigned) atoi(argv[3]));
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all();
    llama_backend_init();

    session stock = open_session(argv[1], false, repack, false);
    session dynamic = open_session(argv[1], true, repack, async);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(stock.model));

    const auto set_budget = [&](uint64_t bytes) { return superllama_set_budgets(dynamic.model, &bytes, nullptr); };

    // the least budget that works, as the library itself says it
    CHECK(set_budget(1) != 0);
    const std::string refusal = superllama_last_error();
    const double least = atof(refusal.c_str() + refusal.rfind("is ") + 3) * 1024 * 1024;
    CHECK(least > 0);
    const double most = least + 1.2 * (double) llama_model_size(stock.model);
    const auto some_budget = [&] { // small ones more often
        const double share = (double) rng() / (double) rng.max();
        return (uint64_t) (least + (0.02 + 0.98 * share * share) * (most - least));
    };
    using arm_faults = void (*)(int after, int count, int kind);
    const auto arm = (arm_faults) dlsym(RTLD_DEFAULT, "fault_arm"); // null: reads do not fail

    int n_moves = 0, n_cancelled = 0, n_failed = 0, n_loaded = 0, n_past = 0;
    for (int step = 0; step < n_steps; ++step) {
        if (rng() % 2 == 0) {
            CHECK(set_budget(some_budget()) == 0);
            n_moves++;
        }
        const int n_tokens = rng() % 8 == 0 ? 1 + (int) (rng() % 48) : 1;
        if (n_past + n_tokens > 500) {
            llama_memory_clear(llama_get_memory(stock.ctx), true);
            llama_memory_clear(llama_get_memory(dynamic.ctx), true);
            n_past = 0;
        }
        std::vector<llama_token> tokens;
        for (int i = 0; i < n_tokens; ++i) {
            tokens.push_back((llama_token) (rng() % (unsigned) n_vocab));
        }
        if (rng() % 4 == 0) {
            abort_after = (int) (rng() % 200);
            const int rc = decode(dynamic, tokens);
            abort_after = -1;
            CHECK(rc == 0 || rc == 2);
            n_cancelled += rc == 2 ? 1 : 0;
            n_past = go_back(stock, dynamic, n_past); // what it left behind goes, then the step is done
        }
        if (arm != nullptr && rng() % 4 == 0) {
            arm((int) (rng() % 4), 1 + (int) (rng() % 4), 0); // small models read little for a token
            n_failed += decode(dynamic, tokens) != 0 ? 1 : 0;
            arm(0, 0, 0);
            n_past = go_back(stock, dynamic, n_past);
        }
        if (n_past > 0 && rng() % 32 == 0) {
            save_and_load(dynamic);
            save_and_load(stock); // cells of a window are elsewhere afterwards, and sums in another order
            n_loaded++;
        }
        // a budget from another thread, in the middle of the decode
        std::thread other;
        if (rng() % 4 == 0) {
            const uint64_t budget = some_budget();
            other = std::thread([&set_budget, budget] { set_budget(budget); });
            n_moves++;
        }
        const int rc = decode(dynamic, tokens);
        if (rc != 0) {
            fprintf(stderr, "step %d: %d: %s\n", step, rc, superllama_last_error());
        }
        CHECK(rc == 0);
        if (other.joinable()) {
            other.join();
        }
        CHECK(decode(stock, tokens) == 0);
        n_past += n_tokens;

        const float * a = llama_get_logits_ith(stock.ctx, -1);
        const float * b = llama_get_logits_ith(dynamic.ctx, -1);
        if (memcmp(a, b, sizeof(float) * (size_t) n_vocab) != 0) {
            fprintf(stderr, "step %d: logits differ after %d tokens and %d more: %g, %g\n", step, n_past - n_tokens,
                    n_tokens, a[0], b[0]);
            return 1;
        }
        struct superllama_stats stats;
        CHECK(superllama_stats(dynamic.ctx, &stats) == 0);
        CHECK(stats.weight_bytes_resident <= stats.mem_budget_bytes || stats.mem_budget_bytes == 0);
    }

    CHECK(set_budget((uint64_t) most) == 0); // so that something stays
    CHECK(decode(dynamic, { 0 }) == 0);
    struct superllama_stats stats;
    CHECK(superllama_stats(dynamic.ctx, &stats) == 0);
    printf("{\"steps\":%d,\"budgets\":%d,\"cancelled\":%d,\"failed\":%d,\"states\":%d,\"loads\":%lld,"
           "\"evictions\":%lld,\"bytes_read\":%lld}\n",
           n_steps, n_moves, n_cancelled, n_failed, n_loaded, (long long) stats.layers_loaded,
           (long long) stats.layers_evicted, (long long) stats.weight_bytes_read);
    CHECK(stats.layers_evicted > n_steps / 4 && stats.layers_loaded > stats.layers_evicted);
    CHECK(stats.weight_bytes_read > 2 * (long long) llama_model_size(stock.model));

    for (session s : { stock, dynamic }) {
        llama_free(s.ctx);
        llama_model_free(s.model);
    }
    llama_backend_free();
    return 0;
}
