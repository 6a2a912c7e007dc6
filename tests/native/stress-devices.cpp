// Layers and their KV move between devices and host at random while two contexts decode: every logit must stay what
// it is without devices.
//
//   stress-devices MODEL N_MOVES SEED [HOST:PORT ...]
//
// Without servers the devices are the GPUs of this build; they compute with other kernels, and logits need only be as
// close there as those of the same model loaded onto the GPUs once, which a wrong weight or cell would not leave them.
// Else the devices are RPC servers on this machine with
// one thread, and no weight is repacked: then all of them compute with the same kernels, and the reference is the same
// model on the host, loaded without superllama's features.

#include "check.h"
#include "llama.h"
#include "rpc-devices.h"
#include "superllama.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

static const int n_contexts = 2;

struct session {
    llama_model * model;
    std::vector<llama_context *> ctx;
};

static llama_context * open_context(llama_model * model) {
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = 512;
    cparams.n_batch = 64;
    cparams.n_ubatch = 32;
    cparams.n_outputs_max = 1;
    cparams.n_threads = 1;
    cparams.n_threads_batch = 1;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED; // "auto" depends on where the layers are at the time
    llama_context * ctx = llama_init_from_model(model, cparams);
    CHECK(ctx != nullptr);
    return ctx;
}

static session open_session(const char * path, bool dynamic, bool on_devices) {
    llama_model_params mparams = llama_model_default_params();
    mparams.use_extra_bufts = false;
    mparams.n_gpu_layers = on_devices ? -1 : 0;
    mparams.superllama.dynamic_layers = dynamic;
    mparams.superllama.async_prefetch = true;
    session s = { llama_model_load_from_file(path, mparams), {} };
    CHECK(s.model != nullptr);
    for (int i = 0; i < n_contexts; ++i) {
        s.ctx.push_back(open_context(s.model));
    }
    return s;
}

static void decode(llama_context * ctx, std::vector<llama_token> tokens) {
    CHECK(llama_decode(ctx, llama_batch_get_one(tokens.data(), (int32_t) tokens.size())) == 0);
}

static double normalized_error(const float * a, const float * b, int n) {
    double error = 0, power = 0;
    for (int i = 0; i < n; ++i) {
        error += ((double) a[i] - b[i]) * ((double) a[i] - b[i]);
        power += (double) a[i] * a[i];
    }
    return error / power;
}

