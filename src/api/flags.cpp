#include "api/flags.h"

#include "arg.h"
#include "common.h"
#include "log.h"
#include "api/budget_text.h"
#include "api/end_reason.h"
#include "telemetry/metrics_sink.h"
#include "superllama.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>

namespace superllama {

superllama_model_params flags_model_defaults() {
    return llama_model_default_params().superllama;
}

bool flags::pages() const {
    return paged_kv || kv_budget_bytes != 0;
}

const char * flags::implies_layers() const {
    const uint64_t * devices = model.vram_budget_bytes;
    const bool of_devices = std::any_of(devices, devices + SUPERLLAMA_MAX_DEVICES, [](uint64_t b) { return b != 0; });
    return model.mem_budget_bytes != 0        ? "--mem-budget"
           : of_devices                       ? "--vram-budget"
           : model.async_prefetch && !pages() ? "--async-prefetch"
                                              : nullptr;
}

// Said once in a process, however many models it loads: it is about the command line.
static void say_what_is_implied(const flags & f) {
    static std::once_flag once;
    std::call_once(once, [&] {
        if (!f.model.dynamic_layers && f.implies_layers() != nullptr) {
            LOG_INF("%s switches on --dynamic-layers, without which it has no effect\n", f.implies_layers());
        }
        if (!f.paged_kv && f.pages()) {
            LOG_INF("--kv-budget switches on --paged-kv, without which it has no effect\n");
        }
    });
}

bool flags::apply(llama_model_params & params) const {
    say_what_is_implied(*this);
    params.superllama = model;
    params.superllama.dynamic_layers = model.dynamic_layers || implies_layers() != nullptr;
    return params.superllama.dynamic_layers;
}

void flags::apply(llama_context_params & params) const {
    params.superllama.metrics = metrics;
    params.superllama.metrics_pretty = metrics_pretty;
    params.superllama.metrics_interval_ms = metrics_interval_ms;
    params.superllama.metrics_file = metrics_file.empty() ? nullptr : metrics_file.c_str();
    params.superllama.paged_kv = pages();
    params.superllama.kv_page_size = kv_page_size;
    params.superllama.kv_budget_bytes = kv_budget_bytes;
    params.superllama.spill_dir = spill_dir.empty() ? nullptr : spill_dir.c_str();
    params.superllama.adapt_threads = adapt_threads;
    params.superllama.async_prefetch = model.async_prefetch;
    params.superllama.prefetch_threads = model.prefetch_threads;
}

// Fails before anything is loaded.
static void check_folder(const std::string & path) {
    if (path.empty()) {
        throw std::invalid_argument("\"\" is no folder; name one that exists and is writable");
    }
    const std::string probe = path + "/superllama-spill-check";
    FILE * file = fopen(probe.c_str(), "wx");
    if (file == nullptr && errno != EEXIST) {
        throw std::invalid_argument("cannot write in " + path + ": " + strerror(errno) +
                                    "; name a folder that exists and is writable");
    }
    if (file != nullptr) {
        fclose(file);
        remove(probe.c_str());
    }
}

static float parse_mark(const std::string & value) {
    double mark = 0;
    const char * end = parse_number(value.c_str(), &mark);
    if (end == nullptr || *end != '\0' || !(mark <= 1.0)) {
        throw std::invalid_argument("\"" + value + "\" is not a number in the range 0.0 to 1.0");
    }
    return (float) mark;
}

static std::vector<common_arg> superllama_options() {
    std::vector<common_arg> options;
    const auto add = [&](common_arg arg) { options.push_back(std::move(arg)); };

    add(common_arg({ "--dynamic-layers" },
                   "place layers on devices, in host memory or on disk and move them with memory pressure; runs models "
                   "larger than memory; --gpu-layers is the most layers that go to devices, counted from the output, "
                   "--tensor-split the most for each device; tensors that --override-tensor (=CPU only) or --cpu-moe "
                   "pins stay on the host, the rest of their layer moves (default: disabled)",
                   [](common_params & params) { params.superllama.model.dynamic_layers = true; })
            .set_env("LLAMA_ARG_DYNAMIC_LAYERS"));
    add(common_arg({ "--async-prefetch" },
                   "read layers, experts and KV pages ahead in worker threads; without it every load waits where it is "
                   "needed; "
                   "implies --dynamic-layers where there is no --paged-kv (default: disabled)",
                   [](common_params & params) { params.superllama.model.async_prefetch = true; })
            .set_env("LLAMA_ARG_ASYNC_PREFETCH"));
    add(common_arg({ "--prefetch-threads" }, "N", "read workers, 1 to 64 (default: 6)",
                   [](common_params & params, int value) {
                       if (value < 1 || value > 64) {
                           throw std::invalid_argument(std::to_string(value) + " is not in the range 1 to 64");
                       }
                       params.superllama.model.prefetch_threads = value;
                   })
            .set_env("LLAMA_ARG_PREFETCH_THREADS"));
    add(common_arg(
            { "--mem-budget" }, "SIZE",
            "hard cap on host memory for weights, KV and compute buffers; implies --dynamic-layers unless auto; 8GiB, "
            "512MiB, 60% of the memory that this process may use, or auto = high mark x what is available (default: "
            "auto)",
            [](common_params & params, const std::string & value) {
                params.superllama.model.mem_budget_bytes = parse_budget(value.c_str());
            })
            .set_env("LLAMA_ARG_MEM_BUDGET"));
    add(common_arg({ "--vram-budget" }, "SIZE[,SIZE...]",
                   "hard cap on weights, KV and compute buffers on each device, in the order of --device; the last one "
                   "holds for all devices that follow; implies --dynamic-layers unless auto; 8GiB, 512MiB, 0 = no "
                   "layers, or auto = high mark x what is free (default: auto)",
                   [](common_params & params, const std::string & value) {
                       parse_vram_budget(value.c_str(), params.superllama.model.vram_budget_bytes);
                   })
            .set_env("LLAMA_ARG_VRAM_BUDGET"));
    add(common_arg(
            { "--expert-misses" }, "send|share",
            "with --dynamic-layers, of a mixture of experts that is larger than the devices: send the experts that are "
            "chosen and that a device lacks there, so that results do not depend on what it holds (send), or have the "
            "processor compute some of them meanwhile, which changes last digits (share) (default: send)",
            [](common_params & params, const std::string & value) {
                if (value != "send" && value != "share") {
                    throw std::invalid_argument("\"" + value + "\" is neither send nor share");
                }
                params.superllama.model.expert_misses =
                    value == "send" ? SUPERLLAMA_EXPERT_MISSES_SEND : SUPERLLAMA_EXPERT_MISSES_SHARE;
            })
            .set_env("LLAMA_ARG_EXPERT_MISSES"));
    add(common_arg(
            { "--mem-pressure" }, "F",
            "with --dynamic-layers: share of memory in use above which layers are evicted, 0.0 to 1.0 (default: 0.85)",
            [](common_params & params, const std::string & value) {
                params.superllama.model.mem_pressure = parse_mark(value);
            })
            .set_env("LLAMA_ARG_MEM_PRESSURE"));
    add(common_arg({ "--mem-pressure-low" }, "F",
                   "with --dynamic-layers: share of memory in use below which layers are loaded back, less than "
                   "--mem-pressure (default: 0.70)",
                   [](common_params & params, const std::string & value) {
                       params.superllama.model.mem_pressure_low = parse_mark(value);
                   })
            .set_env("LLAMA_ARG_MEM_PRESSURE_LOW"));
    add(common_arg(
            { "--layer-policy" }, "pin|lru",
            "with --dynamic-layers: keep a fixed set of dense layers in memory and stream the rest (pin), or evict "
            "what was used longest ago (lru) (default: pin)",
            [](common_params & params, const std::string & value) {
                if (value != "pin" && value != "lru") {
                    throw std::invalid_argument("\"" + value + "\" is neither pin nor lru");
                }
                params.superllama.model.layer_policy =
                    value == "pin" ? SUPERLLAMA_LAYER_POLICY_PIN : SUPERLLAMA_LAYER_POLICY_LRU;
            })
            .set_env("LLAMA_ARG_LAYER_POLICY"));
    add(common_arg({ "--paged-kv" },
                   "KV cache in pages: memory only for what is used, spilled to disk over the budget, exact "
                   "(default: disabled)",
                   [](common_params & params) { params.superllama.paged_kv = true; })
            .set_env("LLAMA_ARG_PAGED_KV"));
    add(common_arg({ "--kv-page-size" }, "N", "with --paged-kv: cells per page, 16 to 8192 (default: 256)",
                   [](common_params & params, int value) {
                       if (value < 16 || value > 8192) {
                           throw std::invalid_argument(std::to_string(value) + " is not in the range 16 to 8192");
                       }
                       params.superllama.kv_page_size = value;
                   })
            .set_env("LLAMA_ARG_KV_PAGE_SIZE"));
    add(common_arg(
            { "--kv-budget" }, "SIZE",
            "memory that KV pages may hold; implies --paged-kv unless auto; 8GiB, 512MiB, 60% of the memory that "
            "this process may use, or auto = half of what is available (default: auto)",
            [](common_params & params, const std::string & value) {
                params.superllama.kv_budget_bytes = parse_budget(value.c_str());
            })
            .set_env("LLAMA_ARG_KV_BUDGET"));
    add(common_arg({ "--spill-dir" }, "PATH",
                   "with --paged-kv: folder of the file that pages spill to (default: the temporary folder)",
                   [](common_params & params, const std::string & value) {
                       check_folder(value);
                       params.superllama.spill_dir = value;
                   })
            .set_env("LLAMA_ARG_SPILL_DIR"));
    add(common_arg(
            { "--adapt-threads" }, "exact|on|off",
            "compute with fewer threads while other processes keep cores busy; --threads is the most: exact = "
            "with --dynamic-layers or --paged-kv, as long as no bit of a result depends on it, on = always, off = "
            "never (default: exact)",
            [](common_params & params, const std::string & value) {
                const std::map<std::string, superllama_adapt_threads> modes = {
                    { "exact", SUPERLLAMA_ADAPT_THREADS_EXACT },
                    { "on", SUPERLLAMA_ADAPT_THREADS_ON },
                    { "off", SUPERLLAMA_ADAPT_THREADS_OFF },
                };
                if (modes.count(value) == 0) {
                    throw std::invalid_argument("\"" + value + "\" is not exact, on or off");
                }
                params.superllama.adapt_threads = modes.at(value);
            })
            .set_env("LLAMA_ARG_ADAPT_THREADS"));
    add(common_arg(
            { "--rpc-secret" }, "FILE",
            "secret that is shared with RPC servers, before the --rpc that names them: both sides prove that they "
            "know the content of this file, 16 to 4096 bytes, and show it to nobody (default: none)",
            [](common_params &, const std::string & value) {
                ggml_backend_load_all();
                if (superllama_rpc_secret(nullptr, value.c_str()) != 0) {
                    throw std::invalid_argument(superllama_last_error());
                }
            })
            .set_env("LLAMA_ARG_RPC_SECRET"));
    add(common_arg(
            { "--idle-release" }, "SECONDS",
            "when nothing was asked for that long, give the memory back, of the host and of devices; conversations "
            "wait on disk, in --spill-dir, and the next request takes it all again (default: never)",
            [](common_params & params, int value) {
                if (value < 0) {
                    throw std::invalid_argument("must be 0 or more seconds, got " + std::to_string(value));
                }
                params.superllama.idle_release_s = value;
            })
            .set_examples({ LLAMA_EXAMPLE_SERVER })
            .set_env("LLAMA_ARG_IDLE_RELEASE"));
    add(common_arg(
            { "--mem-share" }, "N",
            "of a router's models, which share its --mem-budget: the weight of this one's share while several are "
            "active, 1 to 1000 (default: 1)",
            [](common_params & params, int value) {
                if (value < 1 || value > 1000) {
                    throw std::invalid_argument(std::to_string(value) + " is not in the range 1 to 1000");
                }
                params.superllama.mem_share = value;
            })
            .set_examples({ LLAMA_EXAMPLE_SERVER })
            .set_env("LLAMA_ARG_MEM_SHARE"));
    add(common_arg(
            { "--mem-least" }, "SIZE",
            "of a router's models: what this one keeps of their memory while it is loaded (default: the least that "
            "works)",
            [](common_params & params, const std::string & value) {
                params.superllama.mem_least_bytes = parse_budget(value.c_str());
            })
            .set_examples({ LLAMA_EXAMPLE_SERVER })
            .set_env("LLAMA_ARG_MEM_LEAST"));
    add(common_arg({ "--metrics" },
                   "print JSON metrics to stderr, each line prefixed \"[METRICS] \" (default: disabled)",
                   [](common_params & params) { params.superllama.metrics = true; })
            .set_excludes({ LLAMA_EXAMPLE_SERVER }) // there --metrics is the Prometheus endpoint
            .set_env("LLAMA_ARG_METRICS"));
    add(common_arg({ "--metrics-file" }, "PATH", "append JSON metrics to PATH, one object a line; implies metrics",
                   [](common_params & params, const std::string & value) {
                       check_metrics_path(value);
                       params.superllama.metrics_file = value;
                   })
            .set_env("LLAMA_ARG_METRICS_FILE"));
    add(common_arg({ "--metrics-interval" }, "MS",
                   "at most one periodic metrics line per MS milliseconds; events are never held back (default: 1000)",
                   [](common_params & params, int value) {
                       if (value < 0) {
                           throw std::invalid_argument("must be 0 or more milliseconds, got " + std::to_string(value));
                       }
                       params.superllama.metrics_interval_ms = value;
                   })
            .set_env("LLAMA_ARG_METRICS_INTERVAL"));
    add(common_arg({ "--metrics-pretty" }, "indent the JSON of metrics instead of one line each (default: disabled)",
                   [](common_params & params) { params.superllama.metrics_pretty = true; })
            .set_env("LLAMA_ARG_METRICS_PRETTY"));
    return options;
}

// Those of one program; LLAMA_EXAMPLE_COMMON: those of any.
static std::vector<common_arg> options_of(llama_example program) {
    std::vector<common_arg> found;
    for (common_arg & option : superllama_options()) {
        const bool is_for_it = option.in_example(program) || option.in_example(LLAMA_EXAMPLE_COMMON);
        if (is_for_it && !option.is_exclude(program)) {
            found.push_back(std::move(option));
        }
    }
    return found;
}

void add_flags(common_params_context & ctx) {
    tell_reasons();
    if (ctx.ex == LLAMA_EXAMPLE_DOWNLOAD) {
        return; // loads no model
    }
    for (common_arg & arg : options_of(ctx.ex)) {
        // of variables of the environment, too, the secret is read before the servers that it is for
        const bool first = strcmp(arg.args[0], "--rpc-secret") == 0;
        ctx.options.insert(first ? ctx.options.begin() : ctx.options.end(), std::move(arg));
    }
}

bool is_our_flag(const common_arg & arg) {
    static const std::vector<common_arg> ours = superllama_options();
    for (const common_arg & option : ours) {
        // the environment variable tells our --metrics from the server's
        if (arg.env != nullptr && strcmp(arg.env, option.env) == 0) {
            return true;
        }
    }
    return false;
}

// ------------------------------------------------------------- for programs that parse their own command line

static void call_handler(const common_arg & option, common_params & params, const char * value) {
    if (option.handler_void != nullptr) {
        option.handler_void(params);
    } else if (option.handler_int != nullptr) {
        const std::string text = value;
        size_t n_read = 0;
        const int number = std::stoi(text, &n_read);
        if (n_read != text.size()) {
            throw std::invalid_argument("not a whole number");
        }
        option.handler_int(params, number);
    } else {
        option.handler_string(params, value);
    }
}

int take_flags(int argc, char ** argv, flags & args) {
    tell_reasons();
    const std::vector<common_arg> options = options_of(LLAMA_EXAMPLE_COMMON);
    common_params params;

    const auto fail = [&](const char * name, const std::string & what) {
        fprintf(stderr, "error: %s: %s\n", name, what.c_str());
        exit(1);
    };
    const auto try_handler = [&](const common_arg & option, const char * name, const char * value) {
        try {
            call_handler(option, params, value);
        } catch (const std::exception & e) {
            fail(name, std::string(value ? value : "") + ": " + e.what());
        }
    };

    for (const common_arg & option : options) {
        std::string value;
        if (option.get_value_from_env(value) &&
            (option.handler_void == nullptr || common_arg_utils::is_truthy(value))) {
            try_handler(option, option.env, value.c_str());
        }
    }

    int n_kept = 1;
    for (int i = 1; i < argc; ++i) {
        const common_arg * option = nullptr;
        for (const common_arg & candidate : options) {
            option = strcmp(argv[i], candidate.args[0]) == 0 ? &candidate : option;
        }
        if (option == nullptr) {
            argv[n_kept++] = argv[i];
            continue;
        }
        const char * name = argv[i];
        if (option->handler_void == nullptr && i + 1 == argc) {
            fail(name, "expected a value");
        }
        try_handler(*option, name, option->handler_void == nullptr ? argv[++i] : nullptr);
    }
    argv[n_kept] = nullptr;

    args = params.superllama;
    return n_kept;
}

void print_flags() {
    printf("\n----- superllama params -----\n\n");
    for (const common_arg & option : options_of(LLAMA_EXAMPLE_COMMON)) {
        printf("%s", option.to_string().c_str());
    }
}

} // namespace superllama
