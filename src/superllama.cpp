// The C API of superllama.h: thin, and no exception leaves it.

#include "superllama.h"

#include "llama-context.h"
#include "llama-mem-telemetry.h"
#include "superllama-error.h"

#include <cstring>

static thread_local std::string last_error;

void superllama_set_error(const std::string & text) {
    last_error = text;
}

// Runs `body`; what it throws becomes superllama_last_error() and -1.
template <typename F>
static int32_t guarded(const F & body) {
    try {
        last_error.clear();
        return body();
    } catch (const std::exception & e) {
        last_error = e.what();
    } catch (...) {
        last_error = "unknown error";
    }
    return -1;
}

const char * superllama_version(void) {
    return SUPERLLAMA_VERSION;
}

const char * superllama_upstream_commit(void) {
    return SUPERLLAMA_UPSTREAM_COMMIT;
}

const char * superllama_last_error(void) {
    return last_error.c_str();
}

int32_t superllama_memory(struct superllama_memory * out) {
    return guarded([&] {
        *out = llama_mem_telemetry().sample();
        return 0;
    });
}

int32_t superllama_stats(const struct llama_context * ctx, struct superllama_stats * out) {
    return guarded([&] {
        ctx->superllama->stats(*out);
        return 0;
    });
}

int32_t superllama_kv_pages(const struct llama_context * ctx, struct superllama_kv_pages * out) {
    return guarded([&] {
        ctx->superllama->kv_pages(*out);
        return 0;
    });
}

int32_t superllama_kv_seq_pages(const struct llama_context * ctx, llama_seq_id seq, struct superllama_kv_seq_pages * out) {
    return guarded([&] {
        ctx->superllama->kv_seq_pages(seq, *out);
        return 0;
    });
}

int32_t superllama_kv_prefetch(struct llama_context * ctx, llama_seq_id seq) {
    return guarded([&] { return (int32_t) ctx->superllama->kv_prefetch(seq); });
}

int32_t superllama_metrics_json(const struct llama_context * ctx, char * buf, size_t size) {
    return guarded([&] {
        const std::string json = ctx->superllama->metrics_json();
        if (json.size() < size) {
            memcpy(buf, json.c_str(), json.size() + 1);
        }
        return (int32_t) json.size();
    });
}
