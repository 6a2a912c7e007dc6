// The engine's threads for requests: one for each that runs, kept for the next one. Upstream's handlers of requests
// wait for the slots, so a request holds a thread until it has ended.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace superllama {

class workers {
  public:
    using job = std::function<void()>; // throws nothing

    ~workers() { finish(); }

    // Throws std::system_error where the system gives no thread and there is none that the job could wait for.
    void run(job work);

    // Runs what waits, and joins the threads. Nothing may be added any more.
    void finish();

  private:
    void loop();

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<job> waiting_;
    std::vector<std::thread> threads_;
    size_t n_idle_ = 0;
    bool finishing_ = false;
};

} // namespace superllama
