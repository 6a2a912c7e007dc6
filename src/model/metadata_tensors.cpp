// Tensors of a model file: types that kernels can compute with. Shapes are compared with the hyperparameters by the
// load itself, bounds of the data with the file.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

#include <set>
#include <stdexcept>
#include <string>

namespace superllama {

namespace {

const int n_tensor_kinds = 1024; // more than there are

// Types that hold intermediate results or whole numbers: no kernel multiplies a matrix of them.
bool is_weight_type(ggml_type type) {
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

bool is_matrix_op(ggml_op op) {
    switch (op) {
        case GGML_OP_NONE:
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_GET_ROWS:
        case GGML_OP_IM2COL:
            return true;
        default:
            return false;
    }
}

// Names, of layer 0 and without suffix, of tensors that are used element by element: norms, factors, states. The
// kernels for that compute in f32 alone.
std::set<std::string> elementwise_names(llm_arch arch) {
    std::set<std::string> names, matrices;
    for (int i = 0; i < n_tensor_kinds; ++i) {
        try {
            const llm_tensor_info & info = llm_tensor_info_for((llm_tensor) i);
            const std::string name = LLM_TN_IMPL(arch, (llm_tensor) i, nullptr, 0, 0).str();
            (is_matrix_op(info.op) ? matrices : names).insert(name);
        } catch (const std::out_of_range &) {
            // a gap, or past the last one
        }
    }
    for (const std::string & name : matrices) {
        names.erase(name); // a name that architectures use for different things
    }
    return names;
}

// "blk.17.attn_norm.weight" as "blk.0.attn_norm.weight".
std::string of_layer_0(const std::string & name) {
    const size_t end = name.rfind("blk.", 0) == 0 ? name.find('.', 4) : std::string::npos;
    return end == std::string::npos ? name : "blk.0" + name.substr(end);
}

// Some architectures have tensors without a suffix.
bool is_elementwise(const std::set<std::string> & names, const std::string & name) {
    const std::string general = of_layer_0(name);
    const size_t dot = general.rfind('.');
    const std::string suffix = dot == std::string::npos ? "" : general.substr(dot + 1);
    return general == "token_types.weight" || // its first row is added as it is
           names.count(general) > 0 || names.count(general.substr(0, dot)) > 0 || suffix == "bias" ||
           suffix == "scale" || suffix == "input_scale";
}

} // namespace

void check_tensors(const metadata_view & view) {
    const std::set<std::string> elementwise = elementwise_names(view.ml.get_arch());
    for (const auto & entry : view.ml.weights_map) {
        const std::string & name = entry.first;
        const ggml_type type = entry.second.tensor->type;
        if (type == GGML_TYPE_F32 || name == "d2t" || name.find("tid2eid") != std::string::npos) {
            continue; // the latter are tables of token ids and experts, whole numbers
        }
        if (!is_weight_type(type)) {
            refuse("tensor " + name + " has the type " + ggml_type_name(type), "there are no weights of this type");
        }
        if (is_elementwise(elementwise, name)) {
            refuse("tensor " + name + " has the type " + ggml_type_name(type),
                   "f32 is expected of norms, biases and other factors");
        }
    }
}

} // namespace superllama
