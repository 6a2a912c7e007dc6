// Positions that a model has no row for: see the header.
#include "model/position_table.h"

#include "llama-batch.h"
#include "llama-model.h"

#include <algorithm>

namespace superllama {

std::string behind_position_table(const llama_model & model, const llama_ubatch & ubatch) {
    if (model.pos_embd == nullptr || ubatch.pos == nullptr || ubatch.n_tokens == 0) {
        return "";
    }
    const int64_t n_rows = model.pos_embd->ne[1];
    const int64_t last = *std::max_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    if (last < n_rows) {
        return "";
    }
    return "position " + std::to_string(last) + " does not exist: this model has a table of " + std::to_string(n_rows) +
           " positions, texts may have so many tokens at most";
}

} // namespace superllama
