// The engine behind superllama-engine.h: upstream's server without its HTTP. One thread runs the slots, as the main
// thread of llama-server does; each request has a worker, as each connection has there.
#include "superllama-engine.h"

#include "server/control.h"
#include "server/lifecycle.h"
#include "server/logits.h"
#include "server/projector.h"
#include "server/slots.h"
#include "arg.h"
#include "engine/last_error.h"
#include "engine/options.h"
#include "engine/request.h"
#include "engine/workers.h"
#include "base/assert_guard.h"
#include "server-context.h"
#include "speculative.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

using superllama::request;

struct superllama_request {
    std::shared_ptr<request> shared; // with the worker
};

struct superllama_engine {
    explicit superllama_engine(common_params given) : params(std::move(given)), routes(params, server) {}

    void add_routes();
    void answer(request & asked);

    common_params params; // the routes refer to it
    server_context server;
    server_routes routes;
    superllama::lifecycle life{ params, server, routes, false };
    std::map<std::string, server_http_context::handler_t> handlers; // by method and path
    std::atomic<bool> stopping{ false };
    std::mutex mutex;
    std::string failure; // why the thread of the slots ended by itself
    bool ended = false;  // that thread
    std::condition_variable changed;
    std::thread slots;
    superllama::workers workers; // ends before what it works with
};

// -------------------------------------------------------------------------------------------------- errors

using superllama::engine_error;

static std::string error_body(int code, const char * type, const std::string & message) {
    const json error = { { "code", code }, { "type", type }, { "message", message } };
    return safe_json_to_str({ { "error", error } });
}

// -------------------------------------------------------------------------------------------------- requests

static bool split(const std::string & text, char at, std::string & head, std::string & tail) {
    const size_t found = text.find(at);
    if (found == std::string::npos) {
        return false;
    }
    const std::string whole = text;
    head = whole.substr(0, found);
    tail = whole.substr(found + 1);
    return true;
}

static std::map<std::string, std::string> query_parameters(std::string query) {
    std::map<std::string, std::string> found;
    while (!query.empty()) {
        std::string pair = query, name, value;
        if (!split(query, '&', pair, query)) {
            query.clear();
        }
        if (split(pair, '=', name, value)) {
            found[name] = value;
        }
    }
    return found;
}

void superllama_engine::add_routes() {
    handlers = {
        { "GET /props", routes.get_props },
        { "GET /slots", routes.get_slots },
        { "POST /slots", routes.post_slots },
        { "GET /v1/models", routes.get_models },
        { "GET /lora-adapters", routes.get_lora_adapters },
        { "POST /lora-adapters", routes.post_lora_adapters },
        { "POST /completion", routes.post_completions },
        { "POST /v1/completions", routes.post_completions_oai },
        { "POST /v1/chat/completions", routes.post_chat_completions },
        { "POST /v1/chat/completions/input_tokens", routes.post_chat_completions_tok },
        { "POST /v1/responses", routes.post_responses_oai },
        { "POST /v1/messages", routes.post_anthropic_messages },
        { "POST /infill", routes.post_infill },
        { "POST /embeddings", routes.post_embeddings },
        { "POST /v1/embeddings", routes.post_embeddings_oai },
        { "POST /v1/rerank", routes.post_rerank },
        { "POST /tokenize", routes.post_tokenize },
        { "POST /detokenize", routes.post_detokenize },
        { "POST /apply-template", routes.post_apply_template },
    };
    for (const auto & route : superllama::control_routes(life, params, routes)) {
        handlers[route.first] = route.second;
    }
}

