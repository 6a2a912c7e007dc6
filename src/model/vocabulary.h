// Memory of a vocabulary, which upstream's containers hold as long as the model.
#pragma once

#include <cstdint>

struct llama_vocab;

namespace superllama {

uint64_t vocabulary_bytes(const llama_vocab & vocab);

} // namespace superllama
