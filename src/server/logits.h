// What a request says of the tokens that come next beside upstream's samplers: a function of the engine's caller that
// changes the scores of all of them, how many there are at least, and which end it. A request carries that in its own
// tokens, for those go from the thread that asks to the slots.
#pragma once

#include "llama.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

struct common_params;

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

struct asker {
    std::shared_ptr<logits_hook> hook; // null: its caller changes no scores
    uint64_t n_least = 0;              // tokens before one may end it
    std::vector<llama_token> ends;     // of them each ends it, as the model's own ends do

    bool is_end(const llama_vocab * vocab, llama_token token) const;
    void ban_ends(const llama_vocab * vocab, float * scores) const;
};

// Who asks with this body: min_tokens and stop_token_ids are ours, the hook is that of the thread. Null: nothing is
// asked for. Throws std::invalid_argument for what cannot be.
std::shared_ptr<asker> asker_of(const std::string & body, int32_t n_vocab, const common_params & params);

// Whether tokens are chosen where scores cannot be changed before each of them.
bool chooses_several_at_once(const common_params & params);

// While it lives, what this thread makes tokens of belongs to this request; null: to one without wishes.
class asks_with {
  public:
    explicit asks_with(std::shared_ptr<asker> who);
    ~asks_with();
    asks_with(const asks_with &) = delete;
    asks_with & operator=(const asks_with &) = delete;

  private:
    std::shared_ptr<asker> before;
};

// Before a slot samples: `i` is the token's place among the logits.
template <class Slot>
void process_logits(Slot & slot, int32_t i) {
    const auto * who = static_cast<const asker *>(slot.task->tokens.asker.get());
    if (who == nullptr || (who->hook == nullptr && slot.stats.n_gen >= who->n_least)) {
        return;
    }
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(slot.ctx_tgt));
    float * scores = llama_get_logits_ith(slot.ctx_tgt, i);
    if (who->hook != nullptr) {
        who->hook->call(slot.prompt.tokens.get_text_tokens(), scores, (size_t) llama_vocab_n_tokens(vocab));
    }
    if (slot.stats.n_gen < who->n_least) {
        who->ban_ends(vocab, scores);
    }
}

// Whether a slot's text ends with this token.
template <class Slot>
bool is_end(const Slot & slot, const llama_vocab * vocab, llama_token token) {
    const auto * who = static_cast<const asker *>(slot.task->tokens.asker.get());
    return who != nullptr ? who->is_end(vocab, token) : llama_vocab_is_eog(vocab, token);
}

} // namespace superllama
