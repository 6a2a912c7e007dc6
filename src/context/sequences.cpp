#include "context/sequences.h"

#include "kv/pager.h"
#include "llama-batch.h"
#include "llama-memory.h"

#include <algorithm>

namespace superllama {

// A sequence with one token in the ubatch that asks for its output is generating; the rest is prompt.
static bool is_generated(const llama_ubatch & ubatch, uint32_t i) {
    if (ubatch.output[i] == 0 || ubatch.n_seq_id[i] != 1) {
        return false;
    }
    const llama_seq_id seq = ubatch.seq_id[i][0];
    // tokens of one sequence are neighbours
    for (uint32_t j : { i - 1, i + 1 }) {
        if (j < ubatch.n_tokens && std::count(ubatch.seq_id[j], ubatch.seq_id[j] + ubatch.n_seq_id[j], seq) > 0) {
            return false;
        }
    }
    return true;
}

int64_t sequence_counts::add(const llama_ubatch & ubatch) {
    int64_t n_generated = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const bool generated = is_generated(ubatch, i);
        n_generated += generated ? 1 : 0;
        // a token that several sequences share was computed once, and in no order of them
        const llama_seq_id seq = *std::min_element(ubatch.seq_id[i], ubatch.seq_id[i] + ubatch.n_seq_id[i]);
        counters & of = counts.at((size_t) seq);
        (generated ? of.generated_tokens : of.prompt_tokens).fetch_add(1, std::memory_order_relaxed);
    }
    return n_generated;
}

void sequence_counts::look(const llama_memory_i * memory, const kv_pager * pager, bool paged) {
    for (llama_seq_id seq = 0; seq < (llama_seq_id) counts.size(); ++seq) {
        const llama_pos last = memory != nullptr ? memory->seq_pos_max(seq) : -1;
        struct superllama_kv_seq_pages held = {};
        if (last >= 0 && pager != nullptr) {
            pager->count_seq(seq, held);
        }
        counters & of = counts[(size_t) seq];
        of.kv_tokens = last + 1;
        of.kv_pages_cpu = paged ? held.pages_cpu : 0;
        of.kv_pages_disk = paged ? held.pages_disk : 0;
        of.kv_bytes = held.resident_bytes;
    }
}

void sequence_counts::look_after(const llama_ubatch & ubatch, const llama_memory_i * memory, const kv_pager * pager,
                                 bool paged) {
    for (uint32_t s = 0; memory != nullptr && s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq = ubatch.seq_id_unq[s];
        counts.at((size_t) seq).kv_tokens = memory->seq_pos_max(seq) + 1;
    }
    const int64_t t_begin = ggml_time_us();
    if (t_begin >= t_next_us) {
        look(memory, pager, paged);
        const int64_t t_end = ggml_time_us();
        t_next_us = t_end + 1000 * (t_end - t_begin);
    }
}

std::vector<struct superllama_seq_stats> sequence_counts::all() const {
    std::vector<struct superllama_seq_stats> found;
    for (const counters & c : counts) {
        found.push_back(
            { c.prompt_tokens, c.generated_tokens, c.kv_tokens, c.kv_pages_cpu, c.kv_pages_disk, c.kv_bytes });
    }
    return found;
}

} // namespace superllama
