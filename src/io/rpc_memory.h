// The memory of a server's processor, as its clients fill it.
#pragma once

#include "ggml-backend.h"

namespace superllama {

// From now on this device, if it is the processor, says what this process may use of its machine: by its cgroups too,
// and by what others use. Upstream's says that all there is is free. Before clients are served.
void rpc_tell_memory(ggml_backend_dev_t device);

} // namespace superllama
