// Checks of a model file before the library interprets it: what contradicts itself, or is of a size that nothing has,
// is the error of the load, with the key, its value and what is allowed.
//
// Two steps, as what a key means depends on the architecture: the values themselves, before hyperparameters are made
// of them; and the hyperparameters and the vocabulary that came of them, before tensors are loaded. The rules are
// those that upstream's code supposes: where it divides, indexes an array, allocates, or asserts.
#pragma once

#include "base/assert_guard.h" // for the same callers

struct llama_model;
struct llama_model_loader;

namespace superllama {

class metadata_view;

// Throws std::runtime_error.
void check_metadata(const llama_model_loader & ml, bool vocab_only);
void check_model(const llama_model & model, const llama_model_loader & ml);

// The parts of check_metadata.
void check_values(const metadata_view & view);    // ranges of single keys
void check_relations(const metadata_view & view); // between keys
void check_tokenizer(const metadata_view & view); // arrays of the vocabulary
void check_tensors(const metadata_view & view);   // types and shapes that do not depend on hyperparameters

// And of check_model.
void check_needs(const llama_model & model, const llama_model_loader & ml);

} // namespace superllama
