// What came of the metadata: hyperparameters and vocabulary as the architecture has read them, with its defaults.
// A graph is made of these later, where a contradiction would be an assertion, or a kernel that reads beyond a row.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

#include "llama-model.h"

#include <algorithm>
#include <string>

namespace superllama {

namespace {

// Graphs that suppose keys and values of one size: they assert n_embd_head_k == n_embd_head_v.
const llm_arch equal_heads[] = {
    LLM_ARCH_AFMOE,         LLM_ARCH_APERTUS,        LLM_ARCH_ARCEE,      LLM_ARCH_ARCTIC,
    LLM_ARCH_BAICHUAN,      LLM_ARCH_BAILINGMOE2,    LLM_ARCH_BERT,       LLM_ARCH_BITNET,
    LLM_ARCH_BLOOM,         LLM_ARCH_CHAMELEON,      LLM_ARCH_CHATGLM,    LLM_ARCH_CLEF,
    LLM_ARCH_CODESHELL,     LLM_ARCH_COGVLM,         LLM_ARCH_COHERE2,    LLM_ARCH_COHERE2MOE,
    LLM_ARCH_COMMAND_R,     LLM_ARCH_DBRX,           LLM_ARCH_DECI,       LLM_ARCH_DEEPSEEK,
    LLM_ARCH_DOTS1,         LLM_ARCH_DREAM,          LLM_ARCH_EAGLE3,     LLM_ARCH_ERNIE4_5,
    LLM_ARCH_ERNIE4_5_MOE,  LLM_ARCH_EUROBERT,       LLM_ARCH_EXAONE,     LLM_ARCH_EXAONE4,
    LLM_ARCH_EXAONE_MOE,    LLM_ARCH_FALCON,         LLM_ARCH_GLM4,       LLM_ARCH_GLM4_MOE,
    LLM_ARCH_GPT2,          LLM_ARCH_GPTNEOX,        LLM_ARCH_GRANITE,    LLM_ARCH_GRANITE_HYBRID,
    LLM_ARCH_GRANITE_SWA,   LLM_ARCH_GRANITE_SWITCH, LLM_ARCH_GROK,       LLM_ARCH_GROVEMOE,
    LLM_ARCH_HUNYUAN_DENSE, LLM_ARCH_HUNYUAN_MOE,    LLM_ARCH_HUNYUAN_VL, LLM_ARCH_HY_V3,
    LLM_ARCH_INTERNLM2,     LLM_ARCH_JAIS,           LLM_ARCH_JAIS2,      LLM_ARCH_K2_HORIZON,
    LLM_ARCH_LAGUNA,        LLM_ARCH_LLADA,          LLM_ARCH_LLADA_MOE,  LLM_ARCH_LLAMA,
    LLM_ARCH_LLAMA4,        LLM_ARCH_LLAMA_EMBED,    LLM_ARCH_MAINCODER,  LLM_ARCH_MAPLE,
    LLM_ARCH_MELLUM,        LLM_ARCH_MINIMAX_01,     LLM_ARCH_MINIMAX_M2, LLM_ARCH_MINIMAX_M3,
    LLM_ARCH_MISTRAL3,      LLM_ARCH_MODERN_BERT,    LLM_ARCH_MPT,        LLM_ARCH_MUSE_GLIMMER,
    LLM_ARCH_NANBEIGE,      LLM_ARCH_NEMOTRON,       LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE,
    LLM_ARCH_NEO_BERT,      LLM_ARCH_OLMO,           LLM_ARCH_OLMO2,      LLM_ARCH_OLMOE,
    LLM_ARCH_OPENELM,       LLM_ARCH_ORION,          LLM_ARCH_PADDLEOCR,  LLM_ARCH_PANGU_EMBED,
    LLM_ARCH_PHI2,          LLM_ARCH_PHI3,           LLM_ARCH_PLAMO,      LLM_ARCH_POCKETTTS,
    LLM_ARCH_QWEN,          LLM_ARCH_QWEN2,          LLM_ARCH_QWEN2MOE,   LLM_ARCH_QWEN2VL,
    LLM_ARCH_QWEN3,         LLM_ARCH_QWEN35,         LLM_ARCH_QWEN35MOE,  LLM_ARCH_QWEN3MOE,
    LLM_ARCH_QWEN3VL,       LLM_ARCH_QWEN3VLMOE,     LLM_ARCH_REFACT,     LLM_ARCH_RND1,
    LLM_ARCH_SEED_OSS,      LLM_ARCH_SMALLTHINKER,   LLM_ARCH_SMOLLM3,    LLM_ARCH_SPARK2_5,
    LLM_ARCH_STABLELM,      LLM_ARCH_STARCODER,      LLM_ARCH_STARCODER2, LLM_ARCH_T5,
    LLM_ARCH_TALKIE,        LLM_ARCH_XVERSE,
};

// Graphs that rotate all of a head: they assert n_embd_head == n_rot.
const llm_arch full_rotation[] = {
    LLM_ARCH_APERTUS,      LLM_ARCH_ARCEE,          LLM_ARCH_ARCTIC,     LLM_ARCH_BAICHUAN,    LLM_ARCH_CHAMELEON,
    LLM_ARCH_CODESHELL,    LLM_ARCH_COGVLM,         LLM_ARCH_COHERE2MOE, LLM_ARCH_DBRX,        LLM_ARCH_DECI,
    LLM_ARCH_DEEPSEEK,     LLM_ARCH_DOTS1,          LLM_ARCH_DREAM,      LLM_ARCH_ERNIE4_5,    LLM_ARCH_ERNIE4_5_MOE,
    LLM_ARCH_EXAONE,       LLM_ARCH_EXAONE4,        LLM_ARCH_EXAONE_MOE, LLM_ARCH_FALCON,      LLM_ARCH_GRANITE,
    LLM_ARCH_GRANITE_SWA,  LLM_ARCH_GRANITE_SWITCH, LLM_ARCH_GROK,       LLM_ARCH_GROVEMOE,    LLM_ARCH_HUNYUAN_DENSE,
    LLM_ARCH_HUNYUAN_MOE,  LLM_ARCH_HUNYUAN_VL,     LLM_ARCH_HY_V3,      LLM_ARCH_INTERNLM2,   LLM_ARCH_JAIS2,
    LLM_ARCH_LLADA,        LLM_ARCH_LLADA_MOE,      LLM_ARCH_LLAMA,      LLM_ARCH_LLAMA4,      LLM_ARCH_LLAMA_EMBED,
    LLM_ARCH_MAINCODER,    LLM_ARCH_MELLUM,         LLM_ARCH_MISTRAL3,   LLM_ARCH_OLMO,        LLM_ARCH_OLMO2,
    LLM_ARCH_OLMOE,        LLM_ARCH_ORION,          LLM_ARCH_PADDLEOCR,  LLM_ARCH_PANGU_EMBED, LLM_ARCH_PLAMO,
    LLM_ARCH_POCKETTTS,    LLM_ARCH_QWEN2,          LLM_ARCH_QWEN2MOE,   LLM_ARCH_QWEN2VL,     LLM_ARCH_QWEN3,
    LLM_ARCH_QWEN3MOE,     LLM_ARCH_QWEN3VL,        LLM_ARCH_QWEN3VLMOE, LLM_ARCH_RND1,        LLM_ARCH_SEED_OSS,
    LLM_ARCH_SMALLTHINKER, LLM_ARCH_SMOLLM3,        LLM_ARCH_STARCODER2, LLM_ARCH_TALKIE,      LLM_ARCH_XVERSE,
};

template <size_t N>
bool contains(const llm_arch (&list)[N], llm_arch arch) {
    return std::find(std::begin(list), std::end(list), arch) != std::end(list);
}

std::string in_layer(uint32_t il) {
    return " in layer " + std::to_string(il);
}

void check_heads(const llama_model & model) {
    const llama_hparams & h = model.hparams;
    const std::string arch = std::string(llm_arch_name(model.arch)) + ".";
    const bool rotates = h.rope_type != LLAMA_ROPE_TYPE_NONE;
    bool any_rotated = false;

    for (uint32_t il = 0; il < h.n_layer_all; ++il) {
        const uint32_t n_head = h.n_head(il), n_head_kv = h.n_head_kv(il);
        if (n_head == 0 || n_head_kv == 0 || llm_arch_is_recurrent(model.arch)) {
            continue; // no attention
        }
        const uint32_t k = h.n_embd_head_k(il), v = h.n_embd_head_v(il), rot = h.n_rot(il);
        if (k == 0 || v == 0) {
            refuse(arch + "attention.key_length is " + std::to_string(k) + ", value_length " + std::to_string(v) +
                       in_layer(il),
                   "at least 1 is needed");
        }
        if ((uint64_t) std::max(k, v) * std::max(n_head, n_head_kv) > 1u << 26) {
            refuse("heads have " + std::to_string(std::max(k, v)) + " numbers each, there are " +
                       std::to_string(std::max(n_head, n_head_kv)) + in_layer(il),
                   "up to 2^26 together are allowed");
        }
        const bool may_be_none = model.arch == LLM_ARCH_GLM5_NEXT || !h.has_rope(il);
        if (rotates && (rot > k || rot % 2 != 0 || (rot == 0 && !may_be_none))) {
            refuse(arch + "rope.dimension_count is " + std::to_string(rot) + in_layer(il),
                   "an even number from 2 to the size of a key, " + std::to_string(k) + ", is expected");
        }
        any_rotated |= rotates && rot > 0;
    }
    const uint32_t k = h.n_embd_head_k(), v = h.n_embd_head_v();
    if (contains(equal_heads, model.arch) && k != v) {
        refuse(arch + "attention.key_length is " + std::to_string(k),
               "value_length is " + std::to_string(v) + ", this architecture needs the same");
    }
    if (contains(full_rotation, model.arch) && h.n_rot() != v) {
        refuse(arch + "rope.dimension_count is " + std::to_string(h.n_rot()),
               "this architecture rotates whole heads, of " + std::to_string(v));
    }
    if (any_rotated && !(h.rope_freq_base_train > 0.0f)) {
        refuse(arch + "rope.freq_base is 0", "a number above 0 is needed");
    }
    if (any_rotated && h.is_swa_any() && !(h.rope_freq_base_train_swa > 0.0f)) {
        refuse(arch + "rope.freq_base_swa is 0", "a number above 0 is needed");
    }
    if (any_rotated && (h.rope_type == LLAMA_ROPE_TYPE_MROPE || h.rope_type == LLAMA_ROPE_TYPE_IMROPE)) {
        int64_t sum = 0;
        for (const int section : h.rope_sections) {
            sum += section;
        }
        const bool known = h.rope_sections[0] > 0 || h.rope_sections[1] > 0 || h.rope_sections[2] > 0;
        if (!known || sum > h.n_rot()) {
            refuse(arch + "rope.dimension_sections add up to " + std::to_string(sum),
                   "1 to rope.dimension_count, " + std::to_string(h.n_rot()) + ", are allowed");
        }
    }
}

void check_window(const llama_model & model) {
    const llama_hparams & h = model.hparams;
    if (h.swa_type != LLAMA_SWA_TYPE_NONE && h.is_swa_any() && h.n_swa == 0) {
        refuse(std::string(llm_arch_name(model.arch)) + ".attention.sliding_window is 0",
               "at least 1 is needed, as layers have one");
    }
}

// One row of the state of a recurrent layer, of all layers together at most 16 GiB of it.
void check_states(const llama_model & model) {
    const llama_hparams & h = model.hparams;
    bool any = false;
    for (uint32_t il = 0; il < h.n_layer_all; ++il) {
        any |= h.is_recr(il);
    }
    if (any && (h.n_embd_r() > 1u << 30 || h.n_embd_s() > 1u << 30)) {
        refuse("a recurrent layer has " + std::to_string(h.n_embd_r()) + " and " + std::to_string(h.n_embd_s()) +
                   " numbers of state",
               "up to 2^30 are allowed");
    }
}

// Tokens that are added to every text have to exist: the tokenizer asserts it, when the first text comes.
void check_vocab(const llama_vocab & vocab) {
    if (vocab.get_type() == LLAMA_VOCAB_TYPE_NONE || vocab.get_type() == LLAMA_VOCAB_TYPE_TEST) {
        return;
    }
    const struct {
        bool added;
        llama_token token;
        const char * name;
    } rules[] = {
        { vocab.get_add_bos(), vocab.token_bos(), "bos" },
        { vocab.get_add_eos(), vocab.token_eos(), "eos" },
        { vocab.get_type() == LLAMA_VOCAB_TYPE_WPM, vocab.token_sep(), "seperator" },
    };
    for (const auto & rule : rules) {
        if (rule.added && rule.token == LLAMA_TOKEN_NULL) {
            const std::string key = std::string("tokenizer.ggml.add_") + rule.name + "_token";
            refuse("the tokenizer adds a " + std::string(rule.name) + " token and the vocabulary has none",
                   std::string("tokenizer.ggml.") + rule.name + "_token_id is missing or out of range",
                   "try --override-kv " + key + "=bool:false");
        }
    }
}

} // namespace

void check_model(const llama_model & model, const llama_model_loader & ml) {
    check_vocab(model.vocab);
    if (model.hparams.vocab_only) {
        return;
    }
    check_heads(model);
    check_window(model);
    check_states(model);
    check_needs(model, ml);
}

} // namespace superllama
