// One program over two libraries: built against ours (with our flags) and against unpatched llama.cpp.
// Decodes a prompt, then greedily; prints one JSON object with the tokens, a hash over all logits, and times.
// Tests compare the hashes, benchmarks the times. With `--turns 1` it does so once for every line on its standard
// input, so that two programs can take turns.

#include "llama.h"
#include "log.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifdef SUPERLLAMA
#    include "common.h"
#    include "api/flags.h"
#    include "superllama.h"
#endif

struct options {
    std::string model;
    std::string prompt = "The capital of France is";
    int n_prompt = 0; // > 0: that many tokens made from a counter instead of the text
    int n_gen = 16;
    int threads = 2;
    int n_ctx = 1024;
    int n_ubatch = 512;
    int repack = 1;
    int fa = -1;
    const char * type_k = "f16";
    std::string load = "auto";
    int again = 0; // 1: the prompt a second time, now that everything was touched once
    int turns = 0;
    int n_gpu_layers = 0;
    std::vector<std::string> servers; // RPC, "HOST:PORT"
    std::vector<float> split;
};

static double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static uint64_t fnv1a(uint64_t hash, const void * data, size_t size) {
    const unsigned char * p = (const unsigned char *) data;
    // eight bytes a step: the hash must not cost more than the decoding
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        hash = (hash ^ word) * 0x100000001b3ull;
    }
    for (; size > 0; --size, ++p) {
        hash = (hash ^ *p) * 0x100000001b3ull;
    }
    return hash;
}

static options parse(int argc, char ** argv) {
    options o;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i];
        const char * value = argv[i + 1];
        if (name == "-m") {
            o.model = value;
        } else if (name == "-p") {
            o.prompt = value;
        } else if (name == "--n-prompt") {
            o.n_prompt = atoi(value);
        } else if (name == "-n") {
            o.n_gen = atoi(value);
        } else if (name == "-t") {
            o.threads = atoi(value);
        } else if (name == "-c") {
            o.n_ctx = atoi(value);
        } else if (name == "-ub") {
            o.n_ubatch = atoi(value);
        } else if (name == "--repack") {
            o.repack = atoi(value);
        } else if (name == "-fa") {
            o.fa = atoi(value);
        } else if (name == "-ctk") {
            o.type_k = value;
        } else if (name == "-lm") {
            o.load = value;
        } else if (name == "--again") {
            o.again = atoi(value);
        } else if (name == "--turns") {
            o.turns = atoi(value);
        } else if (name == "-ngl") {
            o.n_gpu_layers = atoi(value);
        } else if (name == "--rpc") {
            o.servers.push_back(value);
        } else if (name == "-ts") {
            o.split.push_back((float) atof(value));
        } else {
            fprintf(stderr, "probe: unknown option %s\n", name.c_str());
            exit(2);
        }
    }
    return o;
}

