#include "server/lease.h"

#include "common.h"
#include "log.h"
#include "speculative.h"
#include "superllama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <system_error>

#ifdef __linux__
#    include <unistd.h>
#endif

namespace superllama {

static const int64_t active_for_ms = 1000; // after the last request, so that turns do not move layers back and forth

static int64_t parent() {
#ifdef __linux__
    return getppid();
#else
    return 0;
#endif
}

static uint64_t size_of(const std::string & path) {
    std::error_code none;
    const uintmax_t bytes = path.empty() ? 0 : std::filesystem::file_size(path, none);
    return none ? 0 : bytes;
}

// Of a server with these parameters, its projector included. A draft model is in memory as it is.
static struct superllama_plan plan_of(common_params & params) {
    const bool embeds = params.embedding || (params.pooling_type != LLAMA_POOLING_TYPE_UNSPECIFIED &&
                                             params.pooling_type != LLAMA_POOLING_TYPE_NONE);
    params.n_outputs_max = params.n_outputs_max_per_seq = params.n_batch;
    if (!embeds) {
        const auto limits = common_speculative_get_output_limits(params.n_batch, params.n_parallel,
                                                                 common_speculative_n_max(&params.speculative));
        params.n_outputs_max = std::max(1, (int) limits.total);
        params.n_outputs_max_per_seq = std::max(1, (int) limits.per_seq);
    }
    const uint64_t budget = INT64_MAX;
    struct superllama_plan plan = {};
    if (superllama_plan(params.model.path.c_str(), common_model_params_to_llama(params),
                        common_context_params_to_llama(params), &budget, 1, &plan) < 0) {
        throw std::runtime_error("what " + params.model.path +
                                 " needs of the router's memory cannot be told: " + superllama_last_error());
    }
    const uint64_t besides = size_of(params.speculative.draft.mparams.path);
    plan.mem_least_bytes += besides;
    plan.mem_full_bytes += besides;
    return plan;
}

std::unique_ptr<lease> lease::join(const common_params & params) {
    const char * port = getenv("LLAMA_SERVER_ROUTER_PORT"); // a router sets it for its servers
    llama_model_params mparams = llama_model_default_params();
    if (port == nullptr || !memory_pool::is_supported() || !params.superllama.apply(mparams)) {
        return nullptr;
    }
    return std::unique_ptr<lease>(new lease(params, atoi(port)));
}

lease::lease(const common_params & given, int router_port) :
    pool(parent(), router_port),
    self(memory_pool::of_this_process()),
    kept(given.superllama.mem_least_bytes) {
    common_params params = given; // the functions below change what they read
    const struct superllama_plan plan = plan_of(params);
    self.given = params.superllama.model.mem_budget_bytes;
    self.weight = (uint64_t) params.superllama.mem_share;
    const std::string name = params.model_alias.empty() ? params.model.path : *params.model_alias.begin();
    snprintf(self.name, sizeof(self.name), "%s", name.c_str());
    self.active_ms = ggml_time_ms(); // of the machine, so that the servers' clocks are one
    set_range(plan.mem_least_bytes, plan.mem_full_bytes);
    struct superllama_memory memory = {};
    superllama_memory(&memory);
    pool.with([&](pool_table & table) {
        if (table.automatic == 0) {
            const auto mark = (double) params.superllama.model.mem_pressure;
            table.automatic = (uint64_t) (mark * (double) memory.host_available);
        }
        publish(table);
    });
}

lease::~lease() {
    try {
        pool.with([&](pool_table & table) {
            auto & members = table.members;
            members.erase(std::remove_if(members.begin(), members.end(),
                                         [&](const pool_member & m) { return m.pid == self.pid; }),
                          members.end());
        });
    } catch (const std::exception &) { // the process ends, and the others see that
    }
}

void lease::publish(pool_table & table) const {
    pool_member * mine = table.find(self.pid);
    if (mine == nullptr) {
        table.members.push_back(self);
    } else {
        *mine = self;
    }
}

void lease::set_range(uint64_t least, uint64_t full) {
    self.least = std::max(least, kept);
    self.full = std::max(full, self.least);
    if (self.given > 0) {
        self.full = std::min(self.full, std::max(self.given, self.least));
    }
}

uint64_t lease::may_have(const activity & now) {
    const int64_t t = ggml_time_ms();
    const bool was_active = self.is_active != 0;
    self.is_busy = now.is_busy;
    self.waiting_ms = !now.waits ? 0 : self.waiting_ms > 0 ? self.waiting_ms : t;
    if (now.is_busy || now.waits) {
        self.active_ms = t - t % 100; // the table is not written for less
    }
    self.is_active = t - self.active_ms < active_for_ms;
    first_graph = was_active ? std::min(first_graph, now.n_graphs) : now.n_graphs; // a model loaded again counts anew
    self.is_first_pass = self.is_active && now.n_graphs < first_graph + 2;
    uint64_t share = 0;
    pool.with([&](pool_table & table) {
        publish(table);
        const std::vector<uint64_t> shares = pool_shares(table.members, table.total());
        share = shares[(size_t) (table.find(self.pid) - table.members.data())];
    });
    return share;
}

uint64_t lease::raise(uint64_t bytes) {
    pool.with([&](pool_table & table) {
        const uint64_t leased = table.leased(), total = table.total();
        const uint64_t free = total - std::min(total, leased);
        self.lease += std::min(free, bytes - std::min(bytes, self.lease));
        publish(table);
    });
    return self.lease;
}

void lease::lower(uint64_t bytes) {
    self.lease = std::min(self.lease, bytes);
    pool.with([&](pool_table & table) { publish(table); });
}

bool lease::obtain(const std::function<bool()> & should_stop) {
    bool is_said = false;
    while (!should_stop()) {
        const uint32_t seen_now = seen();
        raise(may_have({ false, true, 0 }));
        if (is_enough()) {
            return true;
        }
        if (!is_said) {
            LOG_INF("superllama: %s waits for %.0f MiB of the memory that the router's models share\n", self.name,
                    (double) self.least / (1 << 20));
            is_said = true;
        }
        wait(seen_now, 20);
    }
    return false;
}

pool_table lease::table() {
    pool_table found;
    pool.with([&](pool_table & table) { found = table; });
    return found;
}

} // namespace superllama
