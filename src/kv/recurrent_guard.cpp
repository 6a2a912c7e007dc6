#include "kv/recurrent_guard.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"

#include "ggml-backend.h"

#include <algorithm>
#include <utility>

namespace superllama {

std::unique_ptr<recurrent_guard> recurrent_guard::create(llama_memory_i * memory, std::function<void()> finish,
                                                         bool undoes) {
    auto * part = dynamic_cast<llama_memory_recurrent *>(memory);
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        part = hybrid->get_mem_recr();
    } else if (auto * iswa = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        part = iswa->get_mem_recr();
    }
    return std::unique_ptr<recurrent_guard>(part != nullptr ? new recurrent_guard(*part, std::move(finish), undoes)
                                                            : nullptr);
}

// What a graph writes: the rows of the ubatch's cells and of their snapshots, in every layer. Cells of other sequences
// may lie between them and move.
template <typename F>
void recurrent_guard::for_each_written(const F & visit) const {
    for (const auto * list : { &memory.r_l, &memory.s_l, &memory.p_l }) {
        for (ggml_tensor * t : *list) {
            for (size_t group = 0; t != nullptr && group <= memory.n_rs_seq; ++group) {
                visit(t, (group * memory.size + memory.head) * t->nb[1], memory.n * t->nb[1]);
            }
        }
    }
}

// A lost state is filled with 0xff, which is no number: so copies of it are known to be lost too.
bool recurrent_guard::is_lost(llama_seq_id seq) const {
    const int32_t tail = memory.cells[(size_t) seq].tail;
    if (tail < 0) {
        return false; // it is empty
    }
    const int32_t src = memory.cells[(size_t) tail].src;
    const size_t row = (size_t) memory.rs_idx[(size_t) seq] * memory.size + (size_t) (src >= 0 ? src : tail);
    for (const auto * list : { &memory.s_l, &memory.r_l }) {
        for (const ggml_tensor * t : *list) {
            if (t != nullptr && t->nb[1] > 0) {
                uint32_t first = 0;
                ggml_backend_tensor_get(t, &first, row * t->nb[1], std::min(sizeof(first), t->nb[1]));
                return first == UINT32_MAX;
            }
        }
    }
    return false;
}

bool recurrent_guard::before_ubatch(const llama_ubatch & ubatch, std::string * error) {
    if (!undoes) {
        return true;
    }
    if (!lost.empty()) {
        finish();
    }
    for (uint32_t s = 0; !lost.empty() && s < ubatch.n_seqs_unq; ++s) {
        if (is_lost(ubatch.seq_id_unq[s])) {
            *error = format("sequence %d is lost: its recurrent state was changing when a graph failed (%s); remove "
                            "the sequence and decode its tokens again",
                            ubatch.seq_id_unq[s], lost.c_str());
            return false;
        }
    }
    cells = memory.cells;
    rs_idx = memory.rs_idx;
    head = memory.head;
    used = memory.used;
    n = memory.n;
    rs_z = memory.rs_z;
    n_seqs = ubatch.n_seqs;
    runs = kept = false;
    return true;
}

// New sequences begin with a state that upstream multiplies by zero, which leaves what is no number as it is.
void recurrent_guard::clear_first() {
    if (memory.rs_z < 0) {
        return;
    }
    finish();
    std::vector<uint8_t> zeros;
    for (const auto * list : { &memory.r_l, &memory.s_l, &memory.p_l }) {
        for (ggml_tensor * t : *list) {
            if (t != nullptr) {
                zeros.resize(std::max(zeros.size(), t->nb[1]));
                ggml_backend_tensor_set(t, zeros.data(), (size_t) memory.rs_z * t->nb[1], t->nb[1]);
            }
        }
    }
}

void recurrent_guard::before_graph(bool keep) {
    if (clears || !lost.empty()) {
        clear_first();
    }
    if (!undoes) {
        return;
    }
    const bool moves = memory.n > n_seqs; // cells of other sequences
    states.clear();
    if (keep || moves) {
        finish();
        for_each_written([&](const ggml_tensor * t, size_t offset, size_t size) {
            states.resize(states.size() + size);
            ggml_backend_tensor_get(t, states.data() + states.size() - size, offset, size);
        });
        kept = true;
    }
    runs = true; // where there was no memory for the copy, nothing runs, and nothing is lost
}

void recurrent_guard::undo(const std::string & reason) {
    if (!undoes) {
        return;
    }
    finish();
    size_t at = 0;
    for_each_written([&](ggml_tensor * t, size_t offset, size_t size) {
        if (kept) {
            ggml_backend_tensor_set(t, states.data() + at, offset, size);
            at += size;
        } else if (runs) {
            ggml_backend_tensor_set(t, std::vector<uint8_t>(size, 0xff).data(), offset, size);
        }
    });
    if (runs && !kept) {
        lost = reason;
    }
    memory.cells = cells;
    memory.rs_idx = rs_idx;
    memory.head = head;
    memory.used = used;
    memory.n = n;
    memory.rs_z = rs_z;
}

} // namespace superllama
