#include "engine/workers.h"

#include <system_error>

namespace superllama {

void workers::run(job work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (n_idle_ <= waiting_.size()) {
        threads_.reserve(threads_.size() + 1); // a thread that runs has its place
        try {
            threads_.emplace_back([this] { loop(); });
        } catch (const std::system_error &) {
            if (threads_.empty()) {
                throw;
            }
        }
    }
    waiting_.push_back(std::move(work));
    changed_.notify_one();
}

void workers::finish() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        finishing_ = true;
    }
    changed_.notify_all();
    for (auto & thread : threads_) {
        thread.join();
    }
    threads_.clear();
}

void workers::loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        n_idle_++;
        changed_.wait(lock, [this] { return finishing_ || !waiting_.empty(); });
        n_idle_--;
        if (waiting_.empty()) {
            return;
        }
        const job work = std::move(waiting_.front());
        waiting_.pop_front();
        lock.unlock();
        work();
        lock.lock();
    }
}

} // namespace superllama
