// Tensors of a model file: types that kernels can compute with. Shapes are compared with the hyperparameters by the
// load itself, bounds of the data with the file.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

#include <cstring>

namespace superllama {

// Types that hold intermediate results or whole numbers: no kernel multiplies a matrix of them.
static bool is_weight_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q8_1:
        case GGML_TYPE_Q8_K:
        case GGML_TYPE_I8:
        case GGML_TYPE_I16:
        case GGML_TYPE_I32:
        case GGML_TYPE_I64:
        case GGML_TYPE_F64:
            return false;
        default:
            return true;
    }
}

static bool ends_with(const std::string & text, const char * end) {
    const size_t n = strlen(end);
    return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

void check_tensors(const metadata_view & view) {
    for (const auto & entry : view.ml.weights_map) {
        const std::string & name = entry.first;
        const ggml_tensor * t = entry.second.tensor;
        const bool table_of_ids = name == "d2t" || name.find("tid2eid") != std::string::npos; // whole numbers
        if (table_of_ids) {
            continue;
        }
        if (!is_weight_type(t->type)) {
            refuse("tensor " + name + " has the type " + ggml_type_name(t->type), "there are no weights of this type");
        }
        // norms and biases are added and multiplied element by element
        const bool row = t->ne[1] == 1 && t->ne[2] == 1 && t->ne[3] == 1;
        if (row && ggml_is_quantized(t->type) && (ends_with(name, "norm.weight") || ends_with(name, ".bias"))) {
            refuse("tensor " + name + " has the type " + ggml_type_name(t->type), "f32 is expected of a norm or bias");
        }
    }
}

} // namespace superllama
