// The metadata of a model file as values.
#include "model/metadata_view.h"

#include "gguf.h"

#include <algorithm>
#include <stdexcept>

namespace superllama {

void refuse(const std::string & what, const std::string & allowed, const std::string & try_this) {
    std::string text =
        what + ": " + allowed + "; " +
        (try_this.empty() ? "the file is damaged or was written wrong: fetch or convert it again" : try_this);
    for (char & c : text) {
        c = (unsigned char) c < 0x20 ? ' ' : c; // keys and texts are those of the file
    }
    throw std::runtime_error(text);
}

metadata_view::metadata_view(const llama_model_loader & ml) : ml(ml), arch(ml.get_arch_name()) {}

int64_t metadata_view::find(const std::string & key) const {
    return gguf_find_key(ml.metadata, key.c_str());
}

const llama_model_kv_override * metadata_view::override_of(const std::string & key) const {
    const auto it = ml.kv_overrides.find(key);
    return it != ml.kv_overrides.end() && !is_array(key) ? &it->second : nullptr;
}

bool metadata_view::is_overridden(const std::string & key) const {
    return override_of(key) != nullptr;
}

bool metadata_view::has(const std::string & key) const {
    return find(key) >= 0 || is_overridden(key);
}

bool metadata_view::is_array(const std::string & key) const {
    const int64_t id = find(key);
    return id >= 0 && gguf_get_kv_type(ml.metadata, id) == GGUF_TYPE_ARRAY;
}

gguf_type metadata_view::type(const std::string & key) const {
    const int64_t id = find(key);
    if (id < 0) {
        return GGUF_TYPE_COUNT;
    }
    return is_array(key) ? gguf_get_arr_type(ml.metadata, id) : gguf_get_kv_type(ml.metadata, id);
}

std::string metadata_view::type_name(const std::string & key) const {
    const char * name = gguf_type_name(type(key));
    const std::string element = name != nullptr ? name : "of an unknown type";
    return is_array(key) ? "an array of " + std::to_string(count(key)) + " " + element : element;
}

size_t metadata_view::count(const std::string & key) const {
    return is_array(key) ? gguf_get_arr_n(ml.metadata, find(key)) : has(key) ? 1 : 0;
}

// The value at i of an array or scalar of this type, converted.
template <typename T>
static T value_at(const void * data, size_t i) {
    return static_cast<const T *>(data)[i];
}

std::optional<int64_t> metadata_view::integer(const std::string & key, size_t i) const {
    if (const llama_model_kv_override * o = override_of(key)) {
        return o->tag == LLAMA_KV_OVERRIDE_TYPE_INT ? std::optional<int64_t>(o->val_i64) : std::nullopt;
    }
    const int64_t id = find(key);
    if (id < 0 || i >= count(key) || type(key) == GGUF_TYPE_STRING) {
        return std::nullopt;
    }
    const void * data = is_array(key) ? gguf_get_arr_data(ml.metadata, id) : gguf_get_val_data(ml.metadata, id);
    switch (type(key)) {
        case GGUF_TYPE_BOOL:
        case GGUF_TYPE_INT8:
            return value_at<int8_t>(data, i);
        case GGUF_TYPE_UINT8:
            return value_at<uint8_t>(data, i);
        case GGUF_TYPE_INT16:
            return value_at<int16_t>(data, i);
        case GGUF_TYPE_UINT16:
            return value_at<uint16_t>(data, i);
        case GGUF_TYPE_INT32:
            return value_at<int32_t>(data, i);
        case GGUF_TYPE_UINT32:
            return value_at<uint32_t>(data, i);
        case GGUF_TYPE_INT64:
            return value_at<int64_t>(data, i);
        case GGUF_TYPE_UINT64:
            return (int64_t) std::min<uint64_t>(value_at<uint64_t>(data, i), INT64_MAX);
        default:
            return std::nullopt;
    }
}

std::optional<double> metadata_view::real(const std::string & key, size_t i) const {
    if (const llama_model_kv_override * o = override_of(key)) {
        return o->tag == LLAMA_KV_OVERRIDE_TYPE_FLOAT ? std::optional<double>(o->val_f64) : std::nullopt;
    }
    const int64_t id = find(key);
    if (id < 0 || i >= count(key) || type(key) != GGUF_TYPE_FLOAT32) {
        return std::nullopt;
    }
    const void * data = is_array(key) ? gguf_get_arr_data(ml.metadata, id) : gguf_get_val_data(ml.metadata, id);
    return value_at<float>(data, i);
}

std::optional<std::string> metadata_view::text(const std::string & key, size_t i) const {
    if (const llama_model_kv_override * o = override_of(key)) {
        return o->tag == LLAMA_KV_OVERRIDE_TYPE_STR ? std::optional<std::string>(o->val_str) : std::nullopt;
    }
    const int64_t id = find(key);
    if (id < 0 || i >= count(key) || type(key) != GGUF_TYPE_STRING) {
        return std::nullopt;
    }
    return is_array(key) ? gguf_get_arr_str(ml.metadata, id, i) : gguf_get_val_str(ml.metadata, id);
}

int64_t metadata_view::layer_integer(const std::string & key, size_t layer, int64_t otherwise) const {
    return integer(key, is_array(key) ? layer : 0).value_or(otherwise);
}

} // namespace superllama
