// Devices of RPC servers that go away. Upstream's client ends the process with its server, unless somebody asks whether
// one is lost: from then on a loss is an answer of zeros, and graphs there fail.
#pragma once

#include "ggml-backend.h"

namespace superllama {

bool is_lost(ggml_backend_t backend);
bool may_be_lost(ggml_backend_t backend);

// Asked once, before anything of a server is used: the process outlives servers from now on.
void survive_lost_devices();

} // namespace superllama
