// Answers of the control plane's routes, and what all of them ask of a request.
#pragma once

#include "server-common.h"
#include "server-http.h"
#include "server/pool.h"

#include <cstdint>
#include <functional>
#include <string>

namespace superllama {

server_http_res_ptr answered(int status, const json & body);
server_http_res_ptr refused(const std::string & why, error_type type);

// A page of another site, in the browser of whoever may use this server, can send a request, if not read the answer.
// Null: this is none.
server_http_res_ptr refused_to_other_sites(const server_http_req & req);

// A change is answered when it is so, but not later than this: with 202 then.
const int patience_ms = 10000;
bool soon(const std::function<bool()> & is_so);

// A size in a request, as the flags have it or as a number of bytes. Throw std::invalid_argument.
std::string size_text(const json & value, const char * name);
uint64_t mem_budget_of(const json & value);

// The memory that several servers share, and who has how much of it.
json pool_json(const pool_table & table);

} // namespace superllama
