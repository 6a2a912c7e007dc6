// What a request may ask for before upstream's code sees it: nested JSON, windows of samplers, grammars.
#pragma once

#include <string>

struct common_params_sampling;
struct llama_model;

namespace superllama {

// JSON that is nested so deep, or has keys so long, that code which follows it by recursion would end the process.
// Throws std::runtime_error. What is no JSON otherwise is left to the parser.
void check_json(const std::string & text);

// Windows of samplers, which are allocated whole, and the grammar. Throws std::invalid_argument with the reason.
void check_sampling(const common_params_sampling & sampling, const llama_model * model);

} // namespace superllama
