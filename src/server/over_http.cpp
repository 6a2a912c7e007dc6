#include "server/over_http.h"

#include "server/control.h"
#include "server/lifecycle.h"
#include "server/projector.h"
#include "server/router.h"
#include "server/slots.h"

#include <memory>
#include <string>

namespace superllama {

using handler_t = server_http_context::handler_t;

static std::weak_ptr<lifecycle> served; // by this process, over HTTP

void before_load(common_params & params) {
    switch_off(params);
    count_projector(params);
    if (const std::shared_ptr<lifecycle> life = served.lock()) {
        life->before_load(params);
    }
}

void add_control_plane(server_http_context & http, server_routes & routes, const common_params & params,
                       server_context & server, handler_t (*wrapped)(handler_t), const handler_t & proxy_get,
                       const handler_t & proxy_post) {
    const auto add = [&](const std::string & name, const handler_t & handler) {
        const size_t space = name.find(' ');
        const std::string path = name.substr(space + 1);
        name[0] == 'G' ? http.get(path, wrapped(handler)) : http.post(path, wrapped(handler));
    };
    if (proxy_get != nullptr) {
        for (const auto & route : router_routes(params, proxy_get, proxy_post)) {
            add(route.first, route.second);
        }
        return;
    }
    const auto life = std::make_shared<lifecycle>(params, server, routes, true);
    served = life;
    for (const auto & route : control_routes(*life, params, routes)) {
        // the handlers own it: they end before the server does
        const handler_t handler = [life, handler = route.second](const server_http_req & req) { return handler(req); };
        if (route.first == "GET /health") {
            routes.get_health = handler;
        } else if (route.first == "GET /metrics") {
            routes.get_metrics = handler;
        } else {
            add(route.first, handler);
        }
    }
}

server_http_res_ptr answer(const handler_t & handler, const server_http_req & req) {
    const std::shared_ptr<lifecycle> life = served.lock();
    return life != nullptr ? life->answer(handler, req) : handler(req);
}

} // namespace superllama