static void run(const options & o, llama_context * ctx, double load_s) {
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
    const int n_vocab = llama_vocab_n_tokens(vocab);

    std::vector<llama_token> tokens;
    if (o.n_prompt == 0) {
        tokens.resize(o.prompt.size() + 8);
        tokens.resize((size_t) std::max(0, llama_tokenize(vocab, o.prompt.c_str(), (int) o.prompt.size(), tokens.data(),
                                                          (int) tokens.size(), true, true)));
    }
    if (o.n_prompt > 0) {
        tokens.resize((size_t) o.n_prompt);
        for (int i = 0; i < o.n_prompt; ++i) {
            tokens[(size_t) i] = (llama_token) ((i * 7919ll + 13) % n_vocab);
        }
    }

    uint64_t hash = 0xcbf29ce484222325ull;
    std::vector<llama_token> generated;
    const auto decode = [&](std::vector<llama_token> & batch) {
        if (llama_decode(ctx, llama_batch_get_one(batch.data(), (int) batch.size())) != 0) {
            fprintf(stderr, "probe: decode failed\n");
            exit(1);
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        hash = fnv1a(hash, logits, sizeof(float) * (size_t) n_vocab);
        llama_token best = 0;
        for (llama_token t = 1; t < n_vocab; ++t) {
            best = logits[t] > logits[best] ? t : best;
        }
        return best;
    };

    const double t_start = now_s();
    llama_token next = decode(tokens);
    const double t_first = now_s();
    if (o.again != 0) {
        llama_memory_clear(llama_get_memory(ctx), true);
        next = decode(tokens);
    }
    const double t_prompt = now_s();
    for (int i = 0; i < o.n_gen; ++i) {
        generated.push_back(next);
        std::vector<llama_token> one = { next };
        next = decode(one);
    }
    const double t_end = now_s();

    printf("{\"hash\":\"%016llx\",\"tokens\":[", (unsigned long long) hash);
    for (size_t i = 0; i < generated.size(); ++i) {
        printf("%s%d", i ? "," : "", generated[i]);
    }
    printf("],\"n_prompt\":%zu,\"load_s\":%.4f,\"prompt_s\":%.4f,\"decode_s\":%.4f", tokens.size(), load_s,
           t_first - t_start, t_end - t_prompt);
    if (o.again != 0) {
        printf(",\"prompt_again_s\":%.4f", t_prompt - t_first);
    }
#ifdef SUPERLLAMA
    char stats[4096];
    if (superllama_metrics_json(ctx, stats, sizeof(stats)) < (int) sizeof(stats)) {
        printf(",\"metrics\":%s", stats);
    }
#endif
    printf("}\n");
    fflush(stdout);
}

int main(int argc, char ** argv) {
#ifdef SUPERLLAMA
    superllama::flags args;
    argc = superllama::take_flags(argc, argv, args);
#endif
    const options o = parse(argc, argv);

    log_from(GGML_LOG_LEVEL_WARN);
    ggml_backend_load_all();
    for (const std::string & server : o.servers) {
        using add_server = ggml_backend_reg_t (*)(const char *);
        ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
        ggml_backend_register(
            ((add_server) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"))(server.c_str()));
    }
    llama_backend_init();

    const double t_start = now_s();

    llama_model_params mparams = llama_model_default_params();
    mparams.use_extra_bufts = o.repack != 0;
    mparams.n_gpu_layers = o.n_gpu_layers;
    std::vector<float> split = o.split;
    split.resize(llama_max_devices());
    mparams.tensor_split = o.split.empty() ? nullptr : split.data();
    mparams.load_mode = o.load == "mmap"   ? LLAMA_LOAD_MODE_MMAP
                        : o.load == "none" ? LLAMA_LOAD_MODE_NONE
                        : o.load == "dio"  ? LLAMA_LOAD_MODE_DIRECT_IO
                                           : LLAMA_LOAD_MODE_AUTO;
#ifdef SUPERLLAMA
    args.apply(mparams);
#endif
    llama_model * model = llama_model_load_from_file(o.model.c_str(), mparams);
    if (model == nullptr) {
        return 1;
    }
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = (uint32_t) o.n_ctx;
    cparams.n_batch = (uint32_t) o.n_ctx;
    cparams.n_ubatch = (uint32_t) o.n_ubatch;
    cparams.n_outputs_max = 1;
    cparams.n_threads = o.threads;
    cparams.n_threads_batch = o.threads;
    cparams.flash_attn_type = (llama_flash_attn_type) o.fa;
    cparams.type_k = cparams.type_v = strcmp(o.type_k, "q8_0") == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
#ifdef SUPERLLAMA
    args.apply(cparams);
#endif
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (ctx == nullptr) {
        return 1;
    }
    const double t_loaded = now_s();

    if (o.turns == 0) {
        run(o, ctx, t_loaded - t_start);
    }
    while (o.turns != 0 && getchar() != EOF) {
        llama_memory_clear(llama_get_memory(ctx), true);
        run(o, ctx, t_loaded - t_start);
    }

    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
