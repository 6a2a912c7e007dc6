#include "kv/state_check.h"

#include "llama-io.h"

#include <stdexcept>
#include <string>

namespace superllama {

static thread_local bool any_position = false;

void forget_positions() {
    any_position = false;
}

bool positions_were_read() {
    return any_position;
}

void read_position(llama_io_read_i & io, llama_pos & pos) {
    const llama_pos most = 1 << 28; // longer than any context; some graphs take memory by the largest position
    io.read(&pos, sizeof(pos));
    any_position = true;
    if (pos < 0 || pos > most) {
        throw std::runtime_error("the state is damaged: it has a cell at position " + std::to_string(pos));
    }
}

void check_name_length(uint32_t bytes) {
    if (bytes > 4096) {
        throw std::runtime_error("the state is damaged: it has a name of " + std::to_string(bytes) + " bytes");
    }
}

} // namespace superllama
