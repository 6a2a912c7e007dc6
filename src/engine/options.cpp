#include "engine/options.h"

#include "server/slots.h"
#include "arg.h"
#include "chat.h"

#include <algorithm>
#include <exception>
#include <set>
#include <stdexcept>
#include <unordered_map>

namespace superllama {

// Upstream's parser, with our flags in it, takes the process for a program of its own, which says why it ends.
struct guest {
    std::terminate_handler of_host = std::get_terminate();
    ~guest() { std::set_terminate(of_host); }
};

static const std::set<std::string> prints_and_ends = {
    "-h", "--help", "--usage", "--version", "--license", "--list-devices", "-cl", "--cache-list", "--completion-bash",
};
// what is for HTTP, or for a server that gives its model back
static const std::set<std::string> for_programs_only = { "--sleep-idle-seconds", "--models-dir", "--models-preset" };

static bool is_for_us(const common_arg & option) {
    const auto any_of = [&](const std::set<std::string> & names) {
        return std::any_of(option.args.begin(), option.args.end(),
                           [&](const char * name) { return names.count(name) != 0; });
    };
    return !any_of(prints_and_ends) && !any_of(for_programs_only);
}

static bool takes_value(const common_arg & option) {
    return option.handler_void == nullptr && option.handler_bool == nullptr;
}

std::string list_of_flags() {
    const guest here;
    common_params params;
    const auto context = common_params_parser_init(params, LLAMA_EXAMPLE_SERVER);
    std::string list;
    for (const auto & option : context.options) {
        if (!is_for_us(option)) {
            continue;
        }
        for (const char * name : option.args) {
            list += std::string(name) + (takes_value(option) ? "= " : " ");
        }
        for (const char * name : option.args_neg) {
            list += std::string(name) + " ";
        }
        list.back() = '\n';
    }
    return list;
}

// What upstream does between reading a command line and using it; there it is inside a function that reads the
// environment too, and ends the process where it does not like what it finds.
static void complete(common_params & params) {
    postprocess_cpu_params(params.cpuparams, nullptr);
    postprocess_cpu_params(params.cpuparams_batch, &params.cpuparams);
    postprocess_cpu_params(params.speculative.draft.cpuparams, &params.cpuparams);
    postprocess_cpu_params(params.speculative.draft.cpuparams_batch, &params.cpuparams_batch);
    if (params.mmproj_use_gpu && params.mmproj_device == nullptr && !params.devices.empty()) {
        params.mmproj_device = params.devices.front();
        params.mmproj_use_gpu = params.mmproj_device != nullptr;
    }
    if (!params.kv_overrides.empty()) {
        params.kv_overrides.emplace_back();
        params.kv_overrides.back().key[0] = 0;
    }
    const size_t n_overrides = llama_max_tensor_buft_overrides();
    if (params.tensor_buft_overrides.size() < n_overrides) {
        params.tensor_buft_overrides.resize(n_overrides, { nullptr, nullptr });
    }
    auto & of_draft = params.speculative.draft.tensor_buft_overrides;
    if (!of_draft.empty()) {
        of_draft.push_back({ nullptr, nullptr });
    }
    if (!params.chat_template.empty() && !common_chat_verify_template(params.chat_template, params.use_jinja)) {
        throw std::invalid_argument("--chat-template: it cannot be parsed, or is no name of one that the library has");
    }
    params.default_template_kwargs.emplace("preserve_reasoning", "true");

    // as llama-server's main function goes on
    if (params.embedding && params.n_batch > params.n_ubatch) {
        params.n_batch = params.n_ubatch;
    }
    if (params.n_parallel < 0) {
        params.n_parallel = 4;
        params.kv_unified = true;
    }
    if (params.kv_unified_per_slot > 0 && params.n_ctx == 0 && (uint32_t) params.fit_params_min_ctx != UINT32_MAX) {
        params.n_ctx = params.n_parallel * params.kv_unified_per_slot;
    }
}

common_params params_of(const std::vector<std::string> & arguments) {
    const guest here;
    common_params params;
    params.verbosity = -1; // what goes wrong is in the errors
    params.endpoint_metrics = true;
    params.sse_ping_interval = -1;
    auto context = common_params_parser_init(params, LLAMA_EXAMPLE_SERVER);
    std::unordered_map<std::string, common_arg *> by_name, by_negative;
    for (auto & option : context.options) {
        if (is_for_us(option)) {
            for (const char * name : option.args) {
                by_name[name] = &option;
            }
            for (const char * name : option.args_neg) {
                by_negative[name] = &option;
            }
        }
    }
    for (size_t i = 0; i < arguments.size(); i++) {
        std::string name = arguments[i];
        if (name.rfind("--", 0) == 0) {
            std::replace(name.begin(), name.end(), '_', '-');
        }
        const bool negative = by_name.count(name) == 0;
        const auto & names = negative ? by_negative : by_name;
        const auto found = names.find(name);
        if (found == names.end()) {
            throw std::invalid_argument(name + ": there is no such flag for the engine");
        }
        const common_arg & option = *found->second;
        const size_t n_values = option.handler_str_str ? 2 : takes_value(option) ? 1 : 0;
        if (arguments.size() - i <= n_values) {
            throw std::invalid_argument(name + ": it takes a value");
        }
        try {
            if (option.handler_void) {
                option.handler_void(context.params);
            } else if (option.handler_bool) {
                option.handler_bool(context.params, !negative);
            } else if (option.handler_int) {
                option.handler_int(context.params, std::stoi(arguments[i + 1]));
            } else if (option.handler_string) {
                option.handler_string(context.params, arguments[i + 1]);
            } else {
                option.handler_str_str(context.params, arguments[i + 1], arguments[i + 2]);
            }
        } catch (const std::exception & e) {
            const std::string what = e.what();
            const bool is_number = what == "stoi" || what == "stof" || what == "stod" || what == "stoull";
            throw std::invalid_argument(name + ": " + (is_number ? arguments[i + 1] + " is no number for it" : what));
        }
        i += n_values;
    }
    for (const common_adapter_lora_info & adapter : params.lora_adapters) {
        known_scale(adapter.scale);
    }
    complete(params);
    return params;
}

} // namespace superllama
