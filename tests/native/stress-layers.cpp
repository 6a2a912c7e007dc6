// Random budgets, evictions and cancellations while a model decodes: every logit must stay what it was.
//
//   stress-layers MODEL N_STEPS SEED [REPACK] [SYNC]
//
// The reference is the same model, loaded without superllama's features, in the same process.

#include "check.h"
#include "llama.h"
#include "superllama.h"

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

    // the least budget that works, as the library itself says it
    CHECK(superllama_set_budget(dynamic.model, 1) != 0);
    const std::string refusal = superllama_last_error();
    const double least = atof(refusal.c_str() + refusal.rfind("is ") + 3) * 1024 * 1024;
    CHECK(least > 0);
    const double most = least + 1.2 * (double) llama_model_size(stock.model);

    int n_moves = 0, n_cancelled = 0, n_past = 0;
    for (int step = 0; step < n_steps; ++step) {
        if (rng() % 2 == 0) {
            const double share = (double) rng() / (double) rng.max();
            const auto budget = (uint64_t) (least * 1.02 + share * share * (most - least));
            CHECK(superllama_set_budget(dynamic.model, budget) == 0);
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
            if (rc == 2) {
                n_cancelled++; // what it left behind goes, then the step is done again
                llama_memory_seq_rm(llama_get_memory(dynamic.ctx), 0, n_past, -1);
            } else {
                CHECK(rc == 0);
                llama_memory_seq_rm(llama_get_memory(dynamic.ctx), 0, n_past, -1);
            }
        }
        // a budget from another thread, in the middle of the decode
        std::thread other;
        if (rng() % 4 == 0) {
            const auto budget = (uint64_t) (least * 1.02 + (double) (rng() % 1000) / 1000 * (most - least));
            other = std::thread([&dynamic, budget] { superllama_set_budget(dynamic.model, budget); });
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
            fprintf(stderr, "step %d: logits differ\n", step);
            return 1;
        }
        struct superllama_stats stats;
        CHECK(superllama_stats(dynamic.ctx, &stats) == 0);
        CHECK(stats.weight_bytes_resident <= stats.mem_budget_bytes || stats.mem_budget_bytes == 0);
    }

    CHECK(superllama_set_budget(dynamic.model, (uint64_t) most) == 0); // so that something stays
    CHECK(decode(dynamic, { 0 }) == 0);
    struct superllama_stats stats;
    CHECK(superllama_stats(dynamic.ctx, &stats) == 0);
    printf("{\"steps\":%d,\"budgets\":%d,\"cancelled\":%d,\"loads\":%lld,\"evictions\":%lld,\"bytes_read\":%lld}\n",
           n_steps, n_moves, n_cancelled, (long long) stats.layers_loaded, (long long) stats.layers_evicted,
           (long long) stats.weight_bytes_read);
    CHECK(stats.layers_evicted > n_steps / 4 && stats.layers_loaded > stats.layers_evicted);
    CHECK(stats.weight_bytes_read > 2 * (long long) llama_model_size(stock.model));

    for (session s : { stock, dynamic }) {
        llama_free(s.ctx);
        llama_model_free(s.model);
    }
    llama_backend_free();
    return 0;
}
