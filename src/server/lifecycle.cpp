#include "server/lifecycle.h"

#include "base/assert_guard.h"
#include "log.h"
#include "server-queue.h"
#include "server/answers.h"
#include "server/lease.h"
#include "server/logits.h"
#include "server/request_body.h"
#include "server/set_aside.h"
#include "server/slots.h"
#include "superllama.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <vector>

#ifndef _WIN32
#    include <csignal>
#endif

namespace superllama {

using std::chrono::milliseconds;

static const int share_patience_ms = 100; // more than others take to give back what they do not use

// ------------------------------------------------------------------------------------------ all of a process

static std::mutex all_mutex;

static std::map<const server_queue *, lifecycle *> & all() {
    static std::map<const server_queue *, lifecycle *> found;
    return found;
}

lifecycle * lifecycle_of(const server_queue * queue) {
    const std::lock_guard<std::mutex> lock(all_mutex);
    const auto found = all().find(queue);
    return found == all().end() ? nullptr : found->second;
}

bool asked_to_sleep(const server_queue * queue) {
    make_room();
    lifecycle * life = lifecycle_of(queue);
    return life != nullptr && life->asks_for_sleep();
}

bool is_awake(bool sleeping, bool running) {
    if (sleeping && !running) {
        throw std::runtime_error("the server ends");
    }
    return !sleeping;
}

bool lifecycle::asks_for_sleep() {
    if (!slots_run.exchange(true)) {
        const std::lock_guard<std::mutex> lock(mutex);
        t_idle_ms = ggml_time_ms();
    }
    return asks_for_sleep_;
}

#ifdef _WIN32
struct signals_elsewhere::mask {};

signals_elsewhere::signals_elsewhere() = default;
signals_elsewhere::~signals_elsewhere() = default;
#else
struct signals_elsewhere::mask {
    sigset_t signals;
};

signals_elsewhere::signals_elsewhere() : before(std::make_unique<mask>()) {
    sigset_t ending;
    sigemptyset(&ending);
    sigaddset(&ending, SIGINT);
    sigaddset(&ending, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &ending, &before->signals);
}

signals_elsewhere::~signals_elsewhere() {
    pthread_sigmask(SIG_SETMASK, &before->signals, nullptr);
}
#endif

// ------------------------------------------------------------------------------------------ requests

// Routes that upstream answers without its model too, and those that tell of the life itself.
static bool needs_no_model(const std::string & path) {
    const char * const routes[] = { "/health", "/metrics", "/props", "/models", "/tools", "/cors-proxy", "/v1/stream" };
    const auto is_one = [&](const char * route) { return is_path(path, route); };
    return path.find("/superllama") != std::string::npos || std::any_of(std::begin(routes), std::end(routes), is_one);
}

server_http_res_ptr lifecycle::answer(const server_http_context::handler_t & handler, const server_http_req & req) {
    n_asked++;
    if (needs_no_model(req.path)) {
        return handler(req);
    }
    const std::string why = admit(req);
    if (!why.empty()) {
        return refused(why, ERROR_TYPE_UNAVAILABLE);
    }
    const std::shared_ptr<void> here(nullptr, [this](void *) { left(); });
    if (n_vocab == 0) {
        n_vocab = routes.get_model_info().at("meta").at("n_vocab").get<int32_t>();
    }
    std::shared_ptr<server_http_req> asked;
    if (const auto body = checked_body(req.path, req.body, n_vocab)) {
        asked = std::make_shared<server_http_req>(req);
        asked->body = *body;
    }
    server_http_res_ptr res;
    const asks_with its_wishes(asker_of(req.body, n_vocab, params));
    try {
        const assert_guard guard(
            "the request cannot be processed: its parts contradict each other, or the model's sizes");
        res = handler(asked ? *asked : req);
    } catch (const failed_assertion & e) {
        throw std::invalid_argument(e.what());
    }
    if (res->is_stream()) { // it runs, and may look at what was asked, until its last piece is taken
        res->next = [here, asked, next = std::move(res->next)](std::string & piece) { return next(piece); };
    }
    return res;
}

// Why a request is not served; "" where it is, and counts as one that runs.
std::string lifecycle::admit(const server_http_req & req) {
    std::unique_lock<std::mutex> lock(mutex);
    const auto refuse = [&](const std::string & why) {
        n_refused++;
        return why;
    };
    for (;;) {
        if (aim_ == aim::drain) {
            return refuse("the server drains: it takes no new requests; POST /superllama/resume ends that");
        }
        if (aim_ == aim::pause) {
            return refuse("the server is paused: its memory is given back; POST /superllama/resume takes it again");
        }
        if (memory_ == memory::here) {
            n_requests++;
            await_share(lock);
            return "";
        }
        if (!reason.empty()) {
            return refuse("the model could not be loaded again: " + reason + "; the server goes on trying");
        }
        wanted = true;
        tell();
        lock.unlock();
        if (ending || req.should_stop()) {
            return "the server ends";
        }
        lock.lock();
        changed.wait_for(lock, milliseconds(100));
    }
}

// A server that had nothing to do may have more now. A pass that began before that is there would read blocks that may
// not stay, and the next pass would read them again: it waits, if not for long, as others may be slow to give.
void lifecycle::await_share(std::unique_lock<std::mutex> & lock) {
    if (!slots_run || share == nullptr) {
        return;
    }
    if (n_requests == 1) {
        share_until_ms = ggml_time_ms() + share_patience_ms;
        tell();
    }
    while (share_until_ms > ggml_time_ms() && !ending) {
        changed.wait_for(lock, milliseconds(share_until_ms - ggml_time_ms()));
    }
}

void lifecycle::left() {
    const std::lock_guard<std::mutex> lock(mutex);
    n_requests--;
    t_idle_ms = ggml_time_ms();
    tell();
}

// Something has changed that the watcher acts on.
void lifecycle::tell() {
    changed.notify_all();
    if (slots_run && share != nullptr) {
        share->wake(); // the watcher of a server that shares memory waits there
    }
}

// ------------------------------------------------------------------------------------------ aims

lifecycle::lifecycle(const common_params & params, server_context & server, const server_routes & routes,
                     bool has_process) :
    params(params),
    server(server),
    routes(routes),
    queue(&server.get_response_reader().queue_tasks),
    has_process(has_process),
    slots_on_disk(server, [this] { return ending.load(); }),
    t_idle_ms(ggml_time_ms()),
    budgets(params.superllama.model) {
    if (has_process) {
        keep_heap_small();
    }
    {
        const std::lock_guard<std::mutex> lock(all_mutex);
        all()[queue] = this;
    }
    watcher = std::thread([this] { watch(); });
}

lifecycle::~lifecycle() {
    end();
    watcher.join();
    const std::lock_guard<std::mutex> lock(all_mutex);
    all().erase(queue);
}

void lifecycle::end() {
    ending = true;
}

bool lifecycle::drain(int timeout_ms) {
    return aim_at(aim::drain, timeout_ms);
}

bool lifecycle::pause(int timeout_ms) {
    return aim_at(aim::pause, timeout_ms);
}

bool lifecycle::resume(int timeout_ms) {
    return aim_at(aim::serve, timeout_ms);
}

bool lifecycle::aim_at(aim a, int timeout_ms) {
    const int64_t end_ms = ggml_time_ms() + timeout_ms;
    std::unique_lock<std::mutex> lock(mutex);
    aim_ = a;
    wanted = wanted || a == aim::serve;
    tell();
    const auto is_so = [&] {
        return aim_ == a && (a == aim::serve   ? memory_ == memory::here
                             : a == aim::pause ? memory_ == memory::gone
                                               : n_requests == 0);
    };
    while (!is_so() && aim_ == a && !ending && ggml_time_ms() < end_ms) {
        changed.wait_for(lock, milliseconds(100));
    }
    return is_so();
}

lifecycle::facts lifecycle::now() const {
    const std::lock_guard<std::mutex> lock(mutex);
    const bool is_here = memory_ == memory::here;
    const char * state = aim_ == aim::drain          ? "draining"
                         : aim_ == aim::pause        ? (memory_ == memory::gone ? "paused" : "pausing")
                         : is_here                   ? "ready"
                         : !reason.empty()           ? "degraded"
                         : memory_ == memory::coming ? "resuming"
                                                     : "released";
    return { state, reason, n_requests, n_refused };
}

llama_context * lifecycle::hold() {
    if (!context_mutex.try_lock_shared_for(milliseconds(100))) {
        return nullptr; // it is on its way out or in
    }
    llama_context * ctx = server.get_llama_context();
    if (ctx == nullptr) {
        context_mutex.unlock_shared();
    }
    return ctx;
}

void lifecycle::release() {
    context_mutex.unlock_shared();
}

int64_t bytes_in_use(const llama_model * model) {
    int64_t by_tag[SUPERLLAMA_N_MEMORY_TAGS] = {};
    superllama_memory_by_tag(model, by_tag);
    return std::accumulate(std::begin(by_tag), std::end(by_tag), int64_t(0));
}

// ------------------------------------------------------------------------------------------ memory, there and back

// The watcher's thread: all that happens to the memory happens here.
void lifecycle::watch() {
    std::unique_lock<std::mutex> lock(mutex);
    while (!ending) {
        if (has_process) { // first: what happens meanwhile is seen below
            const int n_running = n_requests;
            lock.unlock();
            heap.look(n_asked, n_running);
            lock.lock();
        }
        // the parameters, and the share, are the loader's until the slots run
        const bool is_loaded = slots_run;
        const bool shares = is_loaded && share != nullptr;
        const uint32_t seen = shares ? share->seen() : 0; // what comes from here on wakes
        const int64_t release_ms = is_loaded ? params.superllama.idle_release_s * int64_t(1000) : -1;
        const bool is_idle = release_ms >= 0 && ggml_time_ms() - t_idle_ms >= release_ms;
        const bool is_wanted_by_others = shares && follow_pool(lock);
        const bool may_go = is_loaded && memory_ == memory::here && n_requests == 0;
        if (may_go && (aim_ == aim::pause || (aim_ == aim::serve && (is_idle || is_wanted_by_others)))) {
            memory_ = memory::leaving;
            wanted = false;
            lock.unlock();
            give_back();
            lock.lock();
        } else if (memory_ == memory::gone && aim_ != aim::pause && wanted && (!shares || share->is_enough())) {
            memory_ = memory::coming;
            lock.unlock();
            take_again();
            lock.lock();
        }
        if (shares) {
            const int wait_ms = n_requests > 0 || wanted ? 20 : 100; // how far a request has come wakes nobody
            lock.unlock();
            share->wait(seen, gives_still ? 2 : wait_ms);
            lock.lock();
        } else {
            changed.wait_for(lock, milliseconds(100));
        }
    }
}

void lifecycle::before_load(common_params & given) {
    try {
        share = lease::join(given);
    } catch (const std::exception & e) {
        LOG_WRN("superllama: this model has its budget for itself, beside those of the router's others: %s\n",
                e.what());
    }
    if (share == nullptr) {
        return;
    }
    if (!share->obtain([] { return server_ends(); })) {
        throw std::runtime_error("the server ends");
    }
    given.superllama.model.mem_budget_bytes = share->bytes();
}

// The watcher's, the lock is let go meanwhile. Whether others need all that this server has.
bool lifecycle::follow_pool(std::unique_lock<std::mutex> & lock) {
    const bool is_here = memory_ == memory::here;
    const bool waits = memory_ == memory::gone && wanted && aim_ != aim::pause;
    const bool is_busy = n_requests > 0;
    lock.unlock();
    uint64_t bytes = share->bytes();
    bool has_it = true;
    gives_still = false;
    try {
        bytes = share->may_have({ is_busy, waits, is_here ? graphs_begun() : 0 });
        if (is_here && bytes > 0) {
            has_it = take_share(bytes);
        } else if (waits) {
            share->raise(bytes);
        }
    } catch (const std::exception & e) {
        LOG_ERR("superllama: %s\n", e.what());
    }
    lock.lock();
    if (is_busy && has_it && share_until_ms != 0) {
        share_until_ms = 0;
        changed.notify_all();
    }
    return is_here && bytes == 0;
}

// Since the model was loaded. 0 where its memory is on its way.
int64_t lifecycle::graphs_begun() {
    const held_context held(*this);
    if (held.get() == nullptr) {
        return 0;
    }
    const llama_model * model = llama_get_model(held.get());
    std::vector<superllama_layer> layers((size_t) std::max(0, superllama_layers(model, nullptr, 0)));
    superllama_layers(model, layers.data(), (int32_t) layers.size());
    int64_t n_graphs = 0;
    for (const superllama_layer & layer : layers) {
        n_graphs = std::max(n_graphs, layer.last_use);
    }
    return n_graphs;
}

// Other servers may use what this one had once it is no longer in use here. Whether it has all that it may have.
bool lifecycle::take_share(uint64_t bytes) {
    const held_context held(*this);
    if (held.get() == nullptr) {
        return true;
    }
    llama_model * model = const_cast<llama_model *>(llama_get_model(held.get()));
    uint64_t least = 0, full = 0;
    if (superllama_budget_range(model, &least, &full) == 0) {
        share->set_range(least, full);
    }
    const uint64_t before = share->bytes();
    const uint64_t worth_a_move = 1 << 20;
    if (bytes > before + worth_a_move) {
        const uint64_t now = share->raise(bytes);
        if (now > before) {
            superllama_set_budgets(model, &now, nullptr);
        }
        return bytes <= now + worth_a_move;
    }
    if (bytes < before && superllama_set_budgets(model, &bytes, nullptr) == 0) {
        gives_still = bytes_in_use(model) > (int64_t) bytes; // a batch runs: we look again
        if (!gives_still) {
            share->lower(bytes);
        }
    }
    return true;
}

void lifecycle::give_back() {
    slots_on_disk.save(params.n_parallel, params.superllama.spill_dir);
    {
        const std::lock_guard<std::shared_timed_mutex> nobody_looks(context_mutex);
        const llama_model * model = llama_get_model(server.get_llama_context());
        superllama_budgets(model, &budgets.mem_budget_bytes, budgets.vram_budget_bytes);
        asks_for_sleep_ = true;
        server_task nothing(SERVER_TASK_TYPE_NEXT_RESPONSE); // upstream's loop looks up
        nothing.id = queue->get_new_id();
        queue->post(std::move(nothing));
        while (!queue->is_sleeping() && !ending) {
            std::this_thread::sleep_for(milliseconds(5));
        }
    }
    free_heap();
    if (share != nullptr) {
        share->lower(0);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    memory_ = memory::gone;
    changed.notify_all();
}

void lifecycle::take_again() {
    asks_for_sleep_ = false;
    try {
        const std::lock_guard<std::shared_timed_mutex> nobody_looks(context_mutex);
        queue->wait_until_no_sleep();
    } catch (const std::exception &) {
        return; // the server ends
    }
    if (server.get_llama_context() == nullptr) {
        return; // the same, in the middle of a load
    }
    slots_on_disk.restore();
    const std::lock_guard<std::mutex> lock(mutex);
    memory_ = memory::here;
    t_idle_ms = ggml_time_ms();
    changed.notify_all();
}

void lifecycle::budgets_of_now(common_params & given) const {
    given.superllama.model.mem_budget_bytes = share != nullptr ? share->bytes() : budgets.mem_budget_bytes;
    std::copy_n(budgets.vram_budget_bytes, SUPERLLAMA_MAX_DEVICES, given.superllama.model.vram_budget_bytes);
}

bool lifecycle::may_try_again(const std::string & why) {
    const std::string last = superllama_last_error();
    std::unique_lock<std::mutex> lock(mutex);
    const std::string now = last.empty() ? why : last;
    if (now != reason) {
        LOG_ERR("superllama: the model could not be loaded again: %s; trying every second\n", now.c_str());
    }
    reason = now;
    for (int i = 0; i < 10 && !ending && !server_ends(); ++i) {
        changed.wait_for(lock, milliseconds(100));
    }
    return !ending && !server_ends();
}

void lifecycle::loaded() {
    const std::lock_guard<std::mutex> lock(mutex);
    reason.clear();
}

std::unique_ptr<aside_file> lifecycle::new_aside_file() const {
    try {
        return std::make_unique<aside_file>(params.superllama.spill_dir);
    } catch (const std::exception & e) {
        LOG_WRN("superllama: kept prompts are forgotten: %s\n", e.what());
        return nullptr;
    }
}

} // namespace superllama
