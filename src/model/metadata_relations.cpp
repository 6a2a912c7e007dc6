// What keys of a model file have to do with each other: counts that contain or divide one another.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

#include <algorithm>
#include <vector>

namespace superllama {

namespace {

// Keys of which an architecture needs at least so much: it divides by them, or makes rows of that size. Files hold
// zeros for what other architectures have, so this is asked of those only that read it.
struct least_rule {
    std::vector<llm_arch> archs;
    std::vector<const char *> suffixes;
    int64_t min;
};

const least_rule least_rules[] = {
    { { LLM_ARCH_MAMBA, LLM_ARCH_MAMBA2, LLM_ARCH_JAMBA, LLM_ARCH_FALCON_H1, LLM_ARCH_PLAMO2, LLM_ARCH_GRANITE_HYBRID,
        LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE, LLM_ARCH_QWEN3NEXT, LLM_ARCH_QWEN35, LLM_ARCH_QWEN35MOE,
        LLM_ARCH_QWEN4EXP, LLM_ARCH_CLEF },
      { "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank" },
      1 },
    { { LLM_ARCH_MAMBA2, LLM_ARCH_FALCON_H1, LLM_ARCH_GRANITE_HYBRID, LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE,
        LLM_ARCH_QWEN3NEXT, LLM_ARCH_QWEN35, LLM_ARCH_QWEN35MOE, LLM_ARCH_QWEN4EXP, LLM_ARCH_CLEF },
      { "ssm.group_count" },
      1 },
    { { LLM_ARCH_KIMI_LINEAR, LLM_ARCH_KIMI_K3, LLM_ARCH_BAILINGMOE3, LLM_ARCH_GLM5_NEXT },
      { "ssm.conv_kernel", "kda.head_dim" },
      1 },
    { { LLM_ARCH_RWKV6, LLM_ARCH_RWKV7, LLM_ARCH_ARWKV7, LLM_ARCH_RWKV6QWEN2 },
      { "wkv.head_size", "token_shift_count" },
      1 },
    { { LLM_ARCH_LFM2, LLM_ARCH_LFM2MOE }, { "shortconv.l_cache" }, 2 },
    { { LLM_ARCH_MINIMAX_01, LLM_ARCH_QWEN3NEXT, LLM_ARCH_QWEN35, LLM_ARCH_QWEN35MOE, LLM_ARCH_QWEN4EXP,
        LLM_ARCH_CLEF },
      { "full_attention_interval" },
      1 },
    { { LLM_ARCH_T5, LLM_ARCH_T5ENCODER }, { "attention.relative_buckets_count" }, 4 }, // halved twice, and divided by
    { { LLM_ARCH_DEEPSEEK4 }, { "attention.output_group_count" }, 1 },
    { { LLM_ARCH_MINIMAX_M3 }, { "attention.indexer.block_size" }, 1 },
    { { LLM_ARCH_GLM5_NEXT }, { "attention.indexer.kpool" }, 2 },
    { { LLM_ARCH_NANBEIGE }, { "num_loops" }, 1 },
    { { LLM_ARCH_HRM_TEXT }, { "hrm.layers_per_stack", "hrm.h_cycles", "hrm.l_cycles" }, 1 },
    { { LLM_ARCH_GROVEMOE }, { "experts_per_group" }, 1 },
    { { LLM_ARCH_ERNIE4_5_MOE }, { "interleave_moe_layer_step" }, 1 },
    { { LLM_ARCH_WAVTOKENIZER_DEC },
      { "attention.group_norm_groups", "posnet.embedding_length", "convnext.embedding_length" },
      1 },
    { { LLM_ARCH_EAGLE3 }, { "target_hidden_size" }, 1 },
};

// The keys of one architecture, with their values as the messages say them.
class relations {
  public:
    explicit relations(const metadata_view & view) : view(view), kind(view.ml.get_arch()) {
        n_layer = view.integer_or(view.of_arch("block_count"), 0);
    }

    void check() const {
        for (const least_rule & rule : least_rules) {
            for (const char * suffix : rule.suffixes) {
                if (contains(rule.archs) && view.has(view.of_arch(suffix)) && get(suffix, rule.min) < rule.min) {
                    refuse(said(suffix, get(suffix)), "at least " + std::to_string(rule.min) + " is needed");
                }
            }
        }
        layers();
        heads();
        experts();
        states();
        others();
    }

  private:
    bool contains(const std::vector<llm_arch> & list) const {
        return std::find(list.begin(), list.end(), kind) != list.end();
    }

