// The control plane in upstream's main function, which serves it over HTTP with the rest.
#pragma once

#include "server-http.h"
#include "server/slots.h" // it is called there too

struct common_params;
struct server_context;
struct server_routes;

namespace superllama {

// Before a server's model is loaded.
void before_load(common_params & params);

// The routes of a server, before its own are added; and a request of any route.
void add_control_plane(server_http_context & http, server_routes & routes, const common_params & params,
                       server_context & server,
                       server_http_context::handler_t (*wrapped)(server_http_context::handler_t),
                       const server_http_context::handler_t & proxy_get,
                       const server_http_context::handler_t & proxy_post); // of a router
server_http_res_ptr answer(const server_http_context::handler_t & handler, const server_http_req & req);

} // namespace superllama
