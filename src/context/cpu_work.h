// What the CPU's kernels take besides the compute buffers: a work buffer that grows to what the largest graph asks for.
#pragma once

#include "ggml-backend.h"

#include <cstddef>

struct ggml_cgraph;

namespace superllama {

// Of the nodes that `sched`, which holds the graph, has given to the CPU. Null: of all of them. A scheduler that does
// not hold it must not be asked: it would keep every node in its table, which then has no room for the graph that
// comes.
size_t cpu_work_bytes(ggml_backend_sched_t sched, const ggml_cgraph * gf, int n_threads);

} // namespace superllama
