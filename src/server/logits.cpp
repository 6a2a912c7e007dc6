#include "server/logits.h"

#include "server-common.h"

#include <stdexcept>
#include <utility>

namespace superllama {

void logits_hook::call(const std::vector<llama_token> & tokens, float * scores, size_t n_scores) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (is_closed) {
        throw std::runtime_error("the request was cancelled");
    }
    if (scores == nullptr) {
        throw std::runtime_error("the logits are not on the host, where a function could change them");
    }
    if (callback(tokens.data(), tokens.size(), scores, n_scores, user_data) != 0) {
        throw std::runtime_error("the function that changes logits has failed");
    }
}

void logits_hook::close() {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    is_closed = true;
}

static thread_local std::shared_ptr<logits_hook> of_thread;

asks_with::asks_with(std::shared_ptr<logits_hook> hook) {
    of_thread = std::move(hook);
}

asks_with::~asks_with() {
    of_thread.reset();
}

} // namespace superllama

// a member of upstream's struct, see the patch: whoever makes tokens asks for them
std::shared_ptr<void> server_tokens::asks() {
    return superllama::of_thread;
}
