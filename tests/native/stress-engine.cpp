// Many threads ask one engine: whole answers and streams, some cancelled, some never read, while the budget changes.
//
//   stress-engine MODEL REQUESTS [SEED] [BUDGET_MIB]
//
// Each request may say one word only, by its grammar, and has to get that one. Prints what was done; ends with 1 where
// an answer is another's, or an error is one that is not expected.

#include "log.h"
#include "superllama-engine.h"
#include "superllama.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

static std::atomic<int> n_whole{ 0 }, n_streams{ 0 }, n_cancelled{ 0 }, n_left{ 0 }, n_refused{ 0 }, n_wrong{ 0 };

static std::string all_of(superllama_request * request) {
    std::string answer;
    const char * data = nullptr;
    size_t size = 0;
    while (superllama_request_next(request, -1, &data, &size) == 1) {
        answer.append(data, size);
    }
    return answer;
}

// Returns false where the engine is paused: it is asked again.
static bool one(superllama_engine * engine, std::mt19937 & rng, int i) {
    const std::string word = "w" + std::to_string(i) + "x";
    const int kind = (int) (rng() % 4);
    const std::string form = kind < 2 ? "\"grammar\":\"root ::= \\\"" + word + "\\\"\""
                                      : std::string("\"ignore_eos\":true,\"n_predict\":200");
    std::string prompt(rng() % 200 + 1, 'a');
    const std::string body = "{\"prompt\":\"" + prompt + "\"," + form + (kind % 2 == 1 ? ",\"stream\":true}" : "}");
    superllama_request * request = superllama_engine_submit(engine, "POST", "/completion", body.data(), body.size());
    if (request == nullptr) {
        n_wrong++;
        fprintf(stderr, "%d: %s\n", i, superllama_engine_error());
        return true;
    }
    if (kind < 2) {
        const std::string answer = all_of(request);
        const int status = superllama_request_status(request);
        if (answer.find("is paused") != std::string::npos) {
            superllama_request_free(request);
            return false;
        }
        bool right = status == 200;
        if (kind == 0) {
            right = right && answer.find("\"content\":\"" + word + "\"") != std::string::npos;
        } else {
            right =
                right && answer.find("\"stop\":true") != std::string::npos && answer.find("error") == std::string::npos;
        }
        const bool refused = answer.find("context is full") != std::string::npos; // there is no room beside the others
        (refused ? n_refused : right ? (kind == 0 ? n_whole : n_streams) : n_wrong)++;
        if (!refused && !right) {
            fprintf(stderr, "%d: status %d, %.300s\n", i, status, answer.c_str());
        }
    } else if (kind == 2) {
        std::this_thread::sleep_for(std::chrono::milliseconds(rng() % 30));
        superllama_request_cancel(request);
        all_of(request);
        n_cancelled++;
    } else {
        n_left++; // freed while it runs
    }
    superllama_request_free(request);
    return true;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: stress-engine MODEL REQUESTS [SEED] [BUDGET_MIB]\n");
        return 2;
    }
    const int n_requests = atoi(argv[2]), n_threads = 8;
    const unsigned seed = argc > 3 ? (unsigned) atoi(argv[3]) : 1;
    const uint64_t budget = (uint64_t) (argc > 4 ? atoi(argv[4]) : 256) << 20;
    const std::string budget_text = std::to_string(budget);
    const char * arguments[] = {
        "--model", argv[1],        "--ctx-size",       "4096",         "--parallel",       "4", "--threads",
        "1",       "--kv-unified", "--async-prefetch", "--mem-budget", budget_text.c_str()
    };
    log_from(GGML_LOG_LEVEL_ERROR);
    superllama_engine * engine =
        superllama_engine_start(sizeof(arguments) / sizeof(arguments[0]), arguments, nullptr, nullptr);
    if (engine == nullptr) {
        fprintf(stderr, "%s\n", superllama_engine_error());
        return 1;
    }
    std::atomic<int> next{ 0 };
    std::atomic<bool> done{ false };
    std::vector<std::thread> threads;
    for (int t = 0; t < n_threads; t++) {
        threads.emplace_back([&, t] {
            std::mt19937 rng(seed * 1000 + (unsigned) t);
            for (int i; (i = next++) < n_requests;) {
                while (!one(engine, rng, i)) {
                    std::this_thread::sleep_for(std::chrono::milliseconds(20));
                }
            }
        });
    }
    std::thread budgets([&] {
        std::mt19937 rng(seed);
        while (!done) {
            const uint64_t bytes = budget - (rng() % 4) * (budget / 16);
            if (llama_context * ctx = superllama_engine_hold(engine)) {
                superllama_set_budgets(const_cast<llama_model *>(llama_get_model(ctx)), &bytes, nullptr);
                superllama_engine_release(engine);
            }
            if (rng() % 64 == 0) {
                for (const char * path : { "/superllama/pause", "/superllama/resume" }) {
                    superllama_request * request = superllama_engine_submit(engine, "POST", path, "{}", 2);
                    all_of(request);
                    superllama_request_free(request);
                }
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
    });
    for (auto & thread : threads) {
        thread.join();
    }
    done = true;
    budgets.join();
    superllama_engine_stop(engine);
    printf("{\"whole\":%d,\"streams\":%d,\"cancelled\":%d,\"left\":%d,\"refused\":%d,\"wrong\":%d}\n", n_whole.load(),
           n_streams.load(), n_cancelled.load(), n_left.load(), n_refused.load(), n_wrong.load());
    return n_wrong > 0 ? 1 : 0;
}
