// Tensors that graphs use without a look whether they are there, though the load does not ask for them: found by
// leaving each tensor of each architecture out.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

#include "llama-model.h"

#include <string>

namespace superllama {

void check_needs(const llama_model & model, const llama_model_loader & ml) {
    if (ml.weights_map.empty()) {
        return; // a model that is made, and not read
    }
    const llm_arch arch = ml.get_arch();
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        const std::string layer = "blk." + std::to_string(il) + ".";
        const auto has = [&](const char * name) { return ml.weights_map.count(layer + name) > 0; };
        const auto need = [&](const char * name) {
            if (!has(name)) {
                refuse("the tensor " + layer + name + " is missing", "models of this architecture need it",
                       "convert or download the file again");
            }
        };
        switch (arch) {
            case LLM_ARCH_FALCON_H1:
            case LLM_ARCH_GRANITE_HYBRID:
            case LLM_ARCH_NEMOTRON_H:
            case LLM_ARCH_NEMOTRON_H_MOE:
                if (has("ssm_conv1d.weight")) {
                    need("ssm_conv1d.bias");
                }
                break;
            case LLM_ARCH_GLM_DSA:
                if (model.hparams.is_indexer_full(il)) {
                    need("indexer.proj.weight");
                    need("indexer.attn_k.weight");
                    need("indexer.attn_q_b.weight");
                }
                break;
            case LLM_ARCH_HY_V3:
                if (has("ffn_down_exps.weight") && !has("ffn_gate_up_exps.weight")) {
                    need("ffn_gate_exps.weight");
                    need("ffn_up_exps.weight");
                }
                break;
            default:
                break;
        }
    }
}

} // namespace superllama
