#include "api/control.h"

#include "api/budget_text.h"
#include "server-context.h"
#include "superllama.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <chrono>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

namespace superllama {

using vram_budgets = std::array<uint64_t, SUPERLLAMA_MAX_DEVICES>;

static server_http_res_ptr answered(int status, const json & body) {
    auto res = std::make_unique<server_http_res>();
    res->status = status;
    res->data = safe_json_to_str(body);
    return res;
}

static server_http_res_ptr refused(const std::string & why, error_type type) {
    const json error = format_error_response(why, type);
    return answered(json_value(error, "code", 500), { { "error", error } });
}

// A server that sleeps frees its context, at a time of its own.
static llama_context * context_of(const common_params & params, const server_context & server) {
    if (params.sleep_idle_seconds >= 0) {
        throw std::invalid_argument("a server with --sleep-idle-seconds has no control plane");
    }
    return server.get_llama_context();
}

static llama_model * model_of(const llama_context * ctx) {
    return const_cast<llama_model *>(llama_get_model(ctx));
}

// ------------------------------------------------------------------------------------------------ status

static json layers_of(const llama_model * model) {
    static const char * const tiers[] = { "host", "disk", "device" };
    std::vector<superllama_layer> layers((size_t) std::max(0, superllama_layers(model, nullptr, 0)));
    superllama_layers(model, layers.data(), (int32_t) layers.size());
    json found = json::array();
    for (const auto & layer : layers) {
        const bool on_device = layer.tier == SUPERLLAMA_TIER_DEVICE;
        found.push_back({ { "index", layer.index },
                          { "tier", tiers[on_device                            ? 2
                                          : layer.tier == SUPERLLAMA_TIER_DISK ? 1
                                                                               : 0] },
                          { "bytes", layer.bytes },
                          { "bytes_resident", layer.bytes_resident },
                          { "loads", layer.n_loads },
                          { "evictions", layer.n_evictions },
                          { "device", on_device ? json(layer.device) : json(nullptr) } });
    }
    return found;
}

static json metrics_of(const llama_context * ctx) {
    std::string text(8192, '\0');
    for (;;) {
        const int32_t n = superllama_metrics_json(ctx, &text[0], text.size());
        if (n < 0) {
            throw std::runtime_error(superllama_last_error());
        }
        if ((size_t) n < text.size()) {
            text.resize((size_t) n);
            return json::parse(text);
        }
        text.resize((size_t) n + 1);
    }
}

static int64_t bytes_in_use(const llama_model * model) {
    int64_t by_tag[SUPERLLAMA_N_MEMORY_TAGS];
    return superllama_memory_by_tag(model, by_tag) < 0
               ? 0
               : std::accumulate(std::begin(by_tag), std::end(by_tag), int64_t(0));
}

static json status_of(const llama_context * ctx) {
    const llama_model * model = model_of(ctx);
    const json layers = layers_of(model);
    return { { "version", superllama_version() },   { "upstream_build", superllama_upstream_build() },
             { "dynamic_layers", !layers.empty() }, { "memory_used_bytes", bytes_in_use(model) },
             { "metrics", metrics_of(ctx) },        { "layers", layers } };
}

server_http_context::handler_t control_status(const common_params & params, server_context & server) {
    return [&](const server_http_req &) { return answered(200, status_of(context_of(params, server))); };
}

// ------------------------------------------------------------------------------------------------ budgets

static std::string as_text(const json & value, const char * name) {
    if (value.is_string()) {
        return value.get<std::string>();
    }
    if (value.is_number_integer() && value.get<int64_t>() >= 0) {
        return std::to_string(value.get<int64_t>());
    }
    throw std::invalid_argument(std::string(name) +
                                " is a number of bytes, or a text such as \"8GiB\", \"60%\" or \"auto\"");
}

static vram_budgets vram_of(const json & value) {
    std::string list;
    if (value.is_array()) {
        for (size_t i = 0; i < value.size(); i++) {
            list += (i == 0 ? "" : ",") + as_text(value.at(i), "vram_budget");
        }
    } else {
        list = as_text(value, "vram_budget");
    }
    vram_budgets bytes{};
    parse_vram_budget(list.c_str(), bytes.data());
    return bytes;
}

// The budgets of one server, as they were given last: what is put back where a part of a change fails.
struct last_given {
    explicit last_given(const superllama_model_params & flags) : mem(flags.mem_budget_bytes) {
        std::copy_n(flags.vram_budget_bytes, vram.size(), vram.begin());
    }
    std::mutex one_at_a_time;
    uint64_t mem;
    vram_budgets vram{};
};

static uint64_t mem_of(const json & value) {
    const std::string text = as_text(value, "mem_budget");
    try {
        return parse_budget(text.c_str());
    } catch (const std::invalid_argument & e) {
        throw std::invalid_argument(std::string("mem_budget: ") + e.what());
    }
}

static void change(llama_model * model, const json & asked, last_given & last) {
    const bool mem = asked.contains("mem_budget"), vram = asked.contains("vram_budget");
    const uint64_t mem_bytes = mem ? mem_of(asked.at("mem_budget")) : last.mem;
    const vram_budgets vram_bytes = vram ? vram_of(asked.at("vram_budget")) : last.vram;
    if (mem && superllama_set_budget(model, mem_bytes) < 0) {
        throw std::invalid_argument(std::string("mem_budget: ") + superllama_last_error());
    }
    if (vram && superllama_set_vram_budget(model, vram_bytes.data()) < 0) {
        const std::string why = superllama_last_error();
        superllama_set_vram_budget(model, last.vram.data());
        if (mem) {
            superllama_set_budget(model, last.mem);
        }
        throw std::invalid_argument("vram_budget: " + why);
    }
    last.mem = mem_bytes;
    last.vram = vram_bytes;
}

static void check_names(const json & asked) {
    if (!asked.is_object() || asked.empty()) {
        throw std::invalid_argument("the body is an object with \"mem_budget\", \"vram_budget\", or both");
    }
    for (const auto & entry : asked.items()) {
        if (entry.k != "mem_budget" && entry.k != "vram_budget") {
            throw std::invalid_argument("there is no budget \"" + entry.k + "\"; there are mem_budget and vram_budget");
        }
    }
}

// A batch that runs gives back what is too much before its next one.
static bool becomes_true(const llama_model * model, int64_t budget_bytes, std::chrono::seconds patience) {
    const auto end = std::chrono::steady_clock::now() + patience;
    while (budget_bytes > 0 && bytes_in_use(model) > budget_bytes) {
        if (std::chrono::steady_clock::now() > end) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return true;
}

// A page of another site, in the browser of whoever may use this server, can send a request, if not read the answer.
static bool is_of_another_site(const server_http_req & req) {
    for (const auto & header : req.headers) {
        std::string name = header.first;
        std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return (char) tolower(c); });
        if (name == "sec-fetch-site" && header.second != "same-origin" && header.second != "none") {
            return true;
        }
    }
    return false;
}

server_http_context::handler_t control_budget(const common_params & params, server_context & server) {
    const auto last = std::make_shared<last_given>(params.superllama.model);
    return [&params, &server, last](const server_http_req & req) {
        if (is_of_another_site(req)) {
            return refused("a page of another site may not change budgets", ERROR_TYPE_PERMISSION);
        }
        const llama_context * ctx = context_of(params, server);
        llama_model * model = model_of(ctx);
        const json asked = json::parse(req.body);
        check_names(asked);
        if (superllama_layers(model, nullptr, 0) == 0) {
            return refused("the model was loaded without dynamic layers; start the server with --mem-budget",
                           ERROR_TYPE_NOT_SUPPORTED);
        }
        const std::lock_guard<std::mutex> lock(last->one_at_a_time);
        change(model, asked, *last);
        const bool is_true = becomes_true(model, (int64_t) last->mem, std::chrono::seconds(10));
        return answered(is_true ? 200 : 202, status_of(ctx));
    };
}

} // namespace superllama
