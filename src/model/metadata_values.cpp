// What single keys of a model file may hold: a table of suffix, range, and whether there is a value for each layer.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

#include "llama-hparams.h"

#include <cmath>
#include <locale>
#include <sstream>
#include <vector>

namespace superllama {

// Sizes that no model has, which a graph or a cache would be made for: 2^20 numbers in a row, 2^27 tokens.
static const int64_t size_max = 1 << 20;
static const int64_t tokens_max = 1 << 27;

enum integer_kind {
    anywhere,  // checked where it is a number; what else it is, is said by the architecture that reads it
    always,    // every architecture reads it as an unsigned 32-bit integer
    per_layer, // likewise, or as an array of one for each layer
};

struct integer_rule {
    const char * suffix;
    int64_t min, max;
    integer_kind kind = anywhere;
};

static const integer_rule integer_rules[] = {
    { "context_length", 1, tokens_max, always },
    { "embedding_length", 1, size_max, always },
    { "embedding_length_out", 0, size_max, always },
    { "features_length", 0, size_max },
    { "embedding_length_per_layer_input", 0, size_max },
    { "block_count", 1, LLAMA_MAX_LAYERS, always },
    { "vocab_size", 0, 1 << 24 },
    { "nextn_predict_layers", 0, LLAMA_MAX_LAYERS, always },
    { "decoder_block_count", 0, LLAMA_MAX_LAYERS },
    { "posnet.block_count", 0, LLAMA_MAX_LAYERS },
    { "convnext.block_count", 0, LLAMA_MAX_LAYERS },
    { "posnet.embedding_length", 0, size_max },
    { "convnext.embedding_length", 0, size_max },
    { "decision.block_count", 0, LLAMA_MAX_LAYERS },
    { "decision.routing_block_count", 0, LLAMA_MAX_LAYERS },
    { "decision.head_count", 0, size_max },
    { "n_deepstack_layers", 0, LLAMA_MAX_LAYERS },
    { "hash_layer_count", 0, LLAMA_MAX_LAYERS },
    { "num_loops", 0, LLAMA_MAX_LAYERS },
    { "hrm.layers_per_stack", 0, LLAMA_MAX_LAYERS },
    { "hrm.h_cycles", 0, LLAMA_MAX_LAYERS },
    { "hrm.l_cycles", 0, LLAMA_MAX_LAYERS },
    { "attention.shared_kv_layers", 0, LLAMA_MAX_LAYERS },

    { "feed_forward_length", 0, size_max, per_layer },
    { "expert_feed_forward_length", 0, size_max },
    { "expert_shared_feed_forward_length", 0, size_max },
    { "expert_chunk_feed_forward_length", 0, size_max },
    { "expert_count", 0, LLAMA_MAX_EXPERTS, always },
    { "expert_used_count", 0, LLAMA_MAX_EXPERTS, per_layer },
    { "expert_shared_count", 0, LLAMA_MAX_EXPERTS },
    { "expert_group_count", 0, LLAMA_MAX_EXPERTS, always },
    { "expert_group_used_count", 0, LLAMA_MAX_EXPERTS, always },
    { "expert_gating_func", 0, LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS },
    { "experts_per_group", 0, LLAMA_MAX_EXPERTS },
    { "expert_latent_length", 0, size_max },
    { "moe_latent_size", 0, size_max },
    { "attention.value_expert_count", 0, LLAMA_MAX_EXPERTS },
    { "attention.value_expert_used_count", 0, LLAMA_MAX_EXPERTS },

    { "attention.head_count", 0, 1 << 16, per_layer },
    { "attention.head_count_kv", 0, 1 << 16, per_layer },
    { "attention.key_length", 0, 1 << 16, always },
    { "attention.value_length", 0, 1 << 16, always },
    { "attention.key_length_swa", 0, 1 << 16, always },
    { "attention.value_length_swa", 0, 1 << 16, always },
    { "attention.key_length_mla", 0, 1 << 16 },
    { "attention.value_length_mla", 0, 1 << 16 },
    { "attention.key_length_mla_swa", 0, 1 << 16 },
    { "attention.value_length_mla_swa", 0, 1 << 16 },
    { "attention.q_lora_rank", 0, size_max },
    { "attention.kv_lora_rank", 0, size_max },
    { "attention.kv_lora_rank_swa", 0, size_max },
    { "attention.output_group_count", 0, 1 << 16 },
    { "attention.output_lora_rank", 0, size_max },
    { "attention.relative_buckets_count", 0, 1 << 16 },
    { "attention.sliding_window", 0, tokens_max },
    { "attention.temperature_length", 0, tokens_max },
    { "attention.group_norm_groups", 0, size_max },
    { "attention.indexer.head_count", 0, 1 << 16 },
    { "attention.indexer.key_length", 0, 1 << 16 },
    { "attention.indexer.top_k", 0, tokens_max },
    { "attention.indexer.block_size", 0, tokens_max },
    { "attention.indexer.local_blocks", 0, tokens_max },
    { "attention.indexer.kpool", 0, tokens_max },
    { "attention.compress_ratios", 0, tokens_max },

    { "full_attention_interval", 0, LLAMA_MAX_LAYERS },
    { "interleave_moe_layer_step", 0, LLAMA_MAX_LAYERS },
    { "hyper_connection.count", 0, 64 },
    { "hyper_connection.sinkhorn_iterations", 0, 1024 }, // each one is nodes of the graph
    { "hyper_connection.low_rank", 0, size_max },
    { "attn_res.block_size", 0, LLAMA_MAX_LAYERS },
    { "ple.ngram_size", 0, LLAMA_MAX_PLE_NGRAM },
    { "ple.heads_per_ngram", 0, LLAMA_MAX_PLE_HEADS },
    { "ple.conv_kernel", 0, 1 << 16 },
    { "ple.head_vocab_sizes", 0, INT64_MAX },

    { "rope.dimension_count", 0, 1 << 16, always },
    { "rope.dimension_count_swa", 0, 1 << 16, always },
    { "rope.dimension_sections", 0, 1 << 16 },
    { "rope.scaling.original_context_length", 0, INT32_MAX, always },

    { "ssm.conv_kernel", 0, 1 << 16 },
    { "ssm.inner_size", 0, size_max },
    { "ssm.state_size", 0, 1 << 16 },
    { "ssm.time_step_rank", 0, size_max },
    { "ssm.group_count", 0, 1 << 16 },
    { "kda.head_dim", 0, 1 << 16 },
    { "wkv.head_size", 0, 1 << 16 },
    { "token_shift_count", 0, 2 },
    { "time_mix_extra_dim", 0, size_max },
    { "time_decay_extra_dim", 0, size_max },
    { "rescale_every_n_layers", 0, INT32_MAX },
    { "shortconv.l_cache", 0, 1 << 16 },

    { "dense_2_feat_in", 0, size_max },
    { "dense_2_feat_out", 0, size_max },
    { "dense_3_feat_in", 0, size_max },
    { "dense_3_feat_out", 0, size_max },
    { "target_hidden_size", 0, size_max },
    { "block_size", 0, tokens_max },
    { "conv_kernel_size", 0, 1 << 16 },
    { "conv_group_size", 0, size_max },
    { "selector_rank", 0, size_max },
    { "selector_top_k", 0, tokens_max },
};

struct real_rule {
    const char * suffix;
    double min, max;
};

static const double scale_max = 1e9; // of factors: larger ones leave no number in a graph

static const real_rule real_rules[] = {
    { "attention.layer_norm_epsilon", 0, 1 },
    { "attention.layer_norm_rms_epsilon", 0, 1 },
    { "attention.group_norm_epsilon", 0, 1 },
    { "hyper_connection.epsilon", 0, 1 },
    { "rope.freq_base", 0, 1e18 }, // 0 where nothing is rotated
    { "rope.freq_base_swa", 0, 1e18 },
    { "attention.compress_rope_freq_base", 0, 1e18 },
    { "rope.scaling.factor", 0, scale_max }, // 0 says that there is none
    { "rope.scale_linear", 0, scale_max },
    { "rope.scaling.alpha", 0, scale_max },
    { "rope.scaling.attn_factor", -scale_max, scale_max },
    { "rope.scaling.yarn_log_multiplier", -scale_max, scale_max },
    { "rope.scaling.yarn_ext_factor", -scale_max, scale_max },
    { "rope.scaling.yarn_attn_factor", -scale_max, scale_max },
    { "rope.scaling.yarn_beta_fast", -scale_max, scale_max },
    { "rope.scaling.yarn_beta_slow", -scale_max, scale_max },
    { "attention.max_alibi_bias", 0, scale_max },
    { "attention.clamp_kqv", 0, scale_max },
    { "attention.scale", -scale_max, scale_max },
    { "attention.output_scale", -scale_max, scale_max },
    { "attention.value_scale", -scale_max, scale_max },
    { "attention.temperature_scale", -scale_max, scale_max },
    { "attn_logit_softcapping", 0, scale_max },
    { "router_logit_softcapping", 0, scale_max },
    { "final_logit_softcapping", 0, scale_max },
    { "logit_scale", -scale_max, scale_max },
    { "residual_scale", -scale_max, scale_max },
    { "embedding_scale", -scale_max, scale_max },
    { "expert_weights_scale", -scale_max, scale_max },
    { "expert_group_scale", -scale_max, scale_max },
    { "hyper_connection.magnitude", -scale_max, scale_max },
    { "swiglu_clamp_exp", -INFINITY, INFINITY },
    { "swiglu_clamp_shexp", -INFINITY, INFINITY },
    { "activation.situ_beta", -scale_max, scale_max },
    { "activation.situ_linear_beta", -scale_max, scale_max },
    { "kda.gate_lower_bound", -INFINITY, 0 },
    { "adapters.router_gain", -scale_max, scale_max },
};

static std::string numbered(const metadata_view & view, const std::string & key, size_t i) {
    return view.is_array(key) ? key + "[" + std::to_string(i) + "]" : key;
}

static void check(const metadata_view & view, const integer_rule & rule) {
    const std::string key = view.of_arch(rule.suffix);
    if (!view.has(key)) {
        return;
    }
    const bool array = view.is_array(key);
    const bool overridden = view.is_overridden(key);
    if (rule.kind != anywhere && !overridden) {
        const gguf_type type = view.type(key);
        const bool fits = array ? rule.kind == per_layer && (type == GGUF_TYPE_UINT32 || type == GGUF_TYPE_INT32)
                                : type == GGUF_TYPE_UINT32;
        if (!fits) {
            refuse(key + " is " + view.type_name(key),
                   std::string("an unsigned 32-bit integer is expected") +
                       (rule.kind == per_layer ? ", or an array of one for each layer" : ""));
        }
    }
    if (rule.kind == per_layer && array) {
        const int64_t n_layer = view.integer_or(view.of_arch("block_count"), 0);
        if ((int64_t) view.count(key) != n_layer) {
            refuse(key + " has " + std::to_string(view.count(key)) + " elements",
                   "one for each of " + std::to_string(n_layer) + " layers is expected");
        }
    }
    for (size_t i = 0; i < view.count(key); ++i) {
        const std::optional<int64_t> value = view.integer(key, i);
        if (value && (*value < rule.min || *value > rule.max)) {
            refuse(numbered(view, key, i) + " is " + std::to_string(*value),
                   std::to_string(rule.min) + " to " + std::to_string(rule.max) + " are allowed",
                   overridden ? "give another value to --override-kv" : "");
        }
    }
}

static std::string written(double value) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << value;
    return text.str();
}

