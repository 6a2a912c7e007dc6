// The plan before a load: what a budget would give. Uses the layout and the arithmetic that a load uses.
#pragma once

#include "llama-cpp.h"
#include "superllama.h"

namespace superllama {

class dynamic_model;

// Throw std::runtime_error.
void plan_rows(const char * path, struct llama_model_params mparams, struct llama_context_params cparams,
               const uint64_t * budgets, int32_t n_budgets, struct superllama_plan * out);

// Its parts. A model that has sizes and no weights, and a context on it without memory; one that is laid out and not
// read; what of a budget goes where, once `common` says what the rest takes.
llama_model_ptr plan_dry_model(const char * path, struct llama_model_params mparams);
llama_context_ptr plan_dry_context(llama_model * dry, const struct llama_context_params & cparams);
llama_model_ptr plan_laid_out(const char * path, struct llama_model_params mparams);
void plan_context(llama_context & ctx, struct superllama_plan & common);
void plan_weights(const dynamic_model & weights, const struct llama_model_params & mparams,
                  struct superllama_plan & common);
struct superllama_plan plan_row(const dynamic_model & weights, const struct superllama_plan & common, uint64_t budget);

double superllama_measure_matvec(enum ggml_type type, bool repack, int32_t n_threads);

} // namespace superllama