    bool is(std::initializer_list<llm_arch> list) const { return contains(list); }

    int64_t get(const char * suffix, int64_t otherwise = 0) const {
        return view.integer_or(view.of_arch(suffix), otherwise);
    }

    std::string said(const char * suffix, int64_t value) const {
        return view.of_arch(suffix) + " is " + std::to_string(value);
    }

    // of a layer where there is a value for each
    std::string said(const char * suffix, int64_t layer, int64_t value) const {
        const std::string index = view.is_array(view.of_arch(suffix)) ? "[" + std::to_string(layer) + "]" : "";
        return view.of_arch(suffix) + index + " is " + std::to_string(value);
    }

    void divides(const char * whole, const char * part) const {
        const int64_t n = get(whole), d = get(part);
        if (n > 0 && d > 0 && n % d != 0) {
            refuse(said(whole, n), "a multiple of " + said(part, d) + " is expected");
        }
    }

    void layers() const {
        const int64_t n_nextn = get("nextn_predict_layers");
        if (n_nextn > n_layer) {
            refuse(said("nextn_predict_layers", n_nextn),
                   "at most " + said("block_count", n_layer) + " of them are possible");
        }
        for (const char * suffix :
             { "posnet.block_count", "convnext.block_count", "hash_layer_count", "attention.shared_kv_layers" }) {
            if (get(suffix) > n_layer) {
                refuse(said(suffix, get(suffix)), "at most " + said("block_count", n_layer) + " of them are possible");
            }
        }
        if (kind == LLM_ARCH_NANBEIGE && n_layer * get("num_loops", 1) > LLAMA_MAX_LAYERS) {
            refuse(said("num_loops", get("num_loops")), "times " + said("block_count", n_layer) + " it may be " +
                                                            std::to_string(LLAMA_MAX_LAYERS) + " at most");
        }
        if (kind == LLM_ARCH_HRM_TEXT) {
            const int64_t n = get("hrm.layers_per_stack") * get("hrm.h_cycles") * (get("hrm.l_cycles") + 1);
            if (n != n_layer - n_nextn) {
                refuse(said("block_count", n_layer), "hrm.layers_per_stack * hrm.h_cycles * (hrm.l_cycles + 1) is " +
                                                         std::to_string(n) + ", they have to be the same");
            }
        }
    }

    void heads() const {
        const std::string key = view.of_arch("attention.head_count"), key_kv = view.of_arch("attention.head_count_kv");
        // layers without attention have no heads; where a state takes its place, so may the whole model
        const bool first_may_be_none =
            llm_arch_is_recurrent(kind) || llm_arch_is_hybrid(kind) || is({ LLM_ARCH_DECI, LLM_ARCH_WAVTOKENIZER_DEC });
        if (!first_may_be_none && view.layer_integer(key, 0, 0) < 1) {
            refuse(view.has(key) ? said("attention.head_count", 0, 0) : key + " is missing",
                   "at least 1 is needed, the size of a head comes from it");
        }
        for (int64_t i = 0; i < n_layer; ++i) {
            const int64_t n_head = view.layer_integer(key, (size_t) i, 0);
            const int64_t n_head_kv = view.layer_integer(key_kv, (size_t) i, n_head);
            if (n_head > 0 && n_head_kv > 0 && n_head % n_head_kv != 0) {
                refuse(said("attention.head_count", i, n_head),
                       "a multiple of " + said("attention.head_count_kv", i, n_head_kv) + " is expected");
            }
            if (n_head > 0 && n_head_kv == 0 && !first_may_be_none) {
                refuse(said("attention.head_count_kv", i, 0), "at least 1 is needed where there are heads");
            }
        }
        const int64_t n_head = view.layer_integer(key, 0, 0), n_embd = get("embedding_length");
        const bool sized = view.has(view.of_arch("attention.key_length"));
        const int64_t k = get("attention.key_length", n_head > 0 ? n_embd / n_head : 0);
        const int64_t rotated = get("rope.dimension_count", k);
        if (is({ LLM_ARCH_LLAMA, LLM_ARCH_LLAMA_EMBED, LLM_ARCH_DECI, LLM_ARCH_FALCON }) && n_head > 0 &&
            rotated != k) {
            refuse(said("rope.dimension_count", rotated),
                   "the size of a head, " + std::to_string(k) + ", is expected of this architecture");
        }
        if (!sized && n_head > n_embd) {
            refuse(said("attention.head_count", 0, n_head),
                   "at most " + said("embedding_length", n_embd) + " is possible: no number would be left for a head");
        }
    }

