#include "telemetry/metrics_sink.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>

#include <fcntl.h>
#include <sys/stat.h>
#ifdef _WIN32
#    include <io.h>
#else
#    include <csignal>
#    include <poll.h>
#    include <sys/ioctl.h>
#    include <unistd.h>
#endif

namespace superllama {

static std::string cannot_write(const std::string & path, const std::string & why) {
    return "cannot write " + path + ": " + why + "; name a file in a folder that exists and is writable";
}

// ---------------------------------------------------------------------------------------------- descriptors

#ifdef _WIN32

static int open_file(const std::string & path) {
    return _open(path.c_str(), _O_WRONLY | _O_APPEND | _O_CREAT | _O_BINARY, _S_IREAD | _S_IWRITE);
}

static int open_stderr() {
    return _dup(2);
}

static void close_file(int fd) {
    _close(fd);
}

static bool write_all(int fd, const std::string & text, int) {
    return _write(fd, text.data(), (unsigned) text.size()) == (int) text.size();
}

static bool is_fifo(const std::string &) {
    return false;
}

static long process_id() {
    return 0;
}

static void ignore_broken_pipes() {}

#else

static bool is_fifo(const std::string & path) {
    struct stat st = {};
    return stat(path.c_str(), &st) == 0 && S_ISFIFO(st.st_mode);
}

// A FIFO is opened for reading too: so that opening does not wait for a reader, and there may be none for a while.
static int open_file(const std::string & path) {
    const int access = is_fifo(path) ? O_RDWR : O_WRONLY | O_CREAT;
    return ::open(path.c_str(), access | O_APPEND | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0666);
}

// A pipe is opened anew where the system can: not to wait is a property of the opened file, which others share.
static int open_stderr() {
    struct stat st = {};
    if (fstat(2, &st) == 0 && S_ISFIFO(st.st_mode)) {
        const int own = ::open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_CLOEXEC);
        if (own >= 0) {
            return own;
        }
    }
    return fcntl(2, F_DUPFD_CLOEXEC, 0);
}

static void close_file(int fd) {
    close(fd);
}

// Half of a pipe is left to others. What is no pipe says itself whether it takes something.
static bool has_room(int fd, size_t size) {
#    if defined(F_GETPIPE_SZ) && defined(FIONREAD)
    const int capacity = fcntl(fd, F_GETPIPE_SZ);
    int used = 0;
    if (capacity > 0 && ioctl(fd, FIONREAD, &used) == 0 && (size_t) used + size > (size_t) capacity / 2) {
        return used == 0; // a line that is longer than that
    }
#    else
    (void) size;
#    endif
    pollfd p = { fd, POLLOUT, 0 };
    return poll(&p, 1, 0) > 0 && (p.revents & POLLOUT) != 0;
}

// One write, which waits up to `patience_ms` for room. True where all of it is written.
static bool write_all(int fd, const std::string & text, int patience_ms) {
    const int step_ms = 10;
    while (!has_room(fd, text.size())) {
        if (patience_ms <= 0) {
            return false;
        }
        poll(nullptr, 0, std::min(patience_ms, step_ms));
        patience_ms -= step_ms;
    }
    return write(fd, text.data(), text.size()) == (ssize_t) text.size();
}

static long process_id() {
    return (long) getpid();
}

// A reader that is gone is an error of a write, not a signal that ends the process.
static void ignore_broken_pipes() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    sigaddset(&set, SIGXFSZ); // and at the limit of file sizes
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

#endif

void check_metrics_path(const std::string & path) {
    if (is_fifo(path)) {
#ifndef _WIN32
        if (access(path.c_str(), W_OK) != 0) {
            throw std::invalid_argument(cannot_write(path, strerror(errno)));
        }
#endif
        return;
    }
    const int fd = open_file(path);
    if (fd < 0) {
        throw std::invalid_argument(cannot_write(path, strerror(errno)));
    }
    close_file(fd);
}

