// Meeting the other side of an RPC connection: is it one of ours, and does it speak?

#include "io/rpc_messages.h"

#include "io/rpc_link.h"
#include "io/rpc_meeting.h"

#include "ggml-impl.h"
#include "ggml-rpc.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef _WIN32
#    include <arpa/inet.h>
#    include <cerrno>
#    include <fcntl.h>
#    include <netdb.h>
#    include <netinet/in.h>
#    include <netinet/tcp.h>
#    include <poll.h>
#    include <sys/socket.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifdef _WIN32

void check_rpc_peer(const char *) {}

const char * rpc_client_name() {
    return "an address";
}

uintptr_t accept_client(uintptr_t listener) {
    return (uintptr_t) ::accept((SOCKET) listener, nullptr, nullptr);
}

#else

using clock = std::chrono::steady_clock;

// ------------------------------------------------------------------------------------- a server to be used

// One short conversation with a deadline; every failure is an exception that says what the peer did.
class rpc_probe {
  public:
    rpc_probe(const std::string & endpoint, int timeout_s) :
        endpoint(endpoint),
        timeout_s(timeout_s),
        deadline(clock::now() + std::chrono::seconds(timeout_s)) {}

    ~rpc_probe() {
        if (fd >= 0) {
            close(fd);
        }
    }

    rpc_probe(const rpc_probe &) = delete;
    rpc_probe & operator=(const rpc_probe &) = delete;

    [[noreturn]] void fail(const std::string & what) const { throw std::runtime_error(endpoint + ": " + what); }

    void connect() {
        const size_t colon = endpoint.find(':');
        if (colon == std::string::npos) {
            fail("no endpoint of an RPC server; write host:port");
        }
        addrinfo hints = {};
        hints.ai_family = AF_INET; // as upstream's connection will be
        hints.ai_socktype = SOCK_STREAM;
        addrinfo * found = nullptr;
        const int error =
            getaddrinfo(endpoint.substr(0, colon).c_str(), endpoint.substr(colon + 1).c_str(), &hints, &found);
        if (error != 0) {
            fail(std::string("cannot resolve it: ") + gai_strerror(error));
        }
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (fd >= 0) {
            fcntl(fd, F_SETFD, FD_CLOEXEC);
            fcntl(fd, F_SETFL, O_NONBLOCK);
        }
        const int failed = fd < 0 ? errno : rpc_connect_by(fd, found->ai_addr, found->ai_addrlen, deadline);
        freeaddrinfo(found);
        if (failed == ETIMEDOUT) {
            fail("no connection within " + std::to_string(timeout_s) + " s");
        }
        if (failed != 0) {
            fail(std::string("no connection: ") + strerror(failed));
        }
    }

    // An answer of exactly `size` bytes to one command.
    void ask(uint8_t command, const void * input, uint64_t input_size, void * output, uint64_t size) {
        const std::string message = framed(command, input, input_size);
        send_data(message.data(), message.size());
        uint64_t announced = 0;
        receive(&announced, sizeof(announced));
        if (memcmp(&announced, "HTTP/", 5) == 0) {
            fail("answers in HTTP: it is a web server, not superllama-rpc-server");
        }
        if (announced != size) {
            fail("answers with " + std::to_string(announced) + " bytes where " + std::to_string(size) +
                 " are due: no RPC server, or one of another version");
        }
        receive(output, size);
    }

    // The same command so often, with all of it sent before the first answer is read. Seconds that it takes.
    double ask_at_once(uint8_t command, const std::vector<uint8_t> & input, int times, uint64_t size) {
        std::string message;
        for (int i = 0; i < times; ++i) {
            message += framed(command, input.data(), input.size());
        }
        const clock::time_point begin = clock::now();
        send_data(message.data(), message.size());
        std::vector<uint8_t> answers(times * (sizeof(size) + size));
        receive(answers.data(), answers.size());
        return std::chrono::duration<double>(clock::now() - begin).count();
    }

    // as a socket has them
    bool send_data(const void * data, size_t size) {
        for (size_t n = 0; n < size;) {
            if (!rpc_poll(fd, POLLOUT, deadline)) {
                fail("takes a connection, but reads nothing within " + std::to_string(timeout_s) + " s");
            }
            const ssize_t sent = send(fd, (const char *) data + n, size - n, MSG_NOSIGNAL);
            if (sent < 0 && errno != EINTR && errno != EAGAIN) {
                fail(std::string("does not take a message: ") + strerror(errno));
            }
            n += sent > 0 ? (size_t) sent : 0;
        }
        return true;
    }

    bool recv_data(void * data, size_t size) {
        receive(data, size);
        return true;
    }

    bool flush() { return true; }

  private:
    static std::string framed(uint8_t command, const void * input, uint64_t input_size) {
        std::string message(1, (char) command);
        message.append((const char *) &input_size, sizeof(input_size));
        return message.append((const char *) input, input_size);
    }

    void receive(void * to, size_t size) {
        for (size_t n = 0; n < size;) {
            if (!rpc_poll(fd, POLLIN, deadline)) {
                fail("takes a connection, but does not answer within " + std::to_string(timeout_s) +
                     " s; an RPC server has one client at a time: is another one using it?");
            }
            const ssize_t got = recv(fd, (char *) to + n, size - n, 0);
            if (got == 0) {
                fail("closes the connection: no RPC server, or one of another version");
            }
            if (got < 0 && errno != EINTR && errno != EAGAIN) {
                fail(std::string("the connection fails: ") + strerror(errno));
            }
            n += got > 0 ? (size_t) got : 0;
        }
    }

