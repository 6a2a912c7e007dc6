#include "io/rpc_supervisor.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

// ------------------------------------------------------------------------------------------------ flags

namespace {

// The backend, which the program loads at run time, reads them as variables of its process.
const struct {
    const char *name, *value, *variable, *about;
} our_flags[] = {
    { "--model-dir", "DIR", "SUPERLLAMA_RPC_MODEL_DIR",
      "folder of GGUF files: weights that are in them are read here, not sent by clients" },
    { "--rpc-secret", "FILE", "SUPERLLAMA_RPC_SECRET",
      "serve only clients that prove that they know the content of this file, 16 to 4096 bytes" },
};

} // namespace

static void set_variable(const char * name, const char * value) {
#ifdef _WIN32
    _putenv_s(name, value);
#else
    setenv(name, value, 1);
#endif
}

static void take_our_flags(int & argc, char ** argv) {
    int n_kept = 1;
    for (int i = 1; i < argc; ++i) {
        bool ours = false;
        for (const auto & flag : our_flags) {
            ours = strcmp(argv[i], flag.name) == 0;
            if (ours && i + 1 == argc) {
                fprintf(stderr, "error: %s wants a value: %s\n", flag.name, flag.value);
                exit(1);
            }
            if (ours) {
                set_variable(flag.variable, argv[++i]);
                break;
            }
        }
        if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
            fprintf(stderr, "superllama options:\n");
            for (const auto & flag : our_flags) {
                fprintf(stderr, "  %-32s %s\n", (std::string(flag.name) + " " + flag.value).c_str(), flag.about);
            }
            fprintf(stderr, "\n");
        }
        if (!ours) {
            argv[n_kept++] = argv[i];
        }
    }
    argv[n_kept] = nullptr;
    argc = n_kept;
}

// ------------------------------------------------------------------------------------------------ processes

#ifndef _WIN32

#    include <cerrno>
#    include <csignal>
#    include <fcntl.h>
#    include <sys/wait.h>
#    include <unistd.h>

#    ifdef __linux__
#        include <sys/prctl.h>
#    endif

namespace superllama {

static volatile sig_atomic_t told_to_stop = 0;
static volatile pid_t child = 0;

static void pass_on(int signal) {
    told_to_stop = signal;
    if (child > 0) {
        kill(child, signal);
    }
}

static const int passed_on[] = { SIGTERM, SIGINT, SIGHUP, SIGQUIT };

// Waits for the child. Returns only where it died of a signal that nobody sent on purpose, after it had served.
static void watch_child(int served) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    char byte = 0;
    const bool has_served = read(served, &byte, 1) == 1;
    if (WIFEXITED(status)) {
        _exit(WEXITSTATUS(status));
    }
    const int signal = WTERMSIG(status);
    if (told_to_stop != 0 || !has_served) {
        std::signal(signal, SIG_DFL);
        raise(signal);
        _exit(128 + signal);
    }
    fprintf(stderr, "RPC server: ended by signal %d (%s) while serving; that connection is lost, the next is served\n",
            signal, strsignal(signal));
}

void rpc_supervise(int & argc, char ** argv) {
    take_our_flags(argc, argv);
    const pid_t parent = getpid();
    for (;;) {
        int served[2];
        if (pipe(served) != 0) {
            return; // serve without a net
        }
        for (int fd : served) {
            fcntl(fd, F_SETFL, O_NONBLOCK);
        }
        const pid_t forked = fork();
        if (forked <= 0) {
            close(served[0]);
            for (int signal : passed_on) {
                std::signal(signal, SIG_DFL);
            }
            if (forked == 0) {
#    ifdef __linux__
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                if (getppid() != parent) {
                    _exit(1);
                }
#    endif
                setenv("SUPERLLAMA_RPC_SERVES", std::to_string(served[1]).c_str(), 1);
            } else {
                close(served[1]);
            }
            return;
        }
        child = forked;
        close(served[1]);
        for (int signal : passed_on) {
            std::signal(signal, pass_on);
        }
        if (told_to_stop != 0) {
            kill(forked, told_to_stop); // it came before there was a child to pass it on to
        }
        watch_child(served[0]);
        close(served[0]);
    }
}

} // namespace superllama

#else

namespace superllama {

void rpc_supervise(int & argc, char ** argv) {
    take_our_flags(argc, argv);
}

} // namespace superllama

#endif
