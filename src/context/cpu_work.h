// What the CPU's kernels take besides the compute buffers: a work buffer that grows to what the largest graph asks for.
#pragma once

#include "ggml-backend.h"

#include <cstddef>

struct ggml_cgraph;

namespace superllama {

size_t cpu_work_bytes(ggml_backend_sched_t sched, const ggml_cgraph * gf, int n_threads);

} // namespace superllama