int main(int argc, char ** argv) {
    CHECK(argc >= 4);
    const int n_moves_wanted = atoi(argv[2]);
    const int n_servers = argc - 4;
    const int n_devices = std::max(1, n_servers);
    std::mt19937 rng((unsigned) atoi(argv[3]));
    if (getenv("VERBOSE") == nullptr) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }
    ggml_backend_load_all();
    for (int i = 0; i < n_servers; ++i) {
        add_rpc_device(argv[4 + i]);
    }
    llama_backend_init();

    session stock = open_session(argv[1], false, false);
    session dynamic = open_session(argv[1], true, true);
    session fixed = {}; // on GPUs: where the layers stay
    if (n_servers == 0) {
        fixed = open_session(argv[1], false, true);
    }
    double error_of_kernels = 0;
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(stock.model));
    const auto stats = [&] {
        struct superllama_stats s;
        CHECK(superllama_stats(dynamic.ctx[0], &s) == 0);
        return s;
    };
    const double all = (double) stats().vram_own_bytes;
    CHECK(all > 0);

    std::vector<session *> sessions = { &stock, &dynamic };
    if (fixed.model != nullptr) {
        sessions.push_back(&fixed);
    }
    int n_steps = 0, n_past[n_contexts] = {};
    int64_t n_moves = 0, gpu_min = INT64_MAX, gpu_max = 0;
    for (; n_moves < n_moves_wanted; ++n_steps) {
        const auto new_budgets = [&] {
            std::vector<uint64_t> budgets(SUPERLLAMA_MAX_DEVICES);
            for (uint64_t & bytes : budgets) {
                bytes = (uint64_t) std::max(1.0, all * 1.2 / n_devices * (double) (rng() % 1000) / 1000);
            }
            return budgets;
        };
        const int c = (int) (rng() % n_contexts);
        if (rng() % 16 == 0) { // a context goes, another one comes
            for (session * s : sessions) {
                llama_free(s->ctx[(size_t) c]);
                s->ctx[(size_t) c] = open_context(s->model);
            }
            n_past[c] = 0;
        }
        const int n_tokens = rng() % 8 == 0 ? 1 + (int) (rng() % 48) : 1;
        if (n_past[c] + n_tokens > 500) {
            for (session * s : sessions) { // the context shifts: K is rotated where it is
                llama_memory_seq_rm(llama_get_memory(s->ctx[(size_t) c]), 0, 0, 250);
                llama_memory_seq_add(llama_get_memory(s->ctx[(size_t) c]), 0, 250, -1, -250);
            }
            n_past[c] -= 250;
        }
        std::vector<llama_token> tokens;
        for (int i = 0; i < n_tokens; ++i) {
            tokens.push_back((llama_token) (rng() % (unsigned) n_vocab));
        }
        std::thread other; // moves between the graphs of a running decode
        const auto budgets = new_budgets();
        const auto set = [&] { CHECK(superllama_set_budgets(dynamic.model, nullptr, budgets.data()) == 0); };
        const unsigned when = rng() % 4;
        if (when == 0) {
            set();
        } else if (when == 1) {
            other = std::thread(set);
        }
        if (rng() % 16 ==
            0) { // a state survives moves of the KV that it is saved from; its cells may be elsewhere then
            for (session * s : sessions) {
                llama_context * ctx = s->ctx[(size_t) c];
                std::vector<uint8_t> state(llama_state_get_size(ctx));
                CHECK(llama_state_get_data(ctx, state.data(), state.size()) > 0);
                CHECK(llama_state_set_data(ctx, state.data(), state.size()) > 0);
            }
        }
        decode(dynamic.ctx[(size_t) c], tokens);
        if (other.joinable()) {
            other.join();
        }
        decode(stock.ctx[(size_t) c], tokens);
        if (fixed.model != nullptr) {
            decode(fixed.ctx[(size_t) c], tokens);
        }
        n_past[c] += n_tokens;

        const float * a = llama_get_logits_ith(stock.ctx[(size_t) c], -1);
        const float * b = llama_get_logits_ith(dynamic.ctx[(size_t) c], -1);
        if (n_servers > 0) {
            if (memcmp(a, b, sizeof(float) * (size_t) n_vocab) != 0) {
                fprintf(stderr, "step %d: logits of context %d differ after %d tokens: %g, %g\n", n_steps, c, n_past[c],
                        a[0], b[0]);
                return 1;
            }
        } else {
            const float * f = llama_get_logits_ith(fixed.ctx[(size_t) c], -1);
            error_of_kernels = std::max(error_of_kernels, normalized_error(a, f, n_vocab));
            const double error = normalized_error(a, b, n_vocab);
            if (!(error <= 4 * error_of_kernels + 1e-4)) {
                fprintf(stderr,
                        "step %d: logits differ by %g from those of the host, %g would be those of the kernels\n",
                        n_steps, error, error_of_kernels);
                return 1;
            }
        }
        const struct superllama_stats s = stats();
        std::vector<struct superllama_layer> layers((size_t) superllama_layers(dynamic.model, nullptr, 0));
        superllama_layers(dynamic.model, layers.data(), (int32_t) layers.size());
        std::set<const char *> used;
        n_moves = 0;
        for (const struct superllama_layer & l : layers) {
            n_moves += l.n_device_loads + l.n_device_evictions;
            used.insert(l.device);
        }
        used.erase(nullptr);
        // A budget that came in the middle of a decode holds from the next one on. Where no layer is on a device, the
        // compute buffers of the other context may be too large for it until that decodes.
        if (when != 1 && (int) used.size() == n_devices && s.vram_own_bytes > s.vram_budget_bytes) {
            fprintf(stderr, "step %d: %lld bytes on devices, budgets %lld, %lld layers\n", n_steps,
                    (long long) s.vram_own_bytes, (long long) s.vram_budget_bytes, (long long) s.gpu_layers_active);
            return 1;
        }
        gpu_min = std::min(gpu_min, s.gpu_layers_active);
        gpu_max = std::max(gpu_max, s.gpu_layers_active);
    }
    CHECK(gpu_min < gpu_max);
    const struct superllama_stats last = stats();
    printf("{\"steps\":%d,\"moves\":%lld,\"gpu_layers_min\":%lld,\"gpu_layers_max\":%lld,\"move_ms\":%.1f,"
           "\"expert_device_hits\":%lld,\"expert_device_misses\":%lld}\n",
           n_steps, (long long) n_moves, (long long) gpu_min, (long long) gpu_max, last.move_ms,
           (long long) last.expert_device_hits, (long long) last.expert_device_misses);

    for (const session & s : { stock, dynamic, fixed }) {
        for (llama_context * ctx : s.ctx) {
            llama_free(ctx);
        }
        llama_model_free(s.model);
    }
    llama_backend_free();
    return 0;
}
