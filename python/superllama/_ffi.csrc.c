// The C side of the binding: the headers, and what must run without Python.
#include "ggml.h"
#include "ggml-backend.h"
#include "gguf.h"
#include "superllama.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Installed when the interpreter goes away: the library may still log while it is unloaded.
static void superllama_py_log_nothing(enum ggml_log_level level, const char * text, void * user_data) {
    (void) level, (void) text, (void) user_data;
}

// What the abort callback of a context looks at.
struct superllama_py_abort {
    volatile int set;
    int          listens; // the computation was begun by the thread that hears Python's signals
    int64_t      next_us; // when it listens again
};

static int superllama_py_interrupted(void);

// The abort callback of every context, asked once per graph node: a Python function would wait for the
// interpreter's lock each time. Ten times a second one does, as Ctrl-C is heard nowhere else.
static bool superllama_py_abort_if_set(void * data) {
    struct superllama_py_abort * abort = data;
    if (!abort->set && abort->listens && ggml_time_us() >= abort->next_us) {
        if (superllama_py_interrupted()) {
            abort->set = 1;
        }
        abort->next_us = ggml_time_us() + 100000;
    }
    return abort->set != 0;
}

// The token that `chain` picks from `data`; its logit in *logit.
static llama_token superllama_py_pick(struct llama_sampler * chain, llama_token_data * data, size_t n, float * logit) {
    llama_token_data_array candidates = { data, n, -1, false };
    llama_sampler_apply(chain, &candidates);
    if (candidates.selected < 0 || (size_t) candidates.selected >= candidates.size) {
        return LLAMA_TOKEN_NULL;
    }
    *logit = candidates.data[candidates.selected].logit;
    return candidates.data[candidates.selected].id;
}

enum { SUPERLLAMA_PY_CONTRADICTION = -2 };

// Sample from output idx and accept the token. A grammar is asked about the chosen token first and applied
// to the whole vocabulary only if it refuses. LLAMA_TOKEN_NULL: no such output, no memory, or the grammar
// allows no token at all (accepting one nevertheless would abort the process). SUPERLLAMA_PY_CONTRADICTION: the grammar
// failed, superllama_last_error() says how.
static llama_token superllama_py_sample(
        struct llama_sampler * chain, struct llama_sampler * grammar, struct llama_context * ctx, int32_t idx) {
    const float * logits = llama_get_logits_ith(ctx, idx);
    if (!logits) {
        return LLAMA_TOKEN_NULL;
    }
    const int32_t      n    = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    llama_token_data * data = malloc(n * sizeof(*data));
    if (!data) {
        return LLAMA_TOKEN_NULL;
    }

    llama_token token = LLAMA_TOKEN_NULL;
    for (int constrained = 0; constrained <= (grammar != NULL) && token == LLAMA_TOKEN_NULL; constrained++) {
        for (int32_t i = 0; i < n; i++) {
            data[i] = (llama_token_data) { i, logits[i], 0.0f };
        }
        if (constrained) {
            llama_token_data_array all = { data, n, -1, false };
            if (superllama_sampler_apply(grammar, &all) != 0) {
                token = SUPERLLAMA_PY_CONTRADICTION;
                break;
            }
        }
        float logit = 0.0f;
        token = superllama_py_pick(chain, data, n, &logit);
        if (constrained && logit == -INFINITY) {
            token = LLAMA_TOKEN_NULL;
        }
        if (!constrained && grammar && token != LLAMA_TOKEN_NULL) {
            llama_token_data       one     = { token, 1.0f, 0.0f };
            llama_token_data_array allowed = { &one, 1, -1, false };
            if (superllama_sampler_apply(grammar, &allowed) != 0) {
                token = SUPERLLAMA_PY_CONTRADICTION;
            } else if (one.logit == -INFINITY) {
                token = LLAMA_TOKEN_NULL;
            }
        }
    }
    free(data);

    if (token >= 0) {
        llama_sampler_accept(chain, token);
        if (grammar && superllama_sampler_accept(grammar, token) != 0) {
            token = SUPERLLAMA_PY_CONTRADICTION;
        }
    }
    return token;
}

// The type that most bytes of the layers in a GGUF file have, from its header; GGML_TYPE_COUNT if there are none.
static enum ggml_type superllama_py_main_type(const char * path) {
    const struct gguf_init_params params = { true, NULL };
    struct gguf_context *         file   = gguf_init_from_file(path, params);
    enum ggml_type                main   = GGML_TYPE_COUNT;
    size_t                        bytes[GGML_TYPE_COUNT] = { 0 };
    for (int64_t i = 0; file && i < gguf_get_n_tensors(file); i++) {
        const enum ggml_type type = gguf_get_tensor_type(file, i);
        if (strncmp(gguf_get_tensor_name(file, i), "blk.", 4) == 0) {
            bytes[type] += gguf_get_tensor_size(file, i);
            if (main == GGML_TYPE_COUNT || bytes[type] > bytes[main]) {
                main = type;
            }
        }
    }
    gguf_free(file);
    return main;
}