// ---------------------------------------------------------------------------------------------------- queue

struct metrics_sink::queue {
    int fd;
    std::string prefix;
    long owner = process_id();

    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::string> pending;
    bool writing = false;
    bool stopping = false;
    bool ended = false;
    int64_t n_dropped = 0;
    std::thread thread;

    void run();
    std::string text_of(const std::string & line) const;
};

std::string metrics_sink::queue::text_of(const std::string & line) const {
    std::string text = prefix + line + "\n";
    for (size_t pos = 0; !prefix.empty() && (pos = text.find('\n', pos)) + 1 < text.size(); pos += prefix.size()) {
        text.insert(++pos, prefix); // indented JSON: every line carries the prefix
    }
    return text;
}

void metrics_sink::queue::run() {
    ignore_broken_pipes();
    bool stuck = false; // the last line found no room: nobody waits for the next one
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
        changed.wait(lock, [this] { return stopping || !pending.empty(); });
        if (pending.empty()) {
            break;
        }
        const std::string text = text_of(pending.front());
        pending.pop_front();
        writing = true;
        lock.unlock();

        const bool ok = write_all(fd, text, stuck ? 0 : 500);
        stuck = !ok;

        lock.lock();
        n_dropped += ok ? 0 : 1;
        writing = false;
        changed.notify_all();
    }
    close_file(fd);
    ended = true;
    changed.notify_all();
}

// ----------------------------------------------------------------------------------------------------- sink

static const std::chrono::seconds longest_wait(5); // for a device that hangs in a write

std::shared_ptr<metrics_sink> metrics_sink::open(const std::string & path) {
    static std::mutex mutex;
    static std::map<std::string, std::weak_ptr<metrics_sink>> sinks;

    const std::lock_guard<std::mutex> lock(mutex);
    if (auto sink = sinks[path].lock()) {
        return sink;
    }
    const int fd = path.empty() ? open_stderr() : open_file(path);
    if (fd < 0) {
        throw std::runtime_error((path.empty() ? "--metrics: " : "--metrics-file: ") +
                                 cannot_write(path.empty() ? "to stderr" : path, strerror(errno)));
    }
    auto sink = std::make_shared<metrics_sink>(fd, path.empty() ? "[METRICS] " : "");
    sinks[path] = sink;
    return sink;
}

metrics_sink::metrics_sink(int fd, std::string prefix) : shared(std::make_shared<queue>()) {
    shared->fd = fd;
    shared->prefix = std::move(prefix);
    shared->thread = std::thread([held = shared] { held->run(); });
}

metrics_sink::~metrics_sink() {
    if (shared->owner != process_id()) {
        shared->thread.detach();            // after a fork there is no such thread
        new std::shared_ptr<queue>(shared); // and its locks are in no state to be freed
        return;
    }
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->stopping = true;
    shared->changed.notify_all();
    const bool ended = shared->changed.wait_for(lock, longest_wait, [this] { return shared->ended; });
    lock.unlock();
    if (ended) {
        shared->thread.join();
    } else {
        shared->thread.detach(); // it holds the queue
    }
}

void metrics_sink::push(const std::string & line) {
    if (shared->owner != process_id()) {
        return; // a child of a fork: nobody would write it
    }
    {
        const std::lock_guard<std::mutex> lock(shared->mutex);
        if (shared->pending.size() >= max_pending) {
            shared->n_dropped++;
            return;
        }
        shared->pending.push_back(line);
    }
    shared->changed.notify_all();
}

void metrics_sink::flush() {
    if (shared->owner != process_id()) {
        return;
    }
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->changed.wait_for(lock, longest_wait, [this] { return shared->pending.empty() && !shared->writing; });
}

int64_t metrics_sink::dropped() const {
    const std::lock_guard<std::mutex> lock(shared->mutex);
    return shared->n_dropped;
}

} // namespace superllama