// Runs in a worker. Whatever goes wrong is the answer.
void superllama_engine::answer(request & asked) {
    const std::function<bool()> should_stop = [&] { return stopping || asked.cancelled(); };
    const auto refuse = [&](int code, const char * type, const std::string & message) {
        asked.give(code, error_body(code, type, message));
        asked.end(code);
    };
    const auto stopped = [&] {
        if (!stopping) {
            return refuse(499, "cancelled", "the request was cancelled");
        }
        const std::lock_guard<std::mutex> lock(mutex);
        refuse(503, "unavailable_error", failure.empty() ? "the engine was stopped" : failure);
    };
    try {
        std::string path = asked.path, query;
        split(path, '?', path, query);
        std::map<std::string, std::string> parameters = query_parameters(query);
        if (path.rfind("/slots/", 0) == 0) {
            parameters["id_slot"] = path.substr(7);
            path = "/slots";
        }
        const auto handler = handlers.find(asked.method + " " + path);
        if (handler == handlers.end()) {
            return refuse(404, "not_found_error", "the engine does not know " + asked.method + " " + path);
        }
        if (should_stop()) {
            return stopped();
        }
        if (asked.hook != nullptr && superllama::chooses_several_at_once(params)) {
            return refuse(400, "invalid_request_error",
                          "a function that changes logits is asked before each token, and with speculation, or with "
                          "sampling on a device, it would not be; make the engine without that");
        }
        const superllama::asks_with its_caller(
            asked.hook != nullptr ? std::make_shared<superllama::asker>(superllama::asker{ asked.hook, 0, {} })
                                  : nullptr);
        const server_http_req req{ parameters, {}, path, query, asked.body, {}, should_stop };
        const server_http_res_ptr res = life.answer(handler->second, req);
        if (res->is_stream()) {
            for (bool more = true; more;) {
                std::string piece;
                more = res->next(piece);
                if (!piece.empty()) {
                    asked.give(res->status, std::move(piece));
                }
            }
            res->on_complete();
            return should_stop() ? stopped() : asked.end(res->status);
        }
        res->on_complete();
        if (res->data.empty() && should_stop()) {
            return stopped();
        }
        asked.give(res->status, std::move(res->data));
        asked.end(res->status);
    } catch (const std::invalid_argument & e) {
        refuse(400, "invalid_request_error", e.what());
    } catch (const common_json_error & e) {
        refuse(400, "invalid_request_error", e.what());
    } catch (const std::exception & e) {
        refuse(500, "server_error", e.what());
    } catch (...) {
        refuse(500, "server_error", "an exception of an unknown kind");
    }
}

// ---------------------------------------------------------------------------------------------- start and end

static bool load(superllama_engine & engine, bool (*progress)(float, void *), void * user_data) {
    // upstream's loader asks this callback now and then, and has no other way to be stopped
    bool stopped = false;
    if (progress != nullptr) {
        engine.server.set_state_callback([&](server_state state, const json & payload) {
            if (state == SERVER_STATE_LOADING && !progress(json_value(payload, "value", 0.0f), user_data)) {
                stopped = true;
                throw std::runtime_error("stopped by the progress callback");
            }
        });
    }
    bool loaded = false;
    try {
        loaded = engine.server.load_model(engine.params);
    } catch (const std::exception & e) {
        engine_error = e.what();
        loaded = false;
    }
    engine.server.set_state_callback(nullptr);
    if (!loaded && engine_error.empty()) {
        engine_error = stopped ? "stopped by the progress callback" : "the library gives no reason";
    }
    return loaded;
}

static void run_slots(superllama_engine & engine) {
    std::string failure;
    try {
        // what upstream takes for granted ends the engine where it is not so, and not the process
        const superllama::assert_guard guard("the engine's slots contradict themselves");
        engine.server.start_loop();
    } catch (const std::exception & e) {
        failure = std::string("the engine has ended: ") + e.what();
    } catch (...) {
        failure = "the engine has ended: an exception of an unknown kind";
    }
    engine.stopping = true;
    const std::lock_guard<std::mutex> lock(engine.mutex);
    engine.failure = failure;
    engine.ended = true;
    engine.changed.notify_all();
}

