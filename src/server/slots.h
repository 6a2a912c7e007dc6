// What the HTTP server's slots need beside upstream's code: adapters that a prompt was computed with, requests that do
// not fit together, an answer's last bytes. Templates, for the slots are a type of the patched source file.
#pragma once

#include "api/answer_format.h"
#include "api/schema_check.h"
#include "base/assert_guard.h"
#include "base/error.h"
#include "server/batch.h"
#include "server-task.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace superllama {

// ---------------------------------------------------------------------------------------------- adapters

// The adapters that are on, as a text to compare; those with an invocation sequence (aLoRA) are marked.
std::string adapters_of(const std::vector<common_adapter_lora_info> & adapters);

// Whether tokens computed with the adapters `have` are as good as computed with `want`: the same ones, or none where
// all that are wanted begin at an invocation, up to which the server reuses tokens at most.
bool adapters_match(const std::string & have, const std::string & want);

// A scale that an adapter can have. Throws std::invalid_argument for others, of which come numbers that are none.
float known_scale(float scale);

// --lora-init-without-apply, which upstream's server reads and forgets: its adapters wait until they are asked for.
void switch_off(common_params & params);

// ------------------------------------------------------------------------------------------ kept prompts
// What the server keeps beside its slots, prompts that others may go on with and checkpoints, lies in the model's
// budget. For the thread that runs the slots; without a budget there is room for everything.

bool charge_prompts(uint64_t bytes);     // of prompts; false: the weights cannot make so much room
bool charge_checkpoints(uint64_t bytes); // of prompts in slots
void log_dropped(const char * what, uint64_t bytes);
void log_unreadable(const char * what, uint64_t bytes);

// The prompts that are kept, for when the budget shrinks: their bytes, and the oldest one goes.
struct kept_prompts {
    std::function<uint64_t()> bytes;
    std::function<void()> drop_oldest;
};

void watch_prompts(kept_prompts prompts);
void make_room(); // those go for which there is no room any more

template <class States>
uint64_t bytes_of(const States & states) {
    uint64_t bytes = 0;
    for (const auto & state : states) {
        bytes += state.size();
    }
    return bytes;
}

template <class States>
void watch(States & states) {
    watch_prompts({ [&] { return bytes_of(states); },
                    [&] {
                        log_dropped("a kept prompt", states.front().size());
                        states.pop_front();
                    } });
}

// Before a prompt of so many bytes is kept: the oldest ones go for it. False: there is no room for it alone.
template <class States>
bool room_for_prompt(States & states, uint64_t bytes) {
    watch(states);
    while (!charge_prompts(bytes_of(states) + bytes)) {
        if (states.empty()) {
            return false;
        }
        log_dropped("a kept prompt", states.front().size());
        states.pop_front();
    }
    return true;
}

// Takes a slot's states for a kept prompt. False where they cannot be read, as when a device is gone: the prompt, which
// is the last one, is kept no more, for whoever went on from it would do so from bytes that nobody wrote.
template <class Cache, class Prompt>
bool saved(Cache & cache, Prompt & prompt, llama_context * target, llama_context * draft, llama_seq_id seq) {
    const auto is_whole = [seq](llama_context * ctx, auto & data) {
        return llama_state_seq_get_data_ext(ctx, data.data(), data.size(), seq, 0) == data.size();
    };
    if (is_whole(target, prompt.data.main) && (draft == nullptr || is_whole(draft, prompt.data.drft))) {
        return true;
    }
    log_unreadable("prompt", prompt.size());
    cache.states.pop_back();
    charge_prompts(bytes_of(cache.states));
    return false;
}

