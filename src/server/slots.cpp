#include "server/slots.h"

#include "src/llama-ext.h" // staging API: how many devices a model has
#include "superllama.h"
#include "log.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace superllama {

std::string adapters_of(const std::vector<common_adapter_lora_info> & adapters) {
    std::string text;
    for (size_t i = 0; i < adapters.size(); ++i) {
        if (adapters[i].scale != 0.0f) {
            const bool invoked = llama_adapter_get_alora_n_invocation_tokens(adapters[i].ptr) > 0;
            char scale[32];
            snprintf(scale, sizeof(scale), "%a", (double) adapters[i].scale); // every bit of it
            text += (invoked ? "a" : "l") + std::to_string(i) + "x" + scale + ";";
        }
    }
    return text;
}

bool adapters_match(const std::string & have, const std::string & want) {
    const bool all_invoked = want.find('l') == std::string::npos;
    return have == want || (have.empty() && all_invoked);
}

// ------------------------------------------------------------------------------------------ kept prompts

static thread_local struct {
    llama_context * ctx = nullptr;
    uint64_t prompts = 0;
    uint64_t checkpoints = 0;
    kept_prompts states;
    std::chrono::steady_clock::time_point looked_at;
} kept;

static bool charge_kept(uint64_t prompts, uint64_t checkpoints) {
    const bool is_less = prompts + checkpoints < kept.prompts + kept.checkpoints; // which counts in any case
    const bool fits = kept.ctx == nullptr || superllama_charge_prompt_cache(kept.ctx, prompts + checkpoints) == 0;
    if (fits || is_less) {
        kept.prompts = prompts;
        kept.checkpoints = checkpoints;
    }
    return fits;
}

void serve_with(llama_context * ctx) {
    if (ctx != kept.ctx) { // also after the server slept, and made a new one
        kept.ctx = ctx;
        kept.states = {};
        charge_kept(kept.prompts, kept.checkpoints);
    }
}

void watch_prompts(kept_prompts prompts) {
    kept.states = std::move(prompts);
}

void make_room() {
    const auto now = std::chrono::steady_clock::now();
    if (!kept.states.bytes || now - kept.looked_at < std::chrono::milliseconds(100)) {
        return;
    }
    kept.looked_at = now;
    for (uint64_t bytes; (bytes = kept.states.bytes()) > 0 && !charge_prompts(bytes);) {
        kept.states.drop_oldest();
    }
    charge_prompts(kept.states.bytes());
}

bool charge_prompts(uint64_t bytes) {
    return charge_kept(bytes, kept.checkpoints);
}

bool charge_checkpoints(uint64_t bytes) {
    return bytes == kept.checkpoints || charge_kept(kept.prompts, bytes);
}

void log_dropped(const char * what, uint64_t bytes) {
    LOG_INF("superllama: %s of %.1f MiB makes room: %s\n", what, (double) bytes / (1 << 20), superllama_last_error());
}

void log_unreadable(const char * what, uint64_t bytes) {
    LOG_WRN("superllama: a %s of %.1f MiB is not kept: its state cannot be read\n", what, (double) bytes / (1 << 20));
}

// ---------------------------------------------------------------------------------------------------------

float known_scale(float scale) {
    const float most = 10000.0f;
    if (!(std::fabs(scale) <= most)) { // not a number is none of these
        throw std::invalid_argument("the scale of an adapter must be a number between -10000 and 10000, not " +
                                    std::to_string(scale));
    }
    return scale;
}

void switch_off(common_params & params) {
    try {
        for (const common_adapter_lora_info & adapter : params.lora_adapters) {
            known_scale(adapter.scale);
        }
    } catch (const std::exception & e) {
        LOG_ERR("--lora-scaled: %s\n", e.what());
        exit(1);
    }
    if (params.lora_init_without_apply) {
        for (common_adapter_lora_info & adapter : params.lora_adapters) {
            adapter.scale = 0.0f;
        }
    }
}

static std::atomic_bool stops{ false };
static std::atomic_bool stop_themselves{ false };

void stop_waiting() {
    stops = !stop_themselves;
}

bool server_ends() {
    return stops;
}

void requests_stop_themselves() {
    stop_themselves = true;
}

server_task_result_ptr or_stopped(server_task_result_ptr result) {
    if (result == nullptr && stops) {
        auto error = std::make_unique<server_task_result_error>();
        error->err_type = ERROR_TYPE_UNAVAILABLE;
        error->err_msg = "the server ends";
        return error;
    }
    return result;
}

int32_t batch_tokens(llama_context * ctx, int32_t n_taken, bool whole) {
    const auto n_batch = (int32_t) llama_n_batch(ctx);
    const auto n_ubatch = (int32_t) llama_n_ubatch(ctx);
    if (whole || llama_model_n_devices(llama_get_model(ctx)) > 1) {
        return n_batch;
    }
    const int32_t least = n_ubatch / 2 + 1; // for prompts, however many others generate
    return std::min(n_batch, std::max(n_ubatch, n_taken + least));
}

std::string why_decode_failed() {
    const std::string reason = superllama_last_error();
    return reason.empty() ? "Compute error." : "Compute error: " + reason;
}

std::string why_no_room(int32_t n_held, int32_t n_prompt, int32_t n_others, int32_t n_held_by_others) {
    std::string text = "the context is full: this request has a prompt of " + std::to_string(n_prompt) +
                       " tokens and holds " + std::to_string(n_held) + " cells";
    if (n_others > 0) {
        text += ", " + std::to_string(n_others) + (n_others == 1 ? " other " : " others ") +
                std::to_string(n_held_by_others) +
                "; try again when they are done, or start the server with a larger "
                "--ctx-size or fewer slots (--parallel)";
    } else {
        text += "; start the server with a larger --ctx-size";
    }
    return text;
}

const char * const nothing_restored =
    "the slot was read, but none of its tokens can be used: this model's cache keeps a window or a state only, and the "
    "file holds no checkpoint before its end. Save slots of a server with context checkpoints (--ctx-checkpoints), or "
    "start it with --swa-full";

bool restored(server_prompt & prompt, const std::vector<common_adapter_lora_info> & adapters, llama_context * ctx,
              int id_slot, int32_t n_swa) {
    prompt.tokens.adapters = adapters_of(adapters);
    // as the server will decide for a prompt that goes on from here
    const llama_pos next = prompt.tokens.pos_next();
    const llama_pos first = llama_memory_seq_pos_min(llama_get_memory(ctx), id_slot);
    const llama_pos needed = std::max(0, next - n_swa);
    bool usable = prompt.tokens.empty() || first < needed;
    for (const auto & checkpoint : prompt.checkpoints) {
        usable = usable || (checkpoint.pos_max <= next && (checkpoint.pos_min < needed || checkpoint.pos_min == 0));
    }
    return usable;
}

} // namespace superllama
