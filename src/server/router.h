// The control plane of a router: the memory that the servers of its models share.
#pragma once

#include "server-http.h"
#include "server/pool.h"

#include <map>
#include <string>

struct common_params;

namespace superllama {

// Handlers by method and path. A request that names a model goes to its server, by way of upstream's handlers; one that
// does not is about all of them.
std::map<std::string, server_http_context::handler_t> router_routes(const common_params & params,
                                                                    const server_http_context::handler_t & proxy_get,
                                                                    const server_http_context::handler_t & proxy_post);

} // namespace superllama
