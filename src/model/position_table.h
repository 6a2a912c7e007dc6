// Models with a table of positions (GPT-2, BERT): a token behind its end has no row, and the kernel that looks it up
// would end the process. A context may be longer than the table, so this is asked of every ubatch.
#pragma once

#include <string>

struct llama_model;
struct llama_ubatch;

namespace superllama {

// Why the ubatch cannot be computed, "" if it can.
std::string behind_position_table(const llama_model & model, const llama_ubatch & ubatch);

} // namespace superllama
