#include "llama-prefetch.h"

llama_prefetcher::llama_prefetcher(int n_threads) {
    for (int i = 0; i < n_threads; ++i) {
        threads.emplace_back([this] { run(); });
    }
}

llama_prefetcher::~llama_prefetcher() {
    std::map<key, job> cancelled;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        stopping = true;
        cancelled.swap(waiting);
        priorities.clear();
    }
    changed.notify_all();
    for (auto & entry : cancelled) {
        entry.second(false);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

llama_prefetcher::job_id llama_prefetcher::submit(int64_t priority, job work) {
    job_id id = 0;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        id = ++last_id;
        priorities[id] = priority;
        waiting.emplace(key(priority, id), std::move(work));
    }
    changed.notify_one();
    return id;
}

bool llama_prefetcher::promote(job_id id, int64_t priority) {
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

bool llama_prefetcher::cancel(job_id id) {
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
    work(false);
    return true;
}

llama_prefetcher::counters llama_prefetcher::count() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return { (int64_t) waiting.size() + n_running, n_completed, n_failed };
}

void llama_prefetcher::run() {
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

        const bool ok = node.mapped()(true);
        node.mapped() = nullptr; // what the job holds is freed outside the lock

        lock.lock();
        n_running--;
        (ok ? n_completed : n_failed)++;
    }
}
