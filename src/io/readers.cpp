#include "io/readers.h"

#include <system_error>

#ifdef _OPENMP
#    include <omp.h>
#endif
#ifdef __linux__
#    include <sched.h>
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

namespace superllama {

// A reader works for microseconds and then waits for the drive, which idles when the next read comes late. Where every
// processor computes, Linux (6.12 and later) lets a thread with a short slice go first; elsewhere nothing changes.
static void ask_for_short_slice() {
#if defined(SYS_sched_getattr) && defined(SYS_sched_setattr)
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t slice_ns, deadline_ns, period_ns;
    } attributes = {};
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) == 0 && attributes.policy == SCHED_OTHER) {
        attributes.slice_ns = 100000; // the least there is
        syscall(SYS_sched_setattr, 0, &attributes, 0);
    }
#endif
}

std::unique_ptr<readers> readers::create(int n_threads, std::string * why) {
    std::unique_ptr<readers> pool(new readers);
    pool->threads.reserve((size_t) n_threads);
    try {
        for (int i = 0; i < n_threads; ++i) {
            pool->threads.emplace_back([self = pool.get()] { self->run(); });
        }
    } catch (const std::system_error & e) { // a limit of threads: go on with those that there are
        *why = std::string(e.what()) + "; is the number of threads limited (ulimit -u, the cgroup's pids.max)?";
    }
    return pool->threads.empty() ? nullptr : std::move(pool);
}

static bool succeeds(const readers::job & work, bool run) {
    try {
        return work(run);
    } catch (...) {
        return false;
    }
}

readers::~readers() {
    std::map<key, job> cancelled;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        stopping = true;
        cancelled.swap(waiting);
        priorities.clear();
    }
    changed.notify_all();
    for (auto & entry : cancelled) {
        succeeds(entry.second, false);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

readers::job_id readers::submit(int64_t priority, job work) {
    job_id id = 0;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        id = ++last_id;
        const auto added = waiting.emplace(key(priority, id), std::move(work)).first;
        try {
            priorities[id] = priority;
        } catch (...) { // no memory: the job is not there
            waiting.erase(added);
            throw;
        }
    }
    changed.notify_one();
    return id;
}

bool readers::promote(job_id id, int64_t priority) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = priorities.find(id);
    if (found == priorities.end()) {
        return false;
    }
    auto node = waiting.extract(key(found->second, id));
    node.key() = key(priority, id);
    waiting.insert(std::move(node));
    found->second = priority;
    return true;
}

bool readers::cancel(job_id id) {
    job work;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto found = priorities.find(id);
        if (found == priorities.end()) {
            return false;
        }
        auto node = waiting.extract(key(found->second, id));
        work = std::move(node.mapped());
        priorities.erase(found);
    }
    succeeds(work, false);
    return true;
}

readers::counters readers::count() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return { (int64_t) waiting.size() + n_running, n_completed, n_failed };
}

void readers::run() {
    ask_for_short_slice();
#ifdef _OPENMP
    omp_set_num_threads(1); // a conversion would make a team of threads here, beside those that compute
#endif
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
        changed.wait(lock, [this] { return stopping || !waiting.empty(); });
        if (stopping) {
            return;
        }
        auto node = waiting.extract(waiting.begin());
        priorities.erase(node.key().second);
        n_running++;
        lock.unlock();

        const bool ok = succeeds(node.mapped(), true);
        node.mapped() = nullptr; // what the job holds is freed outside the lock

        lock.lock();
        n_running--;
        (ok ? n_completed : n_failed)++;
    }
}

} // namespace superllama
