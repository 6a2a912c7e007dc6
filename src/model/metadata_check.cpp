// The order of the checks of a model file.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

namespace superllama {

void check_metadata(const llama_model_loader & ml, bool vocab_only) {
    const metadata_view view(ml);
    check_tokenizer(view);
    if (vocab_only || ml.get_arch() == LLM_ARCH_CLIP || ml.get_arch() == LLM_ARCH_UNKNOWN) {
        return; // nothing else of it is read, or the load says that it cannot be
    }
    check_values(view);
    check_relations(view);
    check_tensors(view);
}

} // namespace superllama
