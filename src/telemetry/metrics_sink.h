// Where metrics lines go: stderr, a file, a FIFO. Nobody waits for whoever reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace superllama {

// Whether a line of metrics could be written there: throws std::invalid_argument with the reason. An existing file
// stays as it is, and a FIFO is not opened: its reader would take that for the end of what it reads.
void check_metrics_path(const std::string & path);

// Writing happens in a thread of its own: a slow disk never slows decoding; beyond `max_pending` waiting lines new ones
// are dropped and counted. So are lines for which a pipe has no room, for its reader stopped: only the first of them
// waits a moment. Of a pipe at most half is filled, for others, such as the program's own log, block where it is full.
// Every line goes to the end of the file in one write, so that several processes can share it. Several contexts may
// share one sink.
class metrics_sink {
  public:
    static const size_t max_pending = 1024;

    // path "" is stderr. Throws std::runtime_error where the file cannot be written.
    static std::shared_ptr<metrics_sink> open(const std::string & path);

    metrics_sink(int fd, std::string prefix); // closes fd
    ~metrics_sink();                          // writes what waits as far as it can be, then closes

    metrics_sink(const metrics_sink &) = delete;
    metrics_sink & operator=(const metrics_sink &) = delete;

    void push(const std::string & line);
    void flush(); // returns when everything pushed before is written or dropped, or after a few seconds
    int64_t dropped() const;

  private:
    struct queue;
    std::shared_ptr<queue> shared; // with the thread, which a write to a device that hangs may hold up for longer
};

} // namespace superllama
