#include "base/deep_stack.h"

#include "base/error.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <stdexcept>

#ifdef _WIN32
#    include <thread>
#else
#    include <pthread.h>
#endif

namespace superllama {

// A process gets 8 MiB for its first thread, and threads of some systems get 512 KiB.
static const size_t surely_there = 256 * 1024;

#ifndef _WIN32

struct deep_call {
    const std::function<void()> * work;
    std::exception_ptr error;
};

static void * run_deep(void * argument) {
    auto * call = (deep_call *) argument;
    try {
        (*call->work)();
    } catch (...) {
        call->error = std::current_exception();
    }
    return nullptr;
}

#    if defined(__linux__) || defined(__APPLE__)

static const char * lowest_of_stack() {
#        ifdef __APPLE__
    return (const char *) pthread_get_stackaddr_np(pthread_self()) - pthread_get_stacksize_np(pthread_self());
#        else
    pthread_attr_t attributes;
    void * lowest = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &lowest, &bytes);
        pthread_attr_destroy(&attributes);
    }
    return (const char *) lowest;
#        endif
}

size_t stack_left() {
    static thread_local const char * const lowest = lowest_of_stack();
    const char here = 0;
    return lowest != nullptr ? (size_t) (&here - lowest) : SIZE_MAX;
}

#    else

size_t stack_left() {
    return SIZE_MAX;
}

#    endif

void run_on_stack(size_t bytes, const std::function<void()> & work) {
    if (bytes <= surely_there) {
        work();
        return;
    }
    deep_call call = { &work, nullptr };
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_t thread;
    const bool sized = pthread_attr_setstacksize(&attributes, (bytes + 0xffff) & ~(size_t) 0xffff) == 0;
    const bool started = sized && pthread_create(&thread, &attributes, run_deep, &call) == 0;
    pthread_attr_destroy(&attributes);
    if (!started) {
        throw std::runtime_error("no memory for a stack of " + std::to_string(bytes >> 20) + " MiB");
    }
    pthread_join(thread, nullptr);
    if (call.error != nullptr) {
        std::rethrow_exception(call.error);
    }
}

#else

size_t stack_left() {
    return SIZE_MAX;
}

void run_on_stack(size_t, const std::function<void()> & work) {
    work(); // upstream's stacks are of a fixed size there
}

#endif

size_t regex_stack_bytes(const std::string & text) {
    // a match runs over letters, or over white space, or from one into the other once: never longer than two runs
    const size_t frame_bytes = 1024; // measured with libstdc++: 300 bytes a character; what is not used is not there
    const size_t most_bytes = (size_t) 1 << 31;

    size_t longest = 0;
    size_t run = 0;
    int last = -1;
    for (const unsigned char c : text) {
        const int space = c == ' ' || (c >= '\t' && c <= '\r');
        run = space == last ? run + 1 : 1;
        last = space;
        longest = std::max(longest, run);
    }
    const size_t bytes = (2 * longest + 64) * frame_bytes;
    if (bytes > most_bytes) {
        throw std::invalid_argument("the text has " + std::to_string(longest) +
                                    " bytes without a space, or of nothing but spaces; the tokenizer can take " +
                                    std::to_string(most_bytes / frame_bytes / 2 - 64) + ": put in line breaks");
    }
    return bytes;
}

} // namespace superllama
