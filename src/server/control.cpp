#include "server/control.h"

#include "api/budget_text.h"
#include "server-context.h"
#include "server/answers.h"
#include "server/lease.h"
#include "server/lifecycle.h"
#include "server/prometheus.h"
#include "superllama.h"
#include "telemetry/metrics.h"

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <vector>

namespace superllama {

using vram_budgets = std::array<uint64_t, SUPERLLAMA_MAX_DEVICES>;
using handler_t = server_http_context::handler_t;

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

static json experts_of(const llama_model * model) {
    std::vector<superllama_expert> experts((size_t) std::max(0, superllama_experts(model, nullptr, 0)));
    superllama_experts(model, experts.data(), (int32_t) experts.size());
    return json::parse(experts_json(experts));
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

static json status_of(lifecycle & life, const llama_context * ctx) {
    const lifecycle::facts now = life.now();
    json found = { { "version", superllama_version() },
                   { "upstream_build", superllama_upstream_build() },
                   { "state", now.state },
                   { "requests_in_flight", now.n_requests } };
    if (!now.reason.empty()) {
        found["reason"] = now.reason;
    }
    if (life.pool() != nullptr) {
        found["pool"] = pool_json(life.pool()->table());
    }
    if (ctx != nullptr) {
        const llama_model * model = model_of(ctx);
        found["layers"] = layers_of(model);
        found["dynamic_layers"] = !found.at("layers").empty();
        found["memory_used_bytes"] = bytes_in_use(model);
        found["metrics"] = metrics_of(ctx);
        found["n_ctx"] = llama_n_ctx(ctx);
    } else {
        found["layers"] = json::array();
        found["dynamic_layers"] = false;
        found["memory_used_bytes"] = 0;
    }
    return found;
}

static server_http_res_ptr answered_status(lifecycle & life, bool is_so, bool with_experts = false) {
    const held_context held(life);
    json found = status_of(life, held.get());
    if (with_experts && held.get() != nullptr) {
        found["experts"] = experts_of(model_of(held.get()));
    }
    return answered(is_so ? 200 : 202, found);
}

// ------------------------------------------------------------------------------------------------ budgets

static vram_budgets vram_of(const json & value) {
    std::string list;
    if (value.is_array()) {
        for (size_t i = 0; i < value.size(); i++) {
            list += (i == 0 ? "" : ",") + size_text(value.at(i), "vram_budget");
        }
    } else {
        list = size_text(value, "vram_budget");
    }
    vram_budgets bytes{};
    parse_vram_budget(list.c_str(), bytes.data());
    return bytes;
}

static void change(llama_model * model, const json & asked) {
    uint64_t mem = 0;
    vram_budgets vram{};
    const bool has_mem = asked.contains("mem_budget"), has_vram = asked.contains("vram_budget");
    if (has_mem) {
        mem = mem_budget_of(asked.at("mem_budget"));
    }
    if (has_vram) {
        vram = vram_of(asked.at("vram_budget"));
    }
    if (superllama_set_budgets(model, has_mem ? &mem : nullptr, has_vram ? vram.data() : nullptr) < 0) {
        throw std::invalid_argument(superllama_last_error());
    }
}

static void check_names(const json & asked) {
    if (!asked.is_object() || asked.empty()) {
        throw std::invalid_argument("the body is an object with \"mem_budget\", \"vram_budget\", or both");
    }
    for (const auto & entry : asked.items()) {
        if (entry.k != "mem_budget" && entry.k != "vram_budget" && entry.k != "model") { // which a router has read
            throw std::invalid_argument("there is no budget \"" + entry.k + "\"; there are mem_budget and vram_budget");
        }
    }
}

static server_http_res_ptr change_budgets(lifecycle & life, const server_http_req & req) {
    const json asked = json::parse(req.body);
    check_names(asked);
    const held_context held(life);
    if (held.get() == nullptr) {
        return refused("the server's memory is given back; POST /superllama/resume, then change its budget",
                       ERROR_TYPE_UNAVAILABLE);
    }
    if (life.pool() != nullptr) {
        return refused(
            "this model shares its memory with the others of its router, whose budget can be changed: without "
            "\"model\"",
            ERROR_TYPE_NOT_SUPPORTED);
    }
    llama_model * model = model_of(held.get());
    if (superllama_layers(model, nullptr, 0) == 0) {
        return refused("the model was loaded without dynamic layers; start the server with --mem-budget",
                       ERROR_TYPE_NOT_SUPPORTED);
    }
    change(model, asked);
    uint64_t budget_bytes = 0;
    vram_budgets vram{};
    superllama_budgets(model, &budget_bytes, vram.data());
    // a batch that runs gives back what is too much before its next one
    const bool is_so = soon([&] { return budget_bytes == 0 || bytes_in_use(model) <= (int64_t) budget_bytes; });
    return answered(is_so ? 200 : 202, status_of(life, held.get()));
}

// ------------------------------------------------------------------------------------------------ routes

// Of a route that changes something: who may, and what there is to change.
static handler_t changing(lifecycle & life, const common_params & params,
                          std::function<server_http_res_ptr(const server_http_req &)> change) {
    return [&life, &params, change = std::move(change)](const server_http_req & req) {
        if (server_http_res_ptr no = refused_to_other_sites(req)) {
            return no;
        }
        if (params.sleep_idle_seconds >= 0) {
            return refused("a server with --sleep-idle-seconds cannot be changed; start it with --idle-release",
                           ERROR_TYPE_NOT_SUPPORTED);
        }
        return change(req);
    };
}

static server_http_res_ptr health(const lifecycle & life) {
    const lifecycle::facts now = life.now();
    const std::string state = now.state;
    if (state == "ready") {
        return answered(200, { { "status", "ok" } });
    }
    if (state == "released" || state == "resuming") { // it answers, if not at once
        return answered(200, { { "status", "ok" }, { "state", state } });
    }
    const std::string why = now.reason.empty() ? "the server is " + state : now.reason;
    const json error = format_error_response(why, ERROR_TYPE_UNAVAILABLE);
    return answered(503, { { "status", state }, { "error", error } });
}

static server_http_res_ptr metrics(lifecycle & life, const handler_t & upstream, const server_http_req & req) {
    server_http_res_ptr res = upstream(req);
    if (res->status == 200 && refused_to_other_sites(req) == nullptr) { // they may read llama.cpp's part, as always
        const held_context held(life);
        res->data += prometheus_text(status_of(life, held.get()), life.now().n_refused);
    }
    return res;
}

std::map<std::string, handler_t> control_routes(lifecycle & life, const common_params & params,
                                                const server_routes & routes) {
    const auto post = [&](std::function<server_http_res_ptr(const server_http_req &)> change) {
        return changing(life, params, std::move(change));
    };
    return {
        { "GET /health", [&life](const server_http_req &) { return health(life); } },
        { "GET /metrics", [&life, upstream = routes.get_metrics](
                              const server_http_req & req) { return metrics(life, upstream, req); } },
        { "GET /superllama",
          [&life](const server_http_req & req) {
              if (server_http_res_ptr no = refused_to_other_sites(req)) { // upstream lets pages of all sites read
                  return no;
              }
              return answered_status(life, true, !req.get_param("experts").empty() && req.get_param("experts") != "0");
          } },
        { "GET /superllama/ui",
          [](const server_http_req &) {
              auto res = std::make_unique<server_http_res>();
              res->content_type = "text/html; charset=utf-8";
              res->data = control_page;
              res->headers["Content-Security-Policy"] =
                  "frame-ancestors 'none'"; // the page's own policy cannot say that
              return res;
          } },
        { "POST /superllama/budget", post([&life](const server_http_req & req) { return change_budgets(life, req); }) },
        { "POST /superllama/drain",
          post([&life](const server_http_req &) { return answered_status(life, life.drain(patience_ms)); }) },
        { "POST /superllama/pause",
          post([&life](const server_http_req &) { return answered_status(life, life.pause(patience_ms)); }) },
        { "POST /superllama/resume",
          post([&life](const server_http_req &) { return answered_status(life, life.resume(patience_ms)); }) },
    };
}

} // namespace superllama
