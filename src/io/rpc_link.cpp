#include "io/rpc_link.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

#ifdef _WIN32
#    define WIN32_LEAN_AND_MEAN
#    include <winsock2.h>
#else
#    include <fcntl.h>
#    include <netinet/in.h>
#    include <netinet/tcp.h>
#    include <poll.h>
#    include <sys/socket.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifdef _WIN32

void rpc_wait(rpc_waits, int) {}

int64_t rpc_send(rpc_socket fd, const void * data, size_t bytes) {
    return ::send((SOCKET) fd, (const char *) data, (int) bytes, 0);
}

int64_t rpc_receive(rpc_socket fd, void * data, size_t bytes, size_t) {
    return ::recv((SOCKET) fd, (char *) data, (int) bytes, 0);
}

bool rpc_poll(rpc_socket, short, std::chrono::steady_clock::time_point) {
    return true;
}

int rpc_connect_by(rpc_socket fd, const void * address, size_t bytes, std::chrono::steady_clock::time_point) {
    return ::connect((SOCKET) fd, (const sockaddr *) address, (int) bytes) == 0 ? 0 : WSAGetLastError();
}

int rpc_connect_to(rpc_socket fd, const void * address, size_t bytes) {
    return ::connect((SOCKET) fd, (const sockaddr *) address, (int) bytes);
}

void rpc_watch(rpc_socket) {}

#else

using clock = std::chrono::steady_clock;

static thread_local rpc_waits waits = rpc_waits::for_answers;
static thread_local clock::time_point handshake_end;

static int answer_s() {
    static const int seconds = [] {
        const char * text = getenv("SUPERLLAMA_RPC_TIMEOUT");
        if (text == nullptr || text[0] == 0) {
            return rpc_answer_s;
        }
        const long most = 999999;
        char * end = nullptr;
        const long n = strtol(text, &end, 10);
        if (*end != 0 || n <= 0 || n > most) {
            GGML_LOG_ERROR("RPC: SUPERLLAMA_RPC_TIMEOUT=%s is no number of seconds from 1 to %ld; %d are used\n", text,
                           most, rpc_answer_s);
            return rpc_answer_s;
        }
        return (int) n;
    }();
    return seconds;
}

// Never longer than an answer.
static int at_most(int seconds) {
    return std::min(seconds, answer_s());
}

void rpc_wait(rpc_waits what, int seconds) {
    waits = what;
    handshake_end = clock::now() + std::chrono::seconds(at_most(seconds));
}

// Whether TCP has asked the other side for a sign of life in vain. A peer that computes and takes nothing meanwhile
// gives one; TCP_USER_TIMEOUT would end its connection too.
static bool is_cut_off(int fd) {
#    ifdef __linux__
    tcp_info info = {};
    socklen_t size = sizeof(info);
    return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 &&
           (info.tcpi_retransmits > 0 || info.tcpi_probes > 1) &&
           info.tcpi_last_ack_recv > 1000u * (unsigned) at_most(rpc_dead_s);
#    else
    (void) fd;
    return false;
#    endif
}

// Between the attempts of a call that waits a second at most each: whether there is to be another one.
class patience {
  public:
    patience(int fd, const char * what, int64_t ms) : fd(fd), what(what), ms(ms) {}

    bool goes_on() {
        if (errno == EINTR) {
            return true;
        }
        if (errno != EAGAIN && errno != EWOULDBLOCK) {
            GGML_LOG_ERROR("RPC: the connection is lost: %s\n", strerror(errno));
            return false;
        }
        const int64_t waited = std::chrono::duration_cast<std::chrono::milliseconds>(clock::now() - begin).count();
        const bool cut = is_cut_off(fd);
        if (!cut && (ms < 0 || waited < ms)) {
            return true;
        }
        if (cut) {
            GGML_LOG_ERROR("RPC: the network does not reach the peer any more; the connection is given up\n");
        } else {
            GGML_LOG_ERROR("RPC: the peer %s for %.0f s; the connection is given up\n", what, (double) waited / 1000);
        }
        shutdown(fd, SHUT_RDWR); // what came in part leaves nothing that could be gone on with
        return false;
    }