// Reads a slot's states for its last checkpoint. False, and that goes, where they cannot be read; upstream ends the
// process there.
template <class Checkpoints>
bool read_checkpoint(Checkpoints & checkpoints, llama_context * target, llama_context * draft, llama_seq_id seq) {
    auto & last = checkpoints.back();
    const bool is_whole = tried([&] {
        const assert_guard guard("a checkpoint cannot be read");
        last.update_tgt(target, seq, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
        last.update_dft(draft, seq, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    });
    if (!is_whole) {
        log_unreadable("checkpoint", last.size());
        checkpoints.pop_back();
    }
    return is_whole;
}

// Between two batches: the oldest checkpoints of slots go where there is no room for all of them.
template <class Slots>
void count_checkpoints(Slots & slots) {
    for (;;) {
        uint64_t bytes = 0, most = 0;
        typename Slots::value_type * largest = nullptr;
        for (auto & slot : slots) {
            const uint64_t own = bytes_of(slot.prompt.checkpoints);
            bytes += own;
            if (own > most) {
                most = own;
                largest = &slot;
            }
        }
        if (charge_checkpoints(bytes) || largest == nullptr) {
            return;
        }
        log_dropped("a checkpoint", largest->prompt.checkpoints.front().size());
        largest->prompt.checkpoints.pop_front();
    }
}

// ---------------------------------------------------------------------------------------- end of the server

// From now on whoever waits for a result gets an error: a client that stays connected would hold up the exit.
void stop_waiting();
bool server_ends();
void requests_stop_themselves(); // not so in a process that serves more than one model: each request is told to stop
server_task_result_ptr or_stopped(server_task_result_ptr result);

// ------------------------------------------------------------------------------------- batches and errors

// The most tokens in one batch: one ubatch, so that a client that is gone, or a signal, is heard after it. More where
// the `n_taken` tokens of other requests would leave little of it; all of a batch where ubatches overlap on several
// devices, or have to be in one.
int32_t batch_tokens(llama_context * ctx, int32_t n_taken, bool whole);
void serve_with(llama_context * ctx); // the context whose model's budget what is kept lies in

template <class Slots>
int32_t prompt_batch(llama_context * ctx, Slots & slots, int32_t n_taken) {
    serve_with(ctx);
    make_room();
    count_checkpoints(slots);
    bool whole = false;
    for (const auto & slot : slots) {
        whole = whole || (slot.task && slot.task->type == SERVER_TASK_TYPE_DECISION);
    }
    return batch_tokens(ctx, n_taken, whole);
}

// The reason that our part gave for the decode that failed in this thread, else upstream's text.
std::string why_decode_failed();

std::string why_no_room(int32_t n_held, int32_t n_prompt, int32_t n_others, int32_t n_held_by_others);

// Where the cells are full: ends the youngest request, with those that wait for it, and leaves the others their turn.
// `end` gets the slot, the reason with numbers, and its kind. False where there is no request to end.
template <class Slots, class Batch, class End>
bool give_up_one(Slots & slots, Batch & batch, int32_t off, const End & end) {
    const auto n_held = [&](const auto & slot) { // what waits in the batch has no cells yet
        return slot.prompt.n_tokens() - (int32_t) std::count_if(batch.tokens.begin() + off, batch.tokens.end(),
                                                                [&](const auto & t) { return t.id_slot == slot.id; });
    };
    typename Slots::value_type * youngest = nullptr;
    int32_t n_busy = 0;
    int32_t n_held_by_all = 0;
    for (auto & slot : slots) {
        if (!slot.is_processing()) {
            continue;
        }
        n_busy++;
        n_held_by_all += n_held(slot);
        if (slot.prompt.n_tokens() > 0 && (youngest == nullptr || slot.task->id > youngest->task->id)) {
            youngest = &slot;
        }
    }
    if (youngest == nullptr) {
        return false;
    }
    const int id_task = youngest->task->id;
    const std::string why =
        why_no_room(n_held(*youngest), youngest->task->n_tokens(), n_busy - 1, n_held_by_all - n_held(*youngest));
    const error_type type = n_busy > 1 ? ERROR_TYPE_UNAVAILABLE : ERROR_TYPE_EXCEED_CONTEXT_SIZE;
    std::vector<int> ended;
    for (auto & slot : slots) {
        if (slot.is_processing() && (&slot == youngest || slot.task->id_parent == id_task)) {
            ended.push_back(slot.id);
        }
    }
    remove_from_batch(slots, batch, off,
                      [&](int id) { return std::find(ended.begin(), ended.end(), id) != ended.end(); });
    for (auto & slot : slots) {
        if (std::find(ended.begin(), ended.end(), slot.id) != ended.end()) {
            end(slot, why, type);
        }
    }
    return true;
}

// Whether an image or a sound at this place of a slot's prompt finds no cells beside what all slots hold. Sequences
// that have cells of their own hold nothing of each other.
template <class Slots, class Slot>
bool is_full_for(const Slots & slots, const Slot & slot, size_t place) {
    const bool is_shared = llama_n_ctx_seq(slot.ctx_tgt) == llama_n_ctx(slot.ctx_tgt);
    size_t n_held = 0;
    for (const auto & other : slots) {
        n_held += is_shared || &other == &slot ? (size_t) other.prompt.n_tokens() : 0;
    }
    return n_held + mtmd_input_chunk_get_n_tokens(slot.task->tokens.find_chunk(place).get()) >
           llama_n_ctx_seq(slot.ctx_tgt);
}

// Computes it by `process`, which returns 0 where it has worked. Before it is given up, slots that only keep what they
// have computed make room, as they do for text: `make_room` clears one of them, and says whether there was one.
template <class Slots, class Slot, class Process, class MakeRoom>
void process_image(Slots & slots, Slot & slot, size_t place, const Process & process, const MakeRoom & make_room) {
    while (process() != 0) {
        slot.mem.seq_rm(slot.id, slot.prompt.tokens.pos_next(), -1); // a part of it may have found cells
        if (!is_full_for(slots, slot, place) || !make_room()) {
            return;
        }
    }
}

// `say` gets why that failed, and the kind of the error.
template <class Slots, class Slot, class Say>
void say_why_no_image(const Slots & slots, const Slot & slot, size_t place, const Say & say) {
    if (!is_full_for(slots, slot, place)) {
        return say("failed to process mtmd chunk", ERROR_TYPE_SERVER);
    }
    int32_t n_others = 0, n_held_by_others = 0;
    for (const auto & other : slots) {
        if (other.is_processing() && &other != &slot) {
            n_others++;
            n_held_by_others += other.prompt.n_tokens();
        }
    }
    say(why_no_room(slot.prompt.n_tokens(), slot.task->n_tokens(), n_others, n_held_by_others),
        n_others > 0 ? ERROR_TYPE_UNAVAILABLE : ERROR_TYPE_EXCEED_CONTEXT_SIZE);
}

// Whether a slot waits for the prompt of another one that has ended without it, as it does where the prompt is empty.
template <class Slots, class Slot>
bool is_orphan(const Slots & slots, const Slot & slot) {
    return std::none_of(slots.begin(), slots.end(), [&](const auto & other) {
        return other.is_processing() && other.task && other.task->id == slot.task->id_parent;
    });
}

// ---------------------------------------------------------------------------------------- ends of answers

// A token that ends inside a character has no text yet; if it is an answer's last one, the bytes so far are its text.
// True where it is to be streamed: with text, or to those who count tokens.
template <class Slot, class Token>
bool take_part(Slot & slot, Token & token) {
    token.text_to_send.clear();
    if (!slot.has_next_token) {
        token.text_to_send = slot.generated.text.substr(std::min(slot.n_sent_text, slot.generated.text.size()));
        slot.n_sent_text += token.text_to_send.size();
    }
    slot.add_token(token);
    const auto & params = slot.task->params;
    return params.stream && (!token.text_to_send.empty() || params.return_tokens || params.sampling.n_probs > 0);
}

// Tokens at the end of which nothing was sent: those of a stop word, which an answer leaves out, are among them.
template <class Tokens>
size_t n_unsent(const Tokens & tokens) {
    size_t n = 0;
    while (n < tokens.size() && tokens[tokens.size() - 1 - n].text_to_send.empty()) {
        n++;
    }
    return n;
}

// ------------------------------------------------------------------------------------------ restored slots

extern const char * const nothing_restored; // the reason for a client

// A slot's prompt that came from a file is one of the adapters that are on now. Returns whether any of it can be used:
// not where the cache keeps a window or a state only, and the file has no checkpoint of an earlier position.
bool restored(server_prompt & prompt, const std::vector<common_adapter_lora_info> & adapters, llama_context * ctx,
              int id_slot, int32_t n_swa);

} // namespace superllama
