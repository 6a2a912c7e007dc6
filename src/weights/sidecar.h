// Blocks in the layout that the CPU's repacked kernels want, kept in a file so that they stream like any other.
//
// Written once per model and kernel variant into the cache folder; disposable. Without it every load of a
// repacked block reads the model's own layout and converts it, which costs processor time.
#pragma once

#include "weights/store.h"

#include <functional>
#include <string>

namespace superllama {

struct weight_sidecar_info {
    std::string path;
    size_t bytes = 0;
    bool written = false; // by this call; false: found
};

// Uses the sidecar of this model if there is a good one, else writes it if `write` is set. False: there is none and
// blocks are converted as they are loaded; *why says the reason. `progress` gets 0..1 and returns whether to go on; it
// is asked several times a second.
bool weight_sidecar_attach(weight_store & store, bool write, const std::function<bool(float)> & progress,
                           weight_sidecar_info * info, std::string * why);

} // namespace superllama
