// The control plane of a server: what its model's memory is for, and budgets that change while it serves. Requests and
// answers are JSON; see the README.
#pragma once

#include "api/server_slots.h" // for upstream's main function, which sees this header
#include "server-http.h"

struct common_params;
struct server_context;

namespace superllama {

// GET /superllama: version, budgets, memory by tag, layers and where they are, counters.
server_http_context::handler_t control_status(const common_params & params, server_context & server);

// POST /superllama/budget: "mem_budget" and "vram_budget", as the flags have them, or numbers of bytes. All that is
// named changes, or nothing does and the answer says why. 200: the memory in use is within the budget. 202: it will be,
// when the batch at hand is done.
server_http_context::handler_t control_budget(const common_params & params, server_context & server);

} // namespace superllama
