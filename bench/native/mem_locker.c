// Lock memory so that a model has to do with what is left:
//
//     mem_locker BYTES RESERVE_BYTES
//     mem_locker --leave MODEL_BYTES RESERVE_BYTES      lock = total - reserve - memory for the model
//
// Prints one JSON line with what it really locked, then waits; releases everything when its standard input ends,
// on a signal, or when its parent dies. Refuses to lock so much that less than RESERVE_BYTES stay available.

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

static uint64_t meminfo(const char * key) {
    FILE * file = fopen("/proc/meminfo", "r");
    char line[256];
    uint64_t kb = 0;
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        if (strncmp(line, key, strlen(key)) == 0) {
            kb = strtoull(line + strlen(key), NULL, 10);
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return kb * 1024;
}

static uint64_t locked_by_me(void) {
    FILE * file = fopen("/proc/self/status", "r");
    char line[256];
    uint64_t kb = 0;
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        if (strncmp(line, "VmLck:", 6) == 0) {
            kb = strtoull(line + 6, NULL, 10);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return kb * 1024;
}

static int refuse(const char * why, uint64_t wanted, uint64_t possible) {
    printf("{\"locked\":0,\"wanted\":%llu,\"possible\":%llu,\"error\":\"%s\"}\n", (unsigned long long) wanted,
           (unsigned long long) possible, why);
    return 1;
}

int main(int argc, char ** argv) {
    const int leave = argc == 4 && strcmp(argv[1], "--leave") == 0;
    if (argc != 3 && !leave) {
        fprintf(stderr, "usage: mem_locker BYTES RESERVE_BYTES | mem_locker --leave MODEL_BYTES RESERVE_BYTES\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() == 1) {
        return 1; // the parent died before that took effect
    }
    const uint64_t total = meminfo("MemTotal:");
    const uint64_t reserve = strtoull(argv[argc - 1], NULL, 10);
    uint64_t wanted = strtoull(argv[leave ? 2 : 1], NULL, 10);
    if (leave) {
        wanted = total > reserve + wanted ? total - reserve - wanted : 0;
    }

    const uint64_t available = meminfo("MemAvailable:");
    const uint64_t possible = available > reserve ? available - reserve : 0;
    if (wanted > possible) {
        return refuse("more than is available beyond the reserve; lock less, or free memory first", wanted, possible);
    }
    struct rlimit limit;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur < wanted && geteuid() != 0) {
        return refuse("RLIMIT_MEMLOCK is lower; raise it (ulimit -l, limits.conf) or run as root", wanted, limit.rlim_cur);
    }

    // piece by piece, so that a failure half-way is seen with its number instead of as a dead process
    const uint64_t piece = 64ull << 20;
    uint64_t locked = 0;
    int error = 0;
    while (locked < wanted && error == 0) {
        const uint64_t size = wanted - locked < piece ? wanted - locked : piece;
        void * at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || mlock(at, size) != 0) {
            error = errno ? errno : ENOMEM;
        } else if (meminfo("MemAvailable:") < reserve / 2) {
            error = ENOMEM; // others took memory meanwhile: stop before the kernel has to kill
        } else {
            locked += size;
        }
    }
    printf("{\"locked\":%llu,\"wanted\":%llu,\"possible\":%llu,\"error\":\"%s\"}\n", (unsigned long long) locked_by_me(),
           (unsigned long long) wanted, (unsigned long long) possible, error ? strerror(error) : "");
    fflush(stdout);
    if (error) {
        return 1;
    }
    char byte;
    while (read(STDIN_FILENO, &byte, 1) > 0) {
    }
    return 0;
}
