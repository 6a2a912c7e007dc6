// A budget that is raised in the middle of a graph: it counts for what that graph reads from then on, and what is in
// memory stays under it at every node. And one that goes up and down all the time: the graph waits for room meanwhile.
//
//   grow-in-graph MODEL REPACK DECODES

#include "check.h"
#include "llama.h"
#include "superllama.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

static std::function<void()> at_node; // of the graph that runs, in the thread that computes it

static bool on_node(void *) {
    if (at_node) {
        at_node();
    }
    return false;
}

int main(int argc, char ** argv) {
    CHECK(argc == 4);
    const int n_decodes = atoi(argv[3]);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all();
    llama_backend_init();

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    mparams.use_extra_bufts = atoi(argv[2]) != 0;
    mparams.superllama.dynamic_layers = true;
    mparams.superllama.async_prefetch = true;
    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    CHECK(model != nullptr);
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = 256;
    cparams.n_batch = cparams.n_ubatch = 32;
    cparams.n_outputs_max = 1;
    cparams.n_threads = cparams.n_threads_batch = 2;
    cparams.abort_callback = on_node;
    llama_context * ctx = llama_init_from_model(model, cparams);
    CHECK(ctx != nullptr);
    const auto n_vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(model));

    const auto decode = [&] {
        llama_memory_clear(llama_get_memory(ctx), true);
        llama_token token = 42;
        CHECK(llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0);
        const float * logits = llama_get_logits_ith(ctx, -1);
        return std::vector<float>(logits, logits + n_vocab);
    };
    const auto bytes_read = [&] { // once no read is on its way
        struct superllama_stats stats;
        do {
            CHECK(superllama_stats(ctx, &stats) == 0);
            std::this_thread::yield();
        } while (stats.prefetch_pending > 0);
        return stats.weight_bytes_read;
    };
    const auto set_budget = [&](uint64_t bytes) { CHECK(superllama_set_budgets(model, &bytes, nullptr) == 0); };

    uint64_t least = 0, full = 0;
    const std::vector<float> expected = decode();
    CHECK(superllama_budget_range(model, &least, &full) == 0);
    CHECK(least < full);
    full += 32u << 20; // rows of the embedding

    set_budget(least);
    decode();
    int64_t before = bytes_read();
    int n_nodes = 0;
    at_node = [&] { ++n_nodes; };
    decode();
    const int64_t of_a_pass = bytes_read() - before;
    CHECK(of_a_pass > 0 && n_nodes > 50);

    // to several sizes, at several nodes
    int64_t with_more = 0;
    for (const uint64_t budget : { full, least + (full - least) / 2, least + (full - least) / 8 }) {
        for (const int node : { 1, n_nodes / 3, n_nodes - 10 }) {
            at_node = nullptr;
            set_budget(least);
            decode();
            before = bytes_read();
            int n = 0;
            at_node = [&] {
                if (++n == node) {
                    std::thread([&] { set_budget(budget); }).join();
                }
                int64_t by_tag[SUPERLLAMA_N_MEMORY_TAGS] = {}, sum = 0;
                superllama_memory_by_tag(model, by_tag);
                for (const int64_t bytes : by_tag) {
                    sum += bytes;
                }
                CHECK(sum <= (int64_t) (n < node ? least : budget));
            };
            CHECK(decode() == expected);
            CHECK(decode() == expected);
            if (budget == full && node == 1) {
                with_more = bytes_read() - before;
            }
        }
    }
    printf("{\"read_of_a_pass\":%lld,\"read_with_more\":%lld}\n", (long long) of_a_pass, (long long) with_more);

    at_node = nullptr;
    std::atomic<bool> decoding{ true };
    std::thread other([&] {
        for (int i = 0; decoding; ++i) {
            set_budget(i % 3 == 0 ? full : least + (full - least) / 8 * (i % 2));
            std::this_thread::sleep_for(std::chrono::microseconds(i * 7919 % 2000));
        }
    });
    for (int i = 0; i < n_decodes; ++i) {
        CHECK(decode() == expected);
    }
    decoding = false;
    other.join();
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
