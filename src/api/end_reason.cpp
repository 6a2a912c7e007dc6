#include "api/end_reason.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <system_error>
#include <thread>

namespace superllama {

static std::terminate_handler of_library;
static std::thread::id main_thread;

// An exception that leaves a program's main function is its reason to fail, as for other bad input. One that leaves
// another thread is a fault, and ends it as before.
static void end_with_reason() {
    try {
        if (std::this_thread::get_id() == main_thread && std::current_exception() != nullptr) {
            std::rethrow_exception(std::current_exception());
        }
    } catch (const std::system_error & e) {
        const bool no_thread = e.code() == std::errc::resource_unavailable_try_again;
        fprintf(stderr, "error: %s%s\n", e.what(),
                no_thread
                    ? "; it cannot have another thread, see ulimit -u, and the limit of processes of its container"
                    : "");
        std::_Exit(1);
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\n", e.what());
        std::_Exit(1);
    } catch (...) {
    }
    of_library();
}

void tell_reasons() {
    if (std::get_terminate() != end_with_reason) {
        main_thread = std::this_thread::get_id();
        of_library = std::set_terminate(end_with_reason);
    }
}

} // namespace superllama
