// The metadata of a model file as values: with the overrides that a load was given, whatever number type they have.
#pragma once

#include "llama-model-loader.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace superllama {

// What is wrong, what is allowed, what to try: one line, the error of the load.
[[noreturn]] void refuse(const std::string & what, const std::string & allowed, const std::string & try_this = "");

class metadata_view {
  public:
    explicit metadata_view(const llama_model_loader & ml);

    // The key with the architecture in front, "llama.block_count" for "block_count".
    std::string of_arch(const std::string & suffix) const { return arch + "." + suffix; }

    bool has(const std::string & key) const;
    bool is_array(const std::string & key) const;
    bool is_overridden(const std::string & key) const; // as a scalar
    gguf_type type(const std::string & key) const;     // of the elements, if it is an array
    std::string type_name(const std::string & key) const;
    size_t count(const std::string & key) const; // of elements, 1 of a scalar

    // Numbers as the library will see them; nothing if it is none, or a real one where integers are asked for.
    std::optional<int64_t> integer(const std::string & key, size_t i = 0) const;
    std::optional<double> real(const std::string & key, size_t i = 0) const;
    std::optional<std::string> text(const std::string & key, size_t i = 0) const;

    // The value for a layer: an array's element, or the scalar for all.
    int64_t layer_integer(const std::string & key, size_t layer, int64_t otherwise) const;
    int64_t integer_or(const std::string & key, int64_t otherwise) const { return integer(key).value_or(otherwise); }

    const llama_model_loader & ml;
    const std::string arch;

  private:
    const llama_model_kv_override * override_of(const std::string & key) const;
    int64_t find(const std::string & key) const;
};

} // namespace superllama
