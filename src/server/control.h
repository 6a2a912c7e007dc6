// The control plane of a server: what its model's memory is for, budgets that change while it serves, memory that is
// given back and taken again. Requests and answers are JSON; see the README.
#pragma once

#include "server-http.h"

#include <map>
#include <string>

struct common_params;
struct server_context;
struct server_routes;

namespace superllama {

class lifecycle;

extern const char * const control_page; // HTML: what GET /superllama says, to look at and to change

// Handlers by method and path. 200: it is so. 202: it will be, when what runs has ended. Health and metrics are
// upstream's, with what we know.
std::map<std::string, server_http_context::handler_t> control_routes(lifecycle & life, const common_params & params,
                                                                     const server_routes & routes);

} // namespace superllama