    std::string endpoint;
    int timeout_s;
    clock::time_point deadline;
    int fd = -1;
};

// The protocol's numbers of HELLO, which never changes, and of others in the version that HELLO reports.
static const uint8_t command_hello = 14;
static const uint8_t command_device_count = 15;
static const uint8_t command_alloc_size = 13;

// By small messages, and by larger ones that change nothing on the server: what a tensor without bytes would take, of
// ten without bytes.
static rpc_link_speed measure_link(rpc_probe & probe, int timeout_s) {
    const std::vector<uint8_t> tensors(4 + 11 * 296);
    const int n_at_once = 32;
    const double bytes = (double) n_at_once * (double) tensors.size();
    rpc_link_speed speed = { (double) timeout_s, bytes / timeout_s };
    try {
        for (int i = 0; i < 8; ++i) { // the best of them: other programs have the cores meanwhile
            speed.round_trip_s =
                std::min(speed.round_trip_s, probe.ask_at_once(command_device_count, {}, 1, sizeof(uint32_t)));
        }
        for (int i = 0; i < 4; ++i) { // the first ones widen TCP's window
            const double s = probe.ask_at_once(command_alloc_size, tensors, n_at_once, sizeof(uint64_t));
            speed.bytes_per_s = std::max(speed.bytes_per_s, bytes / std::max(1e-6, s - speed.round_trip_s));
        }
    } catch (const std::exception & e) { // it is slow, which is what was to be known
        GGML_LOG_WARN("RPC server %s\n", e.what());
    }
    return speed;
}

void check_rpc_peer(const char * endpoint) {
    const int timeout_s = rpc_connect_s;
    const uint32_t max_devices = 4096;

    rpc_probe probe(endpoint, timeout_s);
    probe.connect();
    const uint8_t capabilities[24] = {};
    uint8_t version[4 + sizeof(capabilities)] = {};
    probe.ask(command_hello, capabilities, sizeof(capabilities), version, sizeof(version));
    const std::string why = rpc_meet(endpoint, wire_of(probe), version[3], version[0]);
    if (!why.empty()) {
        probe.fail(why);
    }
    if (version[0] != RPC_PROTO_MAJOR_VERSION || version[1] > RPC_PROTO_MINOR_VERSION) {
        probe.fail("speaks version " + std::to_string(version[0]) + "." + std::to_string(version[1]) +
                   " of the protocol, this program " + std::to_string(RPC_PROTO_MAJOR_VERSION) + "." +
                   std::to_string(RPC_PROTO_MINOR_VERSION) + "; use the same version of superllama on both sides");
    }
    uint32_t n_devices = 0;
    probe.ask(command_device_count, nullptr, 0, &n_devices, sizeof(n_devices));
    if (n_devices == 0 || n_devices > max_devices) {
        probe.fail("says that it has " + std::to_string(n_devices) + " devices");
    }
    const rpc_link_speed speed = measure_link(probe, timeout_s);
    rpc_set_link_speed(endpoint, speed);
    GGML_LOG_INFO("RPC server %s: %.2f ms there and back, %.1f MB/s\n", endpoint, speed.round_trip_s * 1e3,
                  speed.bytes_per_s / 1e6);
}

// ---------------------------------------------------------------------------------- a client to be served

static thread_local char client_name[INET_ADDRSTRLEN] = "?";

const char * rpc_client_name() {
    return client_name;
}

// Whether the first words of a client are there in time. The shortest are those of another server.
static bool speaks(int fd) {
    int words = 24;
    setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &words, sizeof(words));
    const bool here = rpc_poll(fd, POLLIN, clock::now() + std::chrono::seconds(rpc_handshake_s));
    words = 1;
    setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &words, sizeof(words));
    char first = 0;
    return here && recv(fd, &first, 1, MSG_PEEK | MSG_DONTWAIT) == 1;
}

// The process that watches this one learns that it came as far as serving somebody: if it dies now, a message did it.
static void tell_supervisor() {
    const char * pipe = getenv("SUPERLLAMA_RPC_SERVES");
    if (pipe != nullptr) {
        const bool told = write(atoi(pipe), "1", 1) == 1;
        (void) told; // the pipe is full: it was told often enough
    }
}

int accept_client(int listener) {
    // while a client is served, its server may accept another server, to reduce tensors with
    static thread_local const int of_clients = listener;
    for (;;) {
        sockaddr_in from = {};
        socklen_t from_size = sizeof(from);
        const int fd = ::accept(listener, (sockaddr *) &from, &from_size);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
                poll(nullptr, 0, 100); // until there is room again
                continue;
            }
            if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO) {
                continue;
            }
            return fd;
        }
        if (speaks(fd)) {
            rpc_watch(fd);
            if (listener == of_clients) {
                rpc_wait(rpc_waits::for_handshake, rpc_handshake_s);
                inet_ntop(AF_INET, &from.sin_addr, client_name, sizeof(client_name));
            }
            tell_supervisor();
            return fd;
        }
        close(fd);
    }
}

#endif

} // namespace superllama