extern "C" {

const char * superllama_engine_error(void) {
    return engine_error.c_str();
}

const char * superllama_engine_flags(void) {
    static const std::string list = superllama::list_of_flags();
    return list.c_str();
}

const char * superllama_engine_draft_type(const char * path) {
    static thread_local std::string name;
    name = common_speculative_type_to_str(COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE);
    try {
        const superllama::assert_guard guard("the draft model's file cannot be read");
        for (const auto type : common_speculative_types_from_gguf(path)) {
            name = common_speculative_type_to_str(type);
        }
    } catch (const std::exception &) {
        // what is wrong with the file is said when it is loaded
    }
    return name.c_str();
}

int64_t superllama_engine_projector_bytes(const char * path) {
    engine_error.clear();
    try {
        const superllama::assert_guard guard("the projector's file contradicts itself");
        common_params params;
        params.mmproj.path = path;
        return (int64_t) superllama::projector_bytes(params);
    } catch (const std::exception & e) {
        engine_error = e.what();
    }
    return -1;
}

struct superllama_engine * superllama_engine_start(int32_t n_arguments, const char * const * arguments,
                                                   bool (*progress)(float done, void * user_data), void * user_data) {
    engine_error.clear();
    try {
        static std::mutex one_at_a_time; // upstream's options and loader keep state for the process
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        auto engine = std::make_unique<superllama_engine>(
            superllama::params_of(std::vector<std::string>(arguments, arguments + n_arguments)));
        common_params & params = engine->params;
        common_log_set_verbosity_thold(params.verbosity);
        common_models_handler models = common_models_handler_init(params, LLAMA_EXAMPLE_SERVER);
        common_models_handler_apply(models, params);
        if (params.model.path.empty()) {
            throw std::invalid_argument("no model was named");
        }
        if (params.model_alias.empty()) {
            params.model_alias.insert(params.model.get_name());
        }
        superllama::requests_stop_themselves();
        superllama::switch_off(params);
        superllama::count_projector(params);
        llama_backend_init();
        llama_numa_init(params.numa);
        if (!load(*engine, progress, user_data)) {
            return nullptr;
        }
        engine->routes.update_meta(engine->server);
        engine->add_routes();
        engine->slots = std::thread([raw = engine.get()] { run_slots(*raw); });
        return engine.release();
    } catch (const std::exception & e) {
        engine_error = e.what();
    } catch (...) {
        engine_error = "an exception of an unknown kind";
    }
    return nullptr;
}

void superllama_engine_stop(struct superllama_engine * engine) {
    if (engine == nullptr) {
        return;
    }
    engine->stopping = true;
    engine->life.end();
    engine->workers.finish(); // those of requests hear it within a second
    {
        std::unique_lock<std::mutex> lock(engine->mutex);
        do { // a loop that is only about to begin would not have heard it
            engine->server.terminate();
        } while (!engine->changed.wait_for(lock, std::chrono::milliseconds(10), [&] { return engine->ended; }));
    }
    engine->slots.join();
    delete engine;
}

struct llama_context * superllama_engine_hold(struct superllama_engine * engine) {
    return engine->life.hold();
}

void superllama_engine_release(struct superllama_engine * engine) {
    engine->life.release();
}

struct superllama_request * superllama_engine_submit(struct superllama_engine * engine, const char * method,
                                                     const char * path, const char * body, size_t size) {
    return superllama_engine_submit_with(engine, method, path, body, size, nullptr, nullptr);
}

struct superllama_request * superllama_engine_submit_with(struct superllama_engine * engine, const char * method,
                                                          const char * path, const char * body, size_t size,
                                                          superllama_logits_callback logits, void * user_data) {
    engine_error.clear();
    try {
        auto handle = std::make_unique<superllama_request>();
        handle->shared = std::make_shared<request>(method, path, std::string(body, size));
        if (logits != nullptr) {
            handle->shared->hook = std::make_shared<superllama::logits_hook>(logits, user_data);
        }
        engine->workers.run([engine, shared = handle->shared] { engine->answer(*shared); });
        return handle.release();
    } catch (const std::exception & e) {
        engine_error = e.what();
    }
    return nullptr;
}

int superllama_request_next(struct superllama_request * request, int32_t timeout_ms, const char ** data,
                            size_t * size) {
    return request->shared->next(timeout_ms, data, size);
}

int superllama_request_status(const struct superllama_request * request) {
    return request->shared->status();
}

void superllama_request_cancel(struct superllama_request * request) {
    request->shared->cancel();
}

void superllama_request_free(struct superllama_request * request) {
    if (request != nullptr) {
        request->shared->cancel();
        if (request->shared->hook != nullptr) {
            request->shared->hook->close();
        }
        delete request;
    }
}

} // extern "C"
