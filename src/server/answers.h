// Answers of the control plane's routes, and what all of them ask of a request.
#pragma once

#include "server-common.h"
#include "server-http.h"
#include "server/pool.h"

#include <cstdint>
#include <string>

namespace superllama {

server_http_res_ptr answered(int status, const json & body);
server_http_res_ptr refused(const std::string & why, error_type type);

// A page of another site, in the browser of whoever may use this server, can send a request, if not read the answer.
bool is_of_another_site(const server_http_req & req);

// A size in a request, as the flags have it or as a number of bytes. Throw std::invalid_argument.
std::string size_text(const json & value, const char * name);
uint64_t mem_budget_of(const json & value);

// The memory that several servers share, and who has how much of it.
json pool_json(const pool_table & table);

} // namespace superllama
