#include "devices/expert_bank.h"

#include "weights/experts/view.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <cstring>

namespace superllama {

static const int32_t kept_part = 4; // of the slots, those that one large batch may fill: each is a copy by itself

// A tensor as another one is, with so many experts.
static ggml_tensor with_experts(const ggml_tensor * t, int64_t n) {
    ggml_tensor some = *t;
    some.ne[2] = n;
    some.nb[3] = (size_t) n * some.nb[2];
    some.buffer = nullptr;
    some.data = nullptr;
    some.extra = nullptr;
    some.flags = 0;
    return some;
}

expert_bank::expert_bank(int32_t layer, const std::vector<ggml_tensor *> & weights, ggml_context * maps) :
    layer(layer),
    weights(weights),
    ctx(ggml_init({ weights.size() * ggml_tensor_overhead(), nullptr, true })),
    slot_map(ggml_new_tensor_2d(maps, GGML_TYPE_I32, 1, n_expert())),
    asked((size_t) n_expert()) {
    for (const ggml_tensor * w : weights) {
        tensors.push_back(ggml_dup_tensor(ctx.get(), w));
        ggml_format_name(tensors.back(), "bank.%s", w->name);
    }
    ggml_format_name(slot_map, "slots-%d", layer);
    slot_map->flags |= flag_waits;
}

ggml_tensor * expert_bank::host_twin(const ggml_tensor * of_bank) const {
    const auto at = std::find(tensors.begin(), tensors.end(), of_bank);
    return at == tensors.end() ? nullptr : weights[(size_t) (at - tensors.begin())];
}

const int32_t * expert_bank::map_with(int32_t slot) {
    map_sent.assign(slots(), slots() + n_expert());
    std::replace(map_sent.begin(), map_sent.end(), -1, slot);
    return map_sent.data();
}

bool expert_bank::holds(int32_t expert) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return n > 0 && slots()[expert] >= 0;
}

// ------------------------------------------------------------------------------------------------- memory

// The bytes of a bank. One slot more than it has: kernels may read a little past the last expert.
size_t expert_bank::place(ggml_backend_buffer_type_t buft, int32_t n_slots) const {
    size_t bytes = 0;
    for (const ggml_tensor * w : weights) {
        const ggml_tensor t = with_experts(w, n_slots + 1);
        bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, &t), ggml_backend_buft_get_alignment(buft));
    }
    return bytes;
}

size_t expert_bank::bytes_of_expert() const {
    size_t bytes = 0;
    for (const ggml_tensor * w : weights) {
        bytes += w->nb[2];
    }
    return bytes;
}

expert_sizes expert_bank::sizes(ggml_backend_buffer_type_t buft, int32_t n_expert_used) const {
    expert_sizes s;
    for (const ggml_tensor * w : weights) {
        s.all += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, w), ggml_backend_buft_get_alignment(buft));
    }
    s.slot = bytes_of_expert();
    s.n_expert = n_expert();
    s.n_min = std::min(s.n_expert, n_expert_used);
    s.bank = place(buft, s.n_min) - (size_t) s.n_min * s.slot;
    s.bank += weights.size() * ggml_backend_buft_get_alignment(buft); // what another number of slots is rounded up to
    return s;
}

// What it holds, the last used first.
std::vector<expert_bank::held> expert_bank::held_now() const {
    std::vector<held> found;
    for (size_t s = 0; s < expert_of.size(); ++s) {
        if (expert_of[s] >= 0) {
            found.push_back({ expert_of[s], (int32_t) s, last_use[s] });
        }
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const held & x, const held & y) { return x.last_use > y.last_use; });
    return found;
}

