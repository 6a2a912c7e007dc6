// The plan before a load: what a budget would give. Uses the layout and the arithmetic that a load uses.
#pragma once

#include "superllama.h"

namespace superllama {

// Throw std::runtime_error.
void plan_rows(const char * path, struct llama_model_params mparams, struct llama_context_params cparams,
               const uint64_t * budgets, int32_t n_budgets, struct superllama_plan * out);

double superllama_measure_matvec(enum ggml_type type, bool repack, int32_t n_threads);

} // namespace superllama
