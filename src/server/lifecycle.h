// The life of a server with a model: it serves, or drains, or gives its memory back and takes it again, while
// conversations wait on disk. Upstream calls a server without its model asleep; who may wake it is decided here.
#pragma once

#include "server-context.h"
#include "server/conversations.h"
#include "server/free_heap.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>

struct server_queue;

namespace superllama {

class aside_file;
class lease;

class lifecycle {
  public:
    // All three outlive it. It begins to watch when the slots have begun to run. `has_process`: nobody else uses the
    // process, so that what is free of its heap may be given back now and then.
    lifecycle(const common_params & params, server_context & server, const server_routes & routes, bool has_process);
    ~lifecycle();

    // The answer to a request, or 503 with the reason why there is none now. One that finds the memory given back
    // because nobody had asked for anything brings it back first. Routes that need no model answer in any case.
    server_http_res_ptr answer(const server_http_context::handler_t & handler, const server_http_req & req);

    // Before the model is loaded: in a router's server, waits for its part of the memory that all of them share, and
    // makes that its budget. Throws std::runtime_error.
    void before_load(common_params & params);

    // Each returns whether it is so already; else it will be, when what runs has ended. Any thread.
    bool drain(int timeout_ms);  // requests are refused, those that run go on
    bool pause(int timeout_ms);  // the same, then the memory is given back
    bool resume(int timeout_ms); // serves again, with the conversations that there were

    struct facts {
        const char * state; // ready, degraded, draining, pausing, paused, released, resuming
        std::string reason; // of degraded
        int n_requests;     // that run
        int64_t n_refused;
    };
    facts now() const;

    // The context, which stays until release(); null where its memory is given back. Any thread.
    llama_context * hold();
    void release();

    lease * pool() { return share.get(); } // null: it shares memory with nobody

    void end(); // waits for nothing any more; from a signal's handler, too

    // ---- for the thread of the slots, by way of the functions below

    bool asks_for_sleep(); // also says that the slots run
    void budgets_of_now(common_params & params) const;
    bool may_try_again(const std::string & why); // after a while; false: the server ends
    void loaded();

    std::unique_ptr<aside_file> aside;                  // what the prompt cache held, while the server sleeps
    std::unique_ptr<aside_file> new_aside_file() const; // null, and logged, where it cannot be made

  private:
    enum class aim { serve, drain, pause };
    enum class memory { here, leaving, gone, coming };

    bool aim_at(aim a, int timeout_ms);
    std::string admit(const server_http_req & req);
    void await_share(std::unique_lock<std::mutex> & lock);
    void left();
    void tell();
    void watch();
    bool follow_pool(std::unique_lock<std::mutex> & lock);
    bool take_share(uint64_t bytes);
    int64_t graphs_begun();
    void give_back();
    void take_again();

    const common_params & params;
    server_context & server;
    const server_routes & routes;
    server_queue * queue;
    const bool has_process;
    conversations slots_on_disk; // the watcher's

    mutable std::mutex mutex;
    std::condition_variable changed;
    aim aim_ = aim::serve;
    memory memory_ = memory::here;
    bool wanted = false; // a request waits for the memory
    int n_requests = 0;
    int64_t n_refused = 0;
    int64_t t_idle_ms;          // since when no request runs
    int64_t share_until_ms = 0; // a request waits for the share that it brings, until then; 0: it has it
    std::string reason;         // why the model could not be loaded again

    std::shared_timed_mutex context_mutex;  // shared: somebody looks at the context
    std::unique_ptr<lease> share;           // of the memory of a router's servers; there once the slots run
    bool gives_still = false;               // the watcher's: less than it has to, because a batch runs
    struct superllama_model_params budgets; // as they were when the memory was given back
    heap_watch heap;                        // the watcher's
    std::atomic<int64_t> n_asked{ 0 };
    std::atomic<int32_t> n_vocab{ 0 };
    std::atomic<bool> slots_run{ false };
    std::atomic<bool> asks_for_sleep_{ false };
    std::atomic<bool> ending{ false };
    std::thread watcher;
};

// A context that stays for a while; null where the server's memory is given back.
class held_context {
  public:
    explicit held_context(lifecycle & life) : life(life), ctx(life.hold()) {}

    ~held_context() {
        if (ctx != nullptr) {
            life.release();
        }
    }

    held_context(const held_context &) = delete;
    held_context & operator=(const held_context &) = delete;

    llama_context * get() const { return ctx; }

  private:
    lifecycle & life;
    llama_context * ctx;
};

int64_t bytes_in_use(const llama_model * model); // of its budget

// ------------------------------------------------------------------------------ called by upstream's queue and slots

// Whether the slots of this queue are to sleep now that they have nothing to do.
bool asked_to_sleep(const server_queue * queue);

// For who waits until they are awake. Throws std::runtime_error where the server ends meanwhile.
bool is_awake(bool sleeping, bool running);

lifecycle * lifecycle_of(const server_queue * queue); // null for slots that nobody serves by HTTP's routes

// While it lives, signals that end a server go to other threads than this one: it holds the lock that upstream's
// handlers take.
class signals_elsewhere {
  public:
    signals_elsewhere();
    ~signals_elsewhere();

  private:
    struct mask;
    std::unique_ptr<mask> before;
};

// The model is loaded again, as often as it takes: another process may need its memory now.
template <class Load>
void load_again(const server_queue * queue, common_params & params, const Load & load) {
    const signals_elsewhere for_a_while;
    lifecycle * life = lifecycle_of(queue);
    for (;;) {
        std::string why = "the library gives no reason";
        try {
            if (life != nullptr) {
                life->budgets_of_now(params);
            }
            if (load()) {
                break;
            }
        } catch (const std::exception & e) {
            why = e.what();
        }
        if (life == nullptr || !life->may_try_again(why)) {
            return;
        }
    }
    if (life != nullptr) {
        life->loaded();
    }
}

} // namespace superllama