  private:
    int fd;
    const char * what;
    int64_t ms; // negative: for ever
    clock::time_point begin = clock::now();
};

static int64_t receive_ms(size_t whole) {
    if (waits == rpc_waits::for_handshake) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(handshake_end - clock::now()).count();
        return std::max<int64_t>(left, 0);
    }
    if (waits == rpc_waits::for_commands && whole == 1) { // the first byte of a message is its command
        return -1;
    }
    const bool begins = waits == rpc_waits::for_answers && whole == sizeof(uint64_t);
    return 1000ll * (begins ? answer_s() : at_most(rpc_silence_s));
}

// A client may have to wait until a server has computed and reads on.
static int64_t send_ms() {
    return 1000ll * (waits == rpc_waits::for_answers ? answer_s() : at_most(rpc_silence_s));
}

int64_t rpc_receive(rpc_socket fd, void * data, size_t bytes, size_t whole) {
    patience wait(fd, "has said nothing", receive_ms(whole));
    ssize_t n;
    do {
        n = recv(fd, data, bytes, 0);
    } while (n < 0 && wait.goes_on());
    return n;
}

int64_t rpc_send(rpc_socket fd, const void * data, size_t bytes) {
    patience wait(fd, "has taken nothing", send_ms());
    ssize_t n;
    do {
        n = send(fd, data, bytes, MSG_NOSIGNAL);
    } while (n < 0 && wait.goes_on());
    return n;
}

bool rpc_poll(rpc_socket fd, short events, clock::time_point deadline) {
    for (;;) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - clock::now()).count();
        pollfd p = { fd, events, 0 };
        const int n = poll(&p, 1, (int) std::max<int64_t>(left, 0));
        if (n >= 0 || errno != EINTR) {
            return n > 0;
        }
    }
}

int rpc_connect_by(rpc_socket fd, const void * address, size_t bytes, clock::time_point deadline) {
    int error = ::connect(fd, (const sockaddr *) address, (socklen_t) bytes) == 0 ? 0 : errno;
    if (error == EINPROGRESS) {
        socklen_t size = sizeof(error);
        if (!rpc_poll(fd, POLLOUT, deadline)) {
            return ETIMEDOUT;
        }
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    }
    return error;
}

int rpc_connect_to(rpc_socket fd, const void * address, size_t bytes) {
    const int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    const int error = rpc_connect_by(fd, address, bytes, clock::now() + std::chrono::seconds(rpc_connect_s));
    if (error != 0) {
        GGML_LOG_ERROR("RPC: no connection within %d s: %s\n", rpc_connect_s, strerror(error));
        close(fd);
        return -1;
    }
    fcntl(fd, F_SETFL, flags);
    rpc_watch(fd);
    if (waits == rpc_waits::for_answers) { // a server that connects to another one is no client of it
        rpc_wait(rpc_waits::for_handshake, rpc_connect_s);
    }
    return 0;
}

void rpc_watch(rpc_socket fd) {
    const auto set = [fd](int level, int option, int value) { setsockopt(fd, level, option, &value, sizeof(value)); };
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
#    ifdef TCP_KEEPIDLE
    const int dead_s = at_most(rpc_dead_s);
    set(IPPROTO_TCP, TCP_KEEPIDLE, std::max(1, dead_s / 2));
    set(IPPROTO_TCP, TCP_KEEPINTVL, std::max(1, dead_s / 4));
    set(IPPROTO_TCP, TCP_KEEPCNT, 2);
#    endif
    const timeval second = { 1, 0 }; // of one attempt
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof(second));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &second, sizeof(second));
}

#endif

} // namespace superllama