// So many slots, with nothing in them. False: no memory there.
bool expert_bank::allocate(ggml_backend_buffer_type_t buft, int32_t n_slots) {
    n = 0;
    expert_of.assign((size_t) n_slots, -1);
    last_use.assign((size_t) n_slots, 0);
    forget_coming();
    memset(slot_map->data, 0xff, ggml_nbytes(slot_map));
    if (n_slots == 0) {
        return true;
    }
    buffer.reset(ggml_backend_buft_alloc_buffer(buft, place(buft, n_slots)));
    if (buffer == nullptr) {
        return false;
    }
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(buffer.get(), 0); // a slot may be read past its end before it is filled
    ggml_tallocr at = ggml_tallocr_new(buffer.get());
    for (size_t i = 0; i < tensors.size(); ++i) {
        ggml_tensor t = with_experts(weights[i], n_slots + 1);
        memcpy(t.name, tensors[i]->name, sizeof(t.name));
        ggml_tallocr_alloc(&at, &t);
        t.ne[2] = n_slots;
        t.nb[3] = (size_t) n_slots * t.nb[2];
        *tensors[i] = t;
    }
    n = n_slots;
    return true;
}

bool expert_bank::resize(ggml_backend_buffer_type_t buft, int32_t n_slots, uint64_t room,
                         const std::vector<ggml_tensor> & whole) {
    if (n_slots == n) {
        return true;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<held> stay;
    std::vector<ggml_tensor> from = whole;
    if (n > 0) {
        stay = held_now();
        from.clear();
        for (const ggml_tensor * t : tensors) {
            from.push_back(*t);
        }
    } else {
        for (int32_t e = 0; !whole.empty() && e < n_expert(); ++e) {
            stay.push_back({ e, e, 0 });
        }
    }
    const bool has_room = place(buft, n_slots) <= room;
    if (!whole.empty() && !has_room) {
        return false;
    }
    stay.resize(has_room ? std::min(stay.size(), (size_t) n_slots) : 0);

    ggml_backend_buffer_ptr old = std::move(buffer);
    if (stay.empty()) {
        old.reset();
    }
    if (!allocate(buft, n_slots)) {
        return false;
    }
    for (size_t k = 0; k < stay.size(); ++k) {
        for (size_t i = 0; i < tensors.size(); ++i) {
            const ggml_tensor src = experts_in(from[i], stay[k].slot, 1);
            ggml_tensor dst = experts_in(*tensors[i], (int64_t) k, 1);
            ggml_backend_tensor_copy(&src, &dst);
        }
        expert_of[k] = stay[k].expert;
        last_use[k] = stay[k].last_use;
        slots()[stay[k].expert] = (int32_t) k;
    }
    return true;
}

// -------------------------------------------------------------------------------------------- what it holds

std::set<int32_t> expert_bank::use(const std::vector<int32_t> & chosen, int64_t * n_there) {
    now++;
    forget_coming(); // of a batch that failed: their slots are free
    std::set<int32_t> missing;
    for (int32_t e : chosen) {
        const int32_t s = slots()[e];
        if (s >= 0) {
            *n_there += last_use[(size_t) s] < now ? 1 : 0; // tokens may choose the same
            last_use[(size_t) s] = now;
        } else {
            missing.insert(e);
        }
    }
    return missing;
}

// As many are sent as take the least time beside the host's work on the others; and no fewer than the link's share of
// all so far, or with a slow one nothing would ever come.
static size_t n_sent_of(size_t n_missing, double link_share, double owed) {
    size_t best = 0;
    double least = (double) n_missing;
    for (size_t n = 1; n <= n_missing; ++n) {
        const double time = std::max((double) n / link_share, (double) (n_missing - n));
        best = time <= least ? n : best;
        least = std::min(least, time);
    }
    return std::max(best, std::min(n_missing, (size_t) owed));
}

std::vector<int32_t> expert_bank::not_sent(const std::set<int32_t> & missing, double link_share) {
    owed += (double) missing.size() * link_share / (1 + link_share);
    std::vector<int32_t> by_age(missing.begin(), missing.end());
    std::stable_sort(by_age.begin(), by_age.end(),
                     [this](int32_t x, int32_t y) { return asked[(size_t) x] < asked[(size_t) y]; });
    const size_t n_sent = n_sent_of(by_age.size(), link_share, owed);
    owed = std::max(0.0, owed - (double) n_sent);
    by_age.resize(by_age.size() - n_sent);
    return by_age;
}

void expert_bank::note_asked(const std::vector<int32_t> & chosen) {
    for (int32_t e : chosen) {
        asked[(size_t) e] = now;
    }
}

// Those that are not used now, the one that was used longest ago first; before them, free ones.
std::vector<int32_t> expert_bank::slots_by_age() const {
    std::vector<int32_t> slots;
    for (int32_t s = 0; s < n; ++s) {
        if (last_use[(size_t) s] < now) {
            slots.push_back(s);
        }
    }
    std::stable_sort(slots.begin(), slots.end(), [this](int32_t x, int32_t y) {
        const auto age = [this](int32_t s) { return expert_of[(size_t) s] < 0 ? -1 : last_use[(size_t) s]; };
        return age(x) < age(y);
    });
    return slots;
}

std::vector<int32_t> expert_bank::slots_for(size_t n_missing, std::vector<int32_t> * leaving) const {
    std::vector<int32_t> found = n_missing == 0 ? std::vector<int32_t>() : slots_by_age();
    found.resize(std::min(n_missing, found.size()));
    for (int32_t s : found) {
        if (expert_of[(size_t) s] >= 0) {
            leaving->push_back(expert_of[(size_t) s]);
        }
    }
    return found;
}

void expert_bank::own(int32_t slot, int32_t expert) {
    const std::lock_guard<std::mutex> lock(mutex);
    int32_t & owner = expert_of[(size_t) slot];
    if (owner >= 0) {
        slots()[owner] = -1;
    }
    owner = expert;
    if (expert >= 0) {
        slots()[expert] = slot;
        last_use[(size_t) slot] = now;
    }
}

void expert_bank::own_guessed(int32_t slot, int32_t expert) {
    own(slot, expert);
    last_use[(size_t) slot] = 0;
}

void expert_bank::forget_coming() {
    coming.clear();
    came.clear();
}

// -------------------------------------------------------------------------------------------- large batches

void expert_bank::copy_to(ggml_backend_t backend, size_t i, int32_t expert, ggml_tensor * to) const {
    const ggml_tensor src = experts_in(*tensors[i], slots()[expert], 1);
    ggml_tensor dst = experts_in(*to, expert, 1);
    ggml_backend_tensor_copy_async(backend, backend, &src, &dst);
}

void expert_bank::plan_to_keep(const std::vector<int32_t> & most_chosen, bool may_leave) {
    now++;
    forget_coming();
    std::vector<int32_t> missing;
    for (int32_t e : most_chosen) {
        const int32_t slot = slots()[e];
        if (slot >= 0) {
            last_use[(size_t) slot] = now; // the batch's other tensors come from there, too
        } else {
            missing.push_back(e);
        }
    }
    const std::vector<int32_t> free = slots_by_age();
    const auto n_max = (size_t) std::max(1, n / kept_part);
    for (size_t i = 0; i < std::min({ missing.size(), free.size(), n_max }); ++i) {
        const bool was_used = expert_of[(size_t) free[i]] >= 0 && last_use[(size_t) free[i]] > 0;
        if (was_used && !may_leave) {
            break;
        }
        own(free[i], -1);
        coming.emplace_back(missing[i], free[i]);
    }
}

void expert_bank::keep(size_t i, const ggml_tensor & from, const std::vector<int32_t> & most_chosen, bool may_leave) {
    if (came.empty() || came.count(i) > 0) {
        plan_to_keep(most_chosen, may_leave);
    }
    came.insert(i);
    for (const auto & [expert, slot] : coming) {
        const ggml_tensor src = experts_in(from, expert, 1);
        ggml_tensor dst = experts_in(*tensors[i], slot, 1);
        ggml_backend_tensor_copy(&src, &dst);
    }
    if (came.size() == tensors.size()) {
        for (const auto & [expert, slot] : coming) {
            own(slot, expert);
        }
        forget_coming();
    }
}

} // namespace superllama
