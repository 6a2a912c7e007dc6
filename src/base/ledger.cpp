#include "base/ledger.h"

namespace superllama {

const char * name_of(memory_tag tag) {
    static const char * const names[n_memory_tags] = {
        "resident", "rows",     "vocabulary", "pinned",   "ring",    "experts",      "staging",   "kv",
        "compute",  "cpu_work", "outputs",    "adapters", "uploads", "prompt_cache", "projector", "page_tables",
    };
    return names[(size_t) tag];
}

uint64_t ledger::used(memory_tag tag) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return n_used[(size_t) tag];
}

uint64_t ledger::granted() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return n_granted;
}

uint64_t ledger::lent() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return n_promised - n_granted;
}

void charge::set(uint64_t used, uint64_t granted, uint64_t promised) {
    const std::lock_guard<std::mutex> lock(of->mutex);
    of->n_used[(size_t) tag] += used - n_used; // unsigned arithmetic wraps: less is added as its complement
    of->n_granted += granted - n_granted;
    of->n_promised += promised - n_promised;
    n_used = used;
    n_granted = granted;
    n_promised = promised;
}

} // namespace superllama
