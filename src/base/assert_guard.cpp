// Failed assertions of upstream as exceptions: see the header.
#include "base/assert_guard.h"

#include "ggml.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace superllama {

static thread_local bool throws = false;
static thread_local const char * blamed = "";
static thread_local assert_guard::file_rule rule = nullptr;
static ggml_abort_callback_t next_callback = nullptr; // of the application, asked outside of our scopes

// "path/file.cpp:12: GGML_ASSERT(a == b) failed" without the path, in one line.
static std::string shortened(const char * message) {
    const char * colon = strchr(message, ':');
    const char * name = message;
    for (const char * p = message; colon != nullptr && p < colon; ++p) {
        name = *p == '/' || *p == '\\' ? p + 1 : name;
    }
    std::string text = name;
    for (char & c : text) {
        c = c == '\n' || c == '\r' ? ' ' : c;
    }
    return text;
}

static void on_abort(const char * message) {
    if (throws) {
        const std::string text = shortened(message);
        if (rule == nullptr || rule(text.substr(0, text.find(':')).c_str())) {
            throw failed_assertion(std::string(blamed) + " (" + text + ")");
        }
    }
    if (next_callback != nullptr) {
        next_callback(message);
        return;
    }
    fprintf(stderr, "%s\n", message); // as ggml does without a callback; a debugger shows the rest
}

assert_guard::assert_guard(const char * blame, file_rule of_file) :
    blamed_before(blamed),
    rule_before(rule),
    threw_before(throws) {
    static const bool installed = [] {
        next_callback = ggml_set_abort_callback(on_abort);
        return true;
    }();
    (void) installed;
    throws = true;
    blamed = blame;
    rule = of_file;
}

assert_guard::~assert_guard() {
    throws = threw_before;
    blamed = blamed_before;
    rule = rule_before;
}

bool assert_guard::set_throwing(bool throwing) {
    const bool before = throws;
    throws = throwing;
    return before;
}

} // namespace superllama
