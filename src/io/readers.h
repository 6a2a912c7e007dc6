// A few threads that run read jobs in order of priority. Serves weights and KV pages alike; knows neither.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace superllama {

class readers {
  public:
    // A job is called exactly once: run = true by a worker, or run = false when it was cancelled
    // (by cancel() or the destructor, in their thread). It returns whether it succeeded; one that throws has failed.
    using job = std::function<bool(bool run)>;
    using job_id = uint64_t; // 0 is no job

    // With as many threads as the system gives, up to n_threads. Null where it gives none, `why` says why.
    static std::unique_ptr<readers> create(int n_threads, std::string * why);
    ~readers(); // cancels what waits, lets what runs finish, joins

    // Jobs with a smaller priority run first, equal ones in the order of submission.
    job_id submit(int64_t priority, job work);

    // Both return false where the job already runs or ran.
    bool promote(job_id id, int64_t priority);
    bool cancel(job_id id);

    int n_threads() const { return (int) threads.size(); }

    struct counters {
        int64_t pending; // waiting or running
        int64_t completed;
        int64_t failed;
    };
    counters count() const;

  private:
    using key = std::pair<int64_t, job_id>; // priority, then order

    readers() = default;
    void run();

    mutable std::mutex mutex;
    std::condition_variable changed;
    std::map<key, job> waiting;
    std::map<job_id, int64_t> priorities; // of waiting jobs
    job_id last_id = 0;
    int64_t n_running = 0;
    int64_t n_completed = 0;
    int64_t n_failed = 0;
    bool stopping = false;
    std::vector<std::thread> threads;
};

} // namespace superllama
