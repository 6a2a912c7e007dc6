// Which experts does a model really choose? Decodes token by token and prints, for every token and layer, the ids
// that the router took, as read from the running graph (ffn_moe_topk-<il>):
//
//     routing MODEL N_TOKENS N_THREADS [PROMPT]     ->  lines "token <tab> layer <tab> id,id,..."

#include "ggml-backend.h"
#include "../../tests/native/log.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static int current_token = 0;

static bool on_node(ggml_tensor * node, bool ask, void *) {
    const char prefix[] = "ffn_moe_topk-";
    if (strncmp(node->name, prefix, sizeof(prefix) - 1) != 0) {
        return !ask;
    }
    if (ask) {
        return true;
    }
    // a view of the sorted ids: (n_expert_used, n_tokens), rows n_expert apart
    std::vector<int32_t> ids((size_t) node->ne[0]);
    ggml_backend_tensor_get(node, ids.data(), (size_t) (node->ne[1] - 1) * node->nb[1], ids.size() * sizeof(int32_t));
    printf("%d\t%s\t", current_token, node->name + sizeof(prefix) - 1);
    for (size_t i = 0; i < ids.size(); ++i) {
        printf("%s%d", i ? "," : "", ids[i]);
    }
    printf("\n");
    return true;
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: routing MODEL N_TOKENS N_THREADS [PROMPT]\n");
        return 2;
    }
    const int n_tokens = atoi(argv[2]);
    const std::string prompt = argc > 4 ? argv[4] : "The capital of France is";

    log_from(GGML_LOG_LEVEL_ERROR);
    ggml_backend_load_all();
    llama_backend_init();

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    mparams.use_extra_bufts = false;
    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    if (model == nullptr) {
        fprintf(stderr, "routing: cannot load %s\n", argv[1]);
        return 1;
    }
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = (uint32_t) n_tokens + 512;
    cparams.n_threads = cparams.n_threads_batch = atoi(argv[3]);
    cparams.cb_eval = on_node;
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (ctx == nullptr) {
        fprintf(stderr, "routing: cannot make a context\n");
        return 1;
    }

    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(prompt.size() + 8);
    tokens.resize((size_t) std::max(0, llama_tokenize(vocab, prompt.c_str(), (int) prompt.size(), tokens.data(),
                                                      (int) tokens.size(), true, true)));
    if (tokens.empty()) {
        tokens.push_back(0);
    }
    for (current_token = 0; current_token < n_tokens; ++current_token) {
        if (llama_decode(ctx, llama_batch_get_one(&tokens[(size_t) current_token], 1)) != 0) {
            fprintf(stderr, "routing: decode failed at token %d\n", current_token);
            return 1;
        }
        if ((size_t) current_token + 1 == tokens.size()) { // past the prompt: greedy
            const float * logits = llama_get_logits_ith(ctx, -1);
            llama_token best = 0;
            for (llama_token t = 1; t < llama_vocab_n_tokens(vocab); ++t) {
                best = logits[t] > logits[best] ? t : best;
            }
            tokens.push_back(best);
        }
    }
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