static void check(const metadata_view & view, const std::string & key, const real_rule & rule) {
    for (size_t i = 0; i < view.count(key); ++i) {
        const std::optional<double> value = view.real(key, i);
        if (value && !(*value >= rule.min && *value <= rule.max)) { // so written, it is true for what is no number
            refuse(numbered(view, key, i) + " is " + written(*value),
                   written(rule.min) + " to " + written(rule.max) + " are allowed",
                   view.is_overridden(key) ? "give another value to --override-kv" : "");
        }
    }
}

struct text_rule {
    const char * suffix;
    std::vector<std::string> allowed;
};

static void check(const metadata_view & view, const text_rule & rule) {
    const std::string key = view.of_arch(rule.suffix);
    const std::optional<std::string> value = view.text(key);
    if (!value || view.is_array(key)) {
        return;
    }
    std::string list;
    for (const std::string & text : rule.allowed) {
        if (*value == text) {
            return;
        }
        list += (list.empty() ? "" : ", ") + text;
    }
    refuse(key + " is \"" + value->substr(0, 40) + "\"", "allowed are " + list);
}

void check_values(const metadata_view & view) {
    for (const integer_rule & rule : integer_rules) {
        check(view, rule);
    }
    for (const real_rule & rule : real_rules) {
        check(view, view.of_arch(rule.suffix), rule);
    }
    for (const char * key : { "xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps" }) {
        check(view, key, { key, -scale_max, scale_max });
    }
    static const text_rule text_rules[] = {
        { "rope.scaling.type", { "none", "linear", "yarn", "longrope" } },
        { "classifier.activation", { "gelu", "silu", "tanh" } },
    };
    for (const text_rule & rule : text_rules) {
        check(view, rule);
    }
    for (const char * suffix : { "pooling_type", "classifier.pooling_type" }) {
        const std::string key = view.of_arch(suffix);
        const std::optional<int64_t> value = view.integer(key);
        if (value && *value != UINT32_MAX && (*value < 0 || *value > LLAMA_POOLING_TYPE_RANK)) { // -1: not said
            refuse(key + " is " + std::to_string(*value),
                   "0 to " + std::to_string(LLAMA_POOLING_TYPE_RANK) + " are allowed");
        }
    }
    for (const char * suffix : { "context_length", "embedding_length", "block_count" }) {
        if (!view.has(view.of_arch(suffix))) {
            refuse(view.of_arch(suffix) + " is missing", "every model has it");
        }
    }
}

} // namespace superllama
