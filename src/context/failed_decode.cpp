#include "context/failed_decode.h"

#include "base/assert_guard.h"
#include "base/error.h"
#include "llama-impl.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <map>
#include <new>
#include <string>

namespace superllama {

// Where the batch begins in each of its sequences. Without positions of its own it goes on from what is there.
static std::map<llama_seq_id, llama_pos> beginnings(llama_context * ctx, const llama_batch & batch) {
    std::map<llama_seq_id, llama_pos> found;
    llama_memory_t memory = llama_get_memory(ctx);
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        const int32_t n = batch.seq_id != nullptr ? batch.n_seq_id[i] : 1;
        for (int32_t s = 0; s < n; ++s) {
            const llama_seq_id seq = batch.seq_id != nullptr ? batch.seq_id[i][s] : 0;
            const auto [known, is_new] = found.try_emplace(seq, std::numeric_limits<llama_pos>::max());
            if (batch.pos != nullptr) {
                known->second = std::min(known->second, batch.pos[i]);
            } else if (is_new) {
                known->second = llama_memory_seq_pos_max(memory, seq) + 1;
            }
        }
    }
    return found;
}

static void remove_begun(llama_context * ctx, const std::map<llama_seq_id, llama_pos> & from) {
    llama_memory_t memory = llama_get_memory(ctx);
    for (const auto & [seq, pos] : from) {
        if (!llama_memory_seq_rm(memory, seq, pos, -1)) {
            llama_memory_seq_rm(memory, seq, -1, -1); // a state that cannot go back
        }
    }
}

int32_t computed(llama_context * ctx, const llama_batch & batch, const std::function<int32_t()> & compute) {
    set_error(""); // what failed before in this thread is no reason of this batch
    std::map<llama_seq_id, llama_pos> from;
    const bool has_memory = llama_get_memory(ctx) != nullptr;
    std::string why;
    const assert_guard guard("the batch cannot be computed: its parts contradict each other, or the context's sizes");
    try {
        if (has_memory && batch.pos == nullptr) { // what a batch has of its own can be asked for afterwards
            from = beginnings(ctx, batch);
        }
        return compute();
    } catch (const std::bad_alloc &) {
        why = "there is no memory for this batch; a smaller one, or a smaller --ubatch-size, may have room";
    } catch (const std::exception & e) {
        why = e.what();
    } catch (...) {
        why = "an exception of an unknown kind";
    }
    tried([&] {
        if (has_memory) {
            remove_begun(ctx, batch.pos != nullptr ? beginnings(ctx, batch) : from);
        }
        LLAMA_LOG_ERROR("%s: %s\n", __func__, why.c_str());
    });
    set_error(why);
    return -3;
}

} // namespace superllama