    void experts() const {
        const int64_t n = get("expert_count");
        const std::string key = view.of_arch("expert_used_count");
        int64_t used_max = 0;
        for (int64_t i = 0; i < n_layer; ++i) {
            const int64_t used = view.layer_integer(key, (size_t) i, 0);
            used_max = std::max(used_max, used);
            const bool ignored = n <= 1 && is({ LLM_ARCH_HUNYUAN_VL, LLM_ARCH_HUNYUAN_DENSE });
            if (used > n && !ignored) {
                refuse(said("expert_used_count", i, used), "at most " + said("expert_count", n) + " can be used");
            }
        }
        if (n > 0 && used_max == 0 && !is({ LLM_ARCH_HUNYUAN_VL, LLM_ARCH_HUNYUAN_DENSE })) {
            refuse(key + " is 0", "with " + said("expert_count", n) + " at least 1 is needed");
        }
        const int64_t groups = get("expert_group_count"), groups_used = get("expert_group_used_count");
        if (groups > 0 && groups >= std::max<int64_t>(n, 1)) {
            refuse(said("expert_group_count", groups), "less than " + said("expert_count", n) + " are expected");
        }
        if (groups > 1) {
            divides("expert_count", "expert_group_count");
            if (groups_used < 1 || groups_used >= groups) {
                refuse(said("expert_group_used_count", groups_used),
                       "1 to " + std::to_string(groups - 1) + " are allowed, as " + said("expert_group_count", groups));
            }
        }
        if (is({ LLM_ARCH_GROVEMOE })) {
            divides("expert_count", "experts_per_group");
        }
        const int64_t values = get("attention.value_expert_count"),
                      values_used = get("attention.value_expert_used_count");
        if (values_used > values || (values > 0 && values_used == 0)) {
            refuse(said("attention.value_expert_used_count", values_used),
                   "1 to " + said("attention.value_expert_count", values) + " are allowed");
        }
    }

    // of recurrent layers
    void states() const {
        if (is({ LLM_ARCH_MAMBA2, LLM_ARCH_FALCON_H1, LLM_ARCH_GRANITE_HYBRID, LLM_ARCH_NEMOTRON_H,
                 LLM_ARCH_NEMOTRON_H_MOE, LLM_ARCH_QWEN3NEXT, LLM_ARCH_QWEN35, LLM_ARCH_QWEN35MOE, LLM_ARCH_QWEN4EXP,
                 LLM_ARCH_CLEF })) {
            divides("ssm.inner_size", "ssm.time_step_rank");
            divides("ssm.time_step_rank", "ssm.group_count");
        }
        if (is({ LLM_ARCH_PLAMO2 })) {
            divides("ssm.inner_size", "ssm.time_step_rank");
        }
        if (is({ LLM_ARCH_RWKV6, LLM_ARCH_RWKV7, LLM_ARCH_ARWKV7, LLM_ARCH_RWKV6QWEN2 })) {
            divides("embedding_length", "wkv.head_size");
        }
    }

    void others() const {
        if (is({ LLM_ARCH_GLM5_NEXT })) {
            divides("attention.indexer.top_k", "attention.indexer.kpool");
        }
        if (is({ LLM_ARCH_DFLASH }) && get("conv_kernel_size") > 0 && get("conv_group_size") < 1) {
            refuse(said("conv_group_size", get("conv_group_size")), "at least 1 is needed with a convolution");
        }
        const int64_t n_embd = get("embedding_length");
        for (const char * suffix : { "dense_2_feat_in", "dense_3_feat_out" }) {
            if (is({ LLM_ARCH_GEMMA_EMBEDDING }) && get(suffix) != 0 && get(suffix) != n_embd) {
                refuse(said(suffix, get(suffix)), "the same as " + said("embedding_length", n_embd) + " is expected");
            }
        }
        // a table of positions is as long as the context that the file promises
        for (const char * name : { "position_embd.weight" }) {
            const llama_model_loader::llama_tensor_weight * table = view.ml.get_weight(name);
            const int64_t n_ctx = get("context_length");
            if (table != nullptr && table->tensor->ne[1] < n_ctx) {
                refuse(said("context_length", n_ctx), "the tensor " + std::string(name) + " has " +
                                                          std::to_string(table->tensor->ne[1]) + " positions");
            }
        }
    }

    const metadata_view & view;
    const llm_arch kind;
    int64_t n_layer = 0;
};

} // namespace

void check_relations(const metadata_view & view) {
    relations(view).check();
}

} // namespace superllama
