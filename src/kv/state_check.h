// What a saved state says of itself, which may be damaged, or come from anywhere. What checks
// throws std::runtime_error.
#pragma once

#include "llama.h"

#include <cstdint>

class llama_io_read_i;

namespace superllama {

void read_position(llama_io_read_i & io, llama_pos & pos); // of a cell: one that a sequence can have
void forget_positions();                                   // of this thread
bool positions_were_read();                                // since then: cells may have changed
void check_name_length(uint32_t bytes);                    // before so much memory is taken

} // namespace superllama
