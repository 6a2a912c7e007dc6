// A program's own say in what token comes next: the engine's caller changes the scores of all tokens, before the
// samplers see them. A request carries its hook in its tokens, for those go from the thread that asks to the slots.
#pragma once

#include "llama.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace superllama {

class logits_hook {
  public:
    // As superllama_logits_callback has it: 0 goes on, anything else ends the request.
    using function = int32_t (*)(const int32_t * tokens, size_t n_tokens, float * scores, size_t n_scores,
                                 void * user_data);

    logits_hook(function callback, void * user_data) : callback(callback), user_data(user_data) {}

    // In the thread of the slots. Throws std::runtime_error where the callback fails, or nobody waits for it any more.
    void call(const std::vector<llama_token> & tokens, float * scores, size_t n_scores);

    // The callback is not called any more, and does not run. From within it, it ends first.
    void close();

  private:
    const function callback;
    void * const user_data;
    std::recursive_mutex mutex;
    bool is_closed = false;
};

// While it lives, what this thread makes tokens of belongs to the request with this hook; null: it has none.
class asks_with {
  public:
    explicit asks_with(std::shared_ptr<logits_hook> hook);
    ~asks_with();
    asks_with(const asks_with &) = delete;
    asks_with & operator=(const asks_with &) = delete;
};

// Before a slot samples: `i` is the token's place among the logits.
template <class Slot>
void process_logits(Slot & slot, int32_t i) {
    auto * hook = static_cast<logits_hook *>(slot.task->tokens.asker.get());
    if (hook != nullptr) {
        const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(slot.ctx_tgt));
        float * scores = llama_get_logits_ith(slot.ctx_tgt, i);
        hook->call(slot.prompt.tokens.get_text_tokens(), scores, (size_t) llama_vocab_n_tokens(vocab));
    }
}

} // namespace superllama
