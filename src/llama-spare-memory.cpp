#include "llama-spare-memory.h"

#include "llama-address-space.h"

#include <algorithm>

static const size_t move_bytes_min = 256u << 10; // less is not worth a mapping of its own
static const size_t mappings_max = 32768;        // the kernel limits those of a process to some 65,000

llama_spare_memory::range llama_spare_memory::of(uint8_t * first, uint8_t * last) {
    uint8_t * huge_first = (uint8_t *) llama_round_up((size_t) first, llama_huge_page);
    uint8_t * huge_last = (uint8_t *) llama_round_down((size_t) last, llama_huge_page);
    if (huge_first < huge_last) {
        return { huge_first, huge_last, llama_huge_page };
    }
    const size_t bytes = first < last ? (size_t) (last - first) : 0;
    return { first, first + (bytes >= move_bytes_min ? bytes : 0), bytes };
}

void llama_spare_memory::add(const range & r) {
    for (uint8_t * at = r.first; at < r.last; at += r.piece) {
        pieces[r.piece].push_back(at);
        n_bytes += r.piece;
    }
}

void llama_spare_memory::take(const range & r) {
    std::vector<uint8_t *> & fitting = pieces[r.piece];
    for (uint8_t * at = r.first; at < r.last && !fitting.empty(); at += r.piece) {
        // the range's own memory may be spare still
        const auto mine = std::find(fitting.begin(), fitting.end(), at);
        if (mine != fitting.end()) {
            fitting.erase(mine);
        } else {
            if (mapped.count(at) == 0 && mapped.size() >= mappings_max) {
                continue;
            }
            if (!llama_address_move(at, fitting.back(), r.piece)) {
                can_move = false;
                return;
            }
            mapped.insert(at);
            fitting.pop_back();
        }
        n_bytes -= r.piece;
    }
}

void llama_spare_memory::trim(size_t bytes) {
    for (auto & entry : pieces) {
        while (n_bytes > bytes && !entry.second.empty()) {
            llama_address_discard(entry.second.back(), entry.first);
            entry.second.pop_back();
            n_bytes -= entry.first;
        }
    }
}
