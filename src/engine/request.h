// One request of the engine: what its worker has received of the answer, and its reader has not taken yet.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>

namespace superllama {

class logits_hook;

class request {
  public:
    request(std::string method, std::string path, std::string body) :
        method(std::move(method)),
        path(std::move(path)),
        body(std::move(body)) {}

    const std::string method, path, body;
    std::shared_ptr<logits_hook> hook; // null: the caller changes no logits

    void cancel() { cancelled_ = true; }
    bool cancelled() const { return cancelled_; }

    // of the worker
    void give(int status, std::string piece);
    void end(int status);

    // of the reader, one at a time; see superllama_request_next()
    int next(int32_t timeout_ms, const char ** data, size_t * size);
    int status() const { return status_; }

  private:
    std::atomic<bool> cancelled_{ false };
    std::atomic<int> status_{ 0 };
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::string> pieces_;
    std::string taken_; // what `data` points to
    bool ended_ = false;
};

} // namespace superllama
