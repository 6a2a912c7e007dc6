#include "engine/request.h"

#include <chrono>

namespace superllama {

void request::give(int status, std::string piece) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        status_ = status;
        pieces_.push_back(std::move(piece));
    }
    changed_.notify_all();
}

void request::end(int status) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (status_ == 0) {
            status_ = status;
        }
        ended_ = true;
    }
    changed_.notify_all();
}

int request::next(int32_t timeout_ms, const char ** data, size_t * size) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto ready = [this] { return ended_ || !pieces_.empty(); };
    if (timeout_ms < 0) {
        changed_.wait(lock, ready);
    } else if (!changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), ready)) {
        return -1;
    }
    if (pieces_.empty()) {
        return 0;
    }
    taken_ = std::move(pieces_.front());
    pieces_.pop_front();
    *data = taken_.data();
    *size = taken_.size();
    return 1;
}

} // namespace superllama
