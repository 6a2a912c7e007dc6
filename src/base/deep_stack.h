// Work that recurses with the length of a text, on a stack that is long enough for it.
#pragma once

#include "base/error.h" // for the same callers

#include <cstddef>
#include <functional>
#include <string>

namespace superllama {

// What is left of this thread's stack; where the system does not say it, plenty.
size_t stack_left();

// Runs `work` in this thread where a stack as it is will do, else in a thread with a stack of `bytes`. Exceptions pass.
void run_on_stack(size_t bytes, const std::function<void()> & work);

// The stack that std::regex needs to cut `text` into words. It recurses with every character of a match, so one word
// of 30,000 letters ended the process. Throws std::invalid_argument where not even a stack of two gigabytes would do.
size_t regex_stack_bytes(const std::string & text);

// What `work` returns for a text, on a stack that is long enough.
template <class Work>
auto on_regex_stack(const std::string & text, Work work) {
    decltype(work()) result;
    run_on_stack(regex_stack_bytes(text), [&] { result = work(); });
    return result;
}

} // namespace superllama
