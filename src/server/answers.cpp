#include "server/answers.h"

#include "api/budget_text.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>

namespace superllama {

server_http_res_ptr answered(int status, const json & body) {
    auto res = std::make_unique<server_http_res>();
    res->status = status;
    res->data = safe_json_to_str(body);
    return res;
}

server_http_res_ptr refused(const std::string & why, error_type type) {
    const json error = format_error_response(why, type);
    return answered(json_value(error, "code", 500), { { "error", error } });
}

server_http_res_ptr refused_to_other_sites(const server_http_req & req) {
    for (const auto & header : req.headers) {
        std::string name = header.first;
        std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return (char) tolower(c); });
        if (name == "sec-fetch-site" && header.second != "same-origin" && header.second != "none") {
            return refused("a page of another site may neither see nor change what memory this server has",
                           ERROR_TYPE_PERMISSION);
        }
    }
    return nullptr;
}

bool soon(const std::function<bool()> & is_so) {
    const int64_t end_ms = ggml_time_ms() + patience_ms;
    while (!is_so()) {
        if (ggml_time_ms() > end_ms) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return true;
}

std::string size_text(const json & value, const char * name) {
    if (value.is_string()) {
        return value.get<std::string>();
    }
    if (value.is_number_integer() && value.get<int64_t>() >= 0) {
        return std::to_string(value.get<int64_t>());
    }
    throw std::invalid_argument(std::string(name) +
                                " is a number of bytes, or a text such as \"8GiB\", \"60%\" or \"auto\"");
}

uint64_t mem_budget_of(const json & value) {
    const std::string text = size_text(value, "mem_budget");
    try {
        return parse_budget(text.c_str());
    } catch (const std::invalid_argument & e) {
        throw std::invalid_argument(std::string("mem_budget: ") + e.what());
    }
}

json pool_json(const pool_table & table) {
    json members = json::array();
    for (const pool_member & m : table.members) {
        members.push_back({ { "model", std::string(m.name) },
                            { "pid", m.pid },
                            { "lease_bytes", m.lease },
                            { "least_bytes", m.least },
                            { "full_bytes", m.full },
                            { "weight", m.weight },
                            { "active", m.is_active != 0 } });
    }
    return { { "total_bytes", table.total() }, { "leased_bytes", table.leased() }, { "members", members } };
}

} // namespace superllama
