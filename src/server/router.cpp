#include "server/router.h"

#include "common.h"
#include "log.h"
#include "server/answers.h"
#include "superllama.h"

#include <memory>
#include <stdexcept>

#ifdef __linux__
#    include <unistd.h>
#endif

namespace superllama {

using handler_t = server_http_context::handler_t;

namespace {

// Nobody but the servers writes the table, and the total of a request.
class router_memory {
  public:
    explicit router_memory(const common_params & params) : pool(process(), params.port) {
        pool.with([&](pool_table & table) { table.asked = params.superllama.model.mem_budget_bytes; });
    }
    ~router_memory() { pool.remove(); }

    json status() {
        json found = { { "version", superllama_version() },
                       { "upstream_build", superllama_upstream_build() },
                       { "state", "ready" },
                       { "router", true } };
        pool.with([&](pool_table & table) { found["pool"] = pool_json(table); });
        return found;
    }

    // Whether it is so within some seconds; else it will be. Throws std::invalid_argument.
    bool change(uint64_t bytes) {
        pool.with([&](pool_table & table) {
            for (const pool_member & m : table.members) {
                if (bytes > 0 && m.least > bytes) {
                    throw std::invalid_argument("mem_budget: the model " + std::string(m.name) + " needs " +
                                                std::to_string((m.least >> 20) + 1) + " MiB");
                }
            }
            table.asked = bytes;
        });
        return soon([&] {
            bool is_so = false;
            pool.with([&](pool_table & table) { is_so = table.leased() <= table.total(); });
            return is_so;
        });
    }

  private:
    static int64_t process() {
#ifdef __linux__
        return getpid();
#else
        return 0;
#endif
    }

    memory_pool pool;
};

} // namespace

static bool names_model(const server_http_req & req) {
    if (!req.get_param("model").empty()) {
        return true;
    }
    const json body = req.body.empty() ? json() : json::parse(req.body);
    return body.is_object() && body.contains("model");
}

static server_http_res_ptr change_total(router_memory & memory, const server_http_req & req) {
    if (server_http_res_ptr no = refused_to_other_sites(req)) {
        return no;
    }
    const json asked = json::parse(req.body);
    if (!asked.is_object() || asked.size() != 1 || !asked.contains("mem_budget")) {
        return refused(
            "the models of a router share \"mem_budget\"; anything else is of one of them: name its \"model\"",
            ERROR_TYPE_INVALID_REQUEST);
    }
    const bool is_so = memory.change(mem_budget_of(asked.at("mem_budget")));
    return answered(is_so ? 200 : 202, memory.status());
}

// Null where servers cannot share memory: each has its budget for itself, as upstream's router has it.
static std::shared_ptr<router_memory> memory_of(const common_params & params) {
    try {
        return memory_pool::is_supported() ? std::make_shared<router_memory>(params) : nullptr;
    } catch (const std::exception & e) {
        LOG_WRN("superllama: models do not share a budget: %s\n", e.what());
        return nullptr;
    }
}

std::map<std::string, handler_t> router_routes(const common_params & params, const handler_t & proxy_get,
                                               const handler_t & proxy_post) {
    std::map<std::string, handler_t> routes = {
        { "GET /superllama", proxy_get },          { "POST /superllama/budget", proxy_post },
        { "POST /superllama/drain", proxy_post },  { "POST /superllama/pause", proxy_post },
        { "POST /superllama/resume", proxy_post },
    };
    if (const auto memory = memory_of(params)) {
        routes["GET /superllama"] = [memory, proxy_get](const server_http_req & req) {
            if (server_http_res_ptr no = refused_to_other_sites(req)) {
                return no;
            }
            return names_model(req) ? proxy_get(req) : answered(200, memory->status());
        };
        routes["POST /superllama/budget"] = [memory, proxy_post](const server_http_req & req) {
            return names_model(req) ? proxy_post(req) : change_total(*memory, req);
        };
    }
    return routes;
}

} // namespace superllama
