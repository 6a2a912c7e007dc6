#include "devices/expert_banks.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace superllama {

// More of them choose most of the experts, and would leave nothing of what is there.
static const int64_t tokens_max = 32;
static const int32_t kept_part = 4; // of a bank's slots, those that one large batch may fill: each is a copy by itself

struct expert_banks::bank {
    int32_t layer = -1;
    std::vector<ggml_tensor *> weights; // of the host
    std::vector<ggml_tensor *> tensors; // the same, as many as there are slots
    ggml_context_ptr ctx;
    ggml_tensor * map = nullptr; // the slot of each expert, -1: it has none
    std::vector<int32_t> sent;   // the same as a device sees it, where the host computes some
    ggml_backend_buffer_ptr buffer;
    std::atomic<int32_t> n_slots{ 0 };
    std::vector<int32_t> expert_of; // by slot, -1: it is free
    std::vector<int64_t> last_use;  // by slot
    std::vector<int64_t> asked;     // by expert: when a ubatch chose it last
    int64_t now = 0;
    std::vector<std::pair<int32_t, int32_t>> coming; // experts of a large batch and their slots
    std::set<size_t> came;                           // the tensors of which they are there
    double to_send = 0; // of the missing ones so far, the part of one that the link still has to take

    int32_t n_expert() const { return (int32_t) weights.front()->ne[2]; }
    int32_t * slots() const { return (int32_t *) map->data; }
    void forget_coming() {
        coming.clear();
        came.clear();
    }
};

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

// One expert's share of a tensor that has its place.
static ggml_tensor expert_in(const ggml_tensor & t, int64_t i) {
    ggml_tensor one = t;
    one.ne[2] = 1;
    one.nb[3] = one.nb[2];
    one.data = (uint8_t *) t.data + (size_t) i * t.nb[2];
    return one;
}

expert_banks::expert_banks(const std::vector<layer_weights> & layers, int32_t n_expert_used,
                           const std::vector<device> & devices) :
    n_expert_used(n_expert_used),
    ctx_maps(ggml_init({ (layers.size() + 1) * ggml_tensor_overhead(), nullptr, true })) {
    for (const device & d : devices) {
        bytes_of[d.dev] = {};
        sent_share[d.dev] = d.sent_share;
    }
    for (const layer_weights & l : layers) {
        banks.resize(std::max(banks.size(), (size_t) l.layer + 1));
        banks[(size_t) l.layer] = std::make_unique<bank>();
        bank & b = *banks[(size_t) l.layer];
        b.layer = l.layer;
        b.weights = l.weights;
        routers.add(l.layer, l.router);
        b.ctx.reset(ggml_init({ l.weights.size() * ggml_tensor_overhead(), nullptr, true }));
        for (size_t i = 0; i < l.weights.size(); ++i) {
            b.tensors.push_back(ggml_dup_tensor(b.ctx.get(), l.weights[i]));
            ggml_format_name(b.tensors.back(), "bank.%s", l.weights[i]->name);
            bank_tensors[l.weights[i]] = { l.layer, i };
        }
        b.map = ggml_new_tensor_2d(ctx_maps.get(), GGML_TYPE_I32, 1, b.n_expert());
        ggml_format_name(b.map, "slots-%d", l.layer);
        b.asked.resize((size_t) b.n_expert());
        layer_of_map[b.map] = l.layer;
    }
    maps_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_maps.get(), ggml_backend_cpu_buffer_type()));
    if (maps_buffer == nullptr) {
        throw std::runtime_error("no memory for the maps of experts on devices");
    }
    ggml_backend_buffer_clear(maps_buffer.get(), 0xff);
    // a weight of the host begins a new part of the graph, before which it is copied
    ggml_backend_buffer_set_usage(maps_buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
}

expert_banks::~expert_banks() = default;

const std::vector<ggml_tensor *> & expert_banks::weights(int32_t il) const {
    return banks[(size_t) il]->weights;
}

// ------------------------------------------------------------------------------------------------- memory

// The bytes of a bank. One slot more than it has: kernels may read a little past the last expert.
size_t expert_banks::place(const bank & b, ggml_backend_buffer_type_t buft, int32_t n_slots) {
    size_t bytes = 0;
    for (const ggml_tensor * w : b.weights) {
        const ggml_tensor t = with_experts(w, n_slots + 1);
        bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, &t), ggml_backend_buft_get_alignment(buft));
    }
    return bytes;
}

expert_sizes expert_banks::sizes(int32_t il, ggml_backend_buffer_type_t buft) const {
    expert_sizes s;
    if (!has(il)) {
        return s;
    }
    const bank & b = *banks[(size_t) il];
    for (const ggml_tensor * w : b.weights) {
        s.all += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, w), ggml_backend_buft_get_alignment(buft));
        s.slot += w->nb[2];
    }
    s.n_expert = b.n_expert();
    s.n_min = std::min(s.n_expert, n_expert_used);
    s.bank = place(b, buft, s.n_min) - (size_t) s.n_min * s.slot;
    s.bank += b.weights.size() * ggml_backend_buft_get_alignment(buft); // what another number of slots is rounded up to
    return s;
}

int32_t expert_banks::n_slots(int32_t il) const {
    return has(il) ? (int32_t) banks[(size_t) il]->n_slots : 0;
}

size_t expert_banks::bytes(int32_t il) const {
    return n_slots(il) > 0 ? ggml_backend_buffer_get_size(banks[(size_t) il]->buffer.get()) : 0;
}

bool expert_banks::any() const {
    return std::any_of(banks.begin(), banks.end(), [](const auto & b) { return b != nullptr && b->n_slots > 0; });
}

// What it holds, the last used first.
std::vector<expert_banks::held> expert_banks::held_by(const bank & b) {
    std::vector<held> found;
    for (size_t s = 0; s < b.expert_of.size(); ++s) {
        if (b.expert_of[s] >= 0) {
            found.push_back({ b.expert_of[s], (int32_t) s, b.last_use[s] });
        }
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const held & x, const held & y) { return x.last_use > y.last_use; });
    return found;
}

// So many slots, with nothing in them. False: no memory there.
bool expert_banks::allocate(bank & b, ggml_backend_buffer_type_t buft, int32_t n_slots) {
    b.n_slots = 0;
    b.expert_of.assign((size_t) n_slots, -1);
    b.last_use.assign((size_t) n_slots, 0);
    b.forget_coming();
    memset(b.map->data, 0xff, ggml_nbytes(b.map));
    if (n_slots == 0) {
        return true;
    }
    b.buffer.reset(ggml_backend_buft_alloc_buffer(buft, place(b, buft, n_slots)));
    if (b.buffer == nullptr) {
        return false;
    }
    ggml_backend_buffer_set_usage(b.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(b.buffer.get(), 0); // a slot may be read past its end before it is filled
    ggml_tallocr at = ggml_tallocr_new(b.buffer.get());
    for (size_t i = 0; i < b.tensors.size(); ++i) {
        ggml_tensor t = with_experts(b.weights[i], n_slots + 1);
        memcpy(t.name, b.tensors[i]->name, sizeof(t.name));
        ggml_tallocr_alloc(&at, &t);
        t.ne[2] = n_slots;
        t.nb[3] = (size_t) n_slots * t.nb[2];
        *b.tensors[i] = t;
    }
    b.n_slots = n_slots;
    return true;
}

bool expert_banks::resize(int32_t il, ggml_backend_buffer_type_t buft, int32_t n_slots, uint64_t room,
                          const std::vector<ggml_tensor> & whole) {
    if (n_slots == this->n_slots(il)) {
        return true;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    bank & b = *banks[(size_t) il];
    std::vector<held> stay;
    std::vector<ggml_tensor> from = whole;
    if (b.n_slots > 0) {
        stay = held_by(b);
        from.clear();
        for (const ggml_tensor * t : b.tensors) {
            from.push_back(*t);
        }
    } else {
        for (int32_t e = 0; !whole.empty() && e < b.n_expert(); ++e) {
            stay.push_back({ e, e, 0 });
        }
    }
    const bool has_room = place(b, buft, n_slots) <= room;
    stay.resize(has_room ? std::min(stay.size(), (size_t) n_slots) : 0);

    ggml_backend_buffer_ptr old = std::move(b.buffer);
    if (stay.empty()) {
        old.reset();
    }
    if (!allocate(b, buft, n_slots)) {
        return false;
    }
    for (size_t k = 0; k < stay.size(); ++k) {
        for (size_t i = 0; i < b.tensors.size(); ++i) {
            const ggml_tensor src = expert_in(from[i], stay[k].slot);
            ggml_tensor dst = expert_in(*b.tensors[i], (int64_t) k);
            ggml_backend_tensor_copy(&src, &dst);
        }
        b.expert_of[k] = stay[k].expert;
        b.last_use[k] = stay[k].last_use;
        b.slots()[stay[k].expert] = (int32_t) k;
    }
    return true;
}

// ------------------------------------------------------------------------------------------------- graphs

ggml_tensor * expert_banks::slot_map(int32_t il, int64_t n_tokens, int64_t n_chosen) const {
    if (n_slots(il) == 0 || n_tokens < 1 || n_tokens > tokens_max) {
        return nullptr;
    }
    const bank & b = *banks[(size_t) il];
    return std::min<int64_t>(n_tokens * n_chosen, b.n_expert()) <= b.n_slots ? b.map : nullptr;
}

ggml_tensor * expert_banks::bank_of(const ggml_tensor * weights) const {
    const auto found = bank_tensors.find(weights);
    if (found == bank_tensors.end() || n_slots(found->second.first) == 0) {
        return nullptr;
    }
    return banks[(size_t) found->second.first]->tensors[found->second.second];
}

// Of the chosen, those without a slot. `n_there`: those that have one.
std::set<int32_t> expert_banks::missing_of(bank & b, const std::vector<int32_t> & chosen, int64_t * n_there) {
    b.now++;
    std::set<int32_t> missing;
    for (int32_t e : chosen) {
        const int32_t s = b.slots()[e];
        if (s >= 0) {
            *n_there += b.last_use[(size_t) s] < b.now ? 1 : 0; // tokens may choose the same
            b.last_use[(size_t) s] = b.now;
        } else {
            missing.insert(e);
        }
    }
    return missing;
}

// The link takes its share of them; those that were chosen before that most recently, for they will be again.
void expert_banks::leave_to_host(bank & b, double sent_share, std::set<int32_t> * missing, expert_request * r) const {
    b.to_send += sent_share * (double) missing->size();
    std::vector<int32_t> by_age(missing->begin(), missing->end());
    std::stable_sort(by_age.begin(), by_age.end(),
                     [&b](int32_t x, int32_t y) { return b.asked[(size_t) x] < b.asked[(size_t) y]; });
    const auto n_sent = std::min(by_age.size(), (size_t) b.to_send);
    b.to_send -= (double) n_sent;
    by_age.resize(by_age.size() - n_sent);
    size_t n_pairs = 0;
    for (int32_t e : by_age) {
        n_pairs += (size_t) std::count(r->chosen.begin(), r->chosen.end(), e);
        if (n_pairs <= by_host.pairs_max()) {
            r->staying.push_back(e);
            missing->erase(e);
        }
    }
}

// Those that are not used now, the one that was used longest ago first; before them, free ones.
std::vector<int32_t> expert_banks::slots_by_age(const bank & b) {
    std::vector<int32_t> slots;
    for (int32_t s = 0; s < b.n_slots; ++s) {
        if (b.last_use[(size_t) s] < b.now) {
            slots.push_back(s);
        }
    }
    std::stable_sort(slots.begin(), slots.end(), [&b](int32_t x, int32_t y) {
        const auto age = [&b](int32_t s) { return b.expert_of[(size_t) s] < 0 ? -1 : b.last_use[(size_t) s]; };
        return age(x) < age(y);
    });
    return slots;
}

// Which leave for the missing. The slots that these get: too few where there are no more.
std::vector<int32_t> expert_banks::plan(bank & b, expert_request * r) {
    std::vector<int32_t> slots = r->missing.empty() ? std::vector<int32_t>() : slots_by_age(b);
    slots.resize(std::min(r->missing.size(), slots.size()));
    for (int32_t s : slots) {
        if (b.expert_of[(size_t) s] >= 0) {
            r->leaving.push_back(b.expert_of[(size_t) s]);
        }
    }
    return slots;
}

void expert_banks::own(bank & b, int32_t slot, int32_t expert) {
    const std::lock_guard<std::mutex> lock(mutex);
    int32_t & owner = b.expert_of[(size_t) slot];
    if (owner >= 0) {
        b.slots()[owner] = -1;
    }
    owner = expert;
    if (expert >= 0) {
        b.slots()[expert] = slot;
        b.last_use[(size_t) slot] = b.now;
    }
}

// Of the next layer that has a bank, what it will probably choose and its bank lacks.
std::vector<int32_t> expert_banks::guess(const bank & b, const ggml_tensor * choice) {
    std::vector<int32_t> lacking;
    if (const bank * next = next_of(b)) {
        for (int32_t e : routers.guess(b.layer, choice, next->layer, n_expert_used)) {
            if (next->slots()[e] < 0) {
                lacking.push_back(e);
            }
        }
    }
    return lacking;
}

expert_banks::bank * expert_banks::next_of(const bank & b) const {
    for (size_t il = (size_t) b.layer + 1; il < banks.size(); ++il) {
        if (banks[il] != nullptr && banks[il]->n_slots > 0) {
            return banks[il].get();
        }
    }
    return nullptr;
}

// Of a tensor of a bank, that of the host.
ggml_tensor * expert_banks::host_twin(const bank & b, const ggml_tensor * of_bank) {
    const auto at = std::find(b.tensors.begin(), b.tensors.end(), of_bank);
    return at == b.tensors.end() ? nullptr : b.weights[(size_t) (at - b.tensors.begin())];
}

// The node that looks slots up in what a map is copied to; null: it is not what upstream's graphs look like.
static const ggml_tensor * lookup_in(ggml_cgraph * part, const ggml_tensor * map) {
    const ggml_tensor * lookup = nullptr;
    for (int i = 0; i < ggml_graph_n_nodes(part) && lookup == nullptr; ++i) {
        const ggml_tensor * node = ggml_graph_node(part, i);
        lookup = node->op == GGML_OP_GET_ROWS && node->src[0] == map ? node : nullptr;
    }
    for (int i = 0; i < ggml_graph_n_nodes(part) && lookup != nullptr; ++i) {
        const ggml_tensor * node = ggml_graph_node(part, i);
        if (node == lookup->src[1] || node == lookup->src[1]->view_src) {
            return nullptr; // the choice is not known before the part begins
        }
    }
    return lookup;
}

bool expert_banks::shares() const {
    return host_can && std::any_of(sent_share.begin(), sent_share.end(), [](const auto & d) { return d.second < 1; });
}

void expert_banks::after_node(const ggml_tensor * node) {
    if (stops_after(node)) {
        by_host.write(by_host_to);
    }
}

expert_banks::result expert_banks::copy(ggml_backend_t backend, ggml_backend_t host, const ggml_tensor * src,
                                        ggml_tensor * dst, ggml_cgraph * part,
                                        const std::function<const ggml_tensor *(const ggml_tensor *)> & original_of,
                                        const serve_request & serve, std::string * error) {
    const auto found = layer_of_map.find(src);
    if (found == layer_of_map.end()) {
        return result::not_ours;
    }
    bank & b = *banks[(size_t) found->second];
    const auto fail = [&](const char * why) {
        *error = "layer " + std::to_string(b.layer) + " on " + ggml_backend_name(backend) + ": " + why;
        return result::failed;
    };
    const ggml_tensor * lookup = lookup_in(part, dst);
    const ggml_tensor * choice = lookup != nullptr ? original_of(lookup->src[1]) : nullptr;
    if (choice == nullptr || !ggml_is_contiguous(choice)) {
        return fail("its graph does not choose experts before it computes with them");
    }
    expert_request r;
    r.weights = b.weights.front();
    r.chosen.resize((size_t) ggml_nelements(choice));
    ggml_backend_synchronize(backend); // which may be choosing still, or computing with what is to leave
    ggml_backend_tensor_get(choice, r.chosen.data(), 0, ggml_nbytes(choice));
    traffic & bytes = bytes_of.at(ggml_backend_get_device(backend));
    const auto count = [this](int64_t & of, size_t n) {
        const std::lock_guard<std::mutex> lock(mutex);
        of += (int64_t) n;
    };
    const auto exists = [&b](int32_t e) { return e >= 0 && e < b.n_expert(); };
    if (!std::all_of(r.chosen.begin(), r.chosen.end(), exists)) { // of a device that is gone, say
        return fail("the router asks for an expert that does not exist");
    }
    int64_t n_there = 0;
    std::set<int32_t> missing = missing_of(b, r.chosen, &n_there);
    b.forget_coming(); // of a batch that failed: their slots are free
    n_hits += n_there;
    n_misses += (int64_t) missing.size();
    by_host.end();
    const double share = sent_share.at(ggml_backend_get_device(backend));
    if (!missing.empty() && share < 1) {
        const auto on_host = [&b](const ggml_tensor * t) { return host_twin(b, t); };
        host_can = by_host.begin(part, lookup, on_host, b.weights.size());
        if (host_can) {
            by_host_to = backend;
            leave_to_host(b, share, &missing, &r);
        }
    }
    for (int32_t e : r.chosen) {
        b.asked[(size_t) e] = b.now;
    }
    r.missing.assign(missing.begin(), missing.end());
    std::vector<int32_t> slots = plan(b, &r);
    if (slots.size() < r.missing.size()) {
        return fail("a ubatch wants more experts than there are slots");
    }
    n_stayed += (int64_t) r.staying.size();
    r.send = [&](int32_t expert, const expert_request::matrix_of & matrix) {
        const int32_t slot = slots.back();
        slots.pop_back();
        own(b, slot, -1); // until all of the next one is there
        for (size_t i = 0; i < b.tensors.size(); ++i) {
            const size_t share = b.tensors[i]->nb[2];
            ggml_backend_tensor_set_async(backend, b.tensors[i], matrix(b.weights[i]), (size_t) slot * share, share);
            count(bytes.up, share);
        }
        own(b, slot, expert);
    };
    r.fetch = [&](int32_t expert, const ggml_tensor * weights, uint8_t * to) {
        const ggml_tensor * t = bank_of(weights);
        ggml_backend_tensor_get(t, to, (size_t) b.slots()[expert] * t->nb[2], t->nb[2]);
        count(bytes.down, t->nb[2]);
    };
    r.compute = [&](std::string * why) {
        return by_host.compute(host, r.chosen, std::set<int32_t>(r.staying.begin(), r.staying.end()), why);
    };
    r.finish = [backend] { ggml_backend_synchronize(backend); };
    const bank * next = next_of(b);
    r.next_weights = next != nullptr ? next->weights.front() : nullptr;
    r.guess = [&] { return guess(b, choice); };
    if (!serve(r, error)) {
        by_host.end();
        return result::failed;
    }
    const int32_t * slots_seen = b.slots();
    if (!r.staying.empty()) { // the device computes something in their place that nobody reads: best with what it has
        const auto is_there = [&b](int32_t e) { return b.slots()[e] >= 0; };
        const auto any = std::find_if(r.chosen.begin(), r.chosen.end(), is_there);
        b.sent.assign(slots_seen, slots_seen + b.n_expert());
        std::replace(b.sent.begin(), b.sent.end(), -1, any != r.chosen.end() ? b.slots()[*any] : 0);
        slots_seen = b.sent.data();
    }
    ggml_backend_tensor_set_async(backend, dst, slots_seen, 0, ggml_nbytes(src));
    return result::copied;
}

expert_banks::traffic expert_banks::traffic_of(ggml_backend_dev_t dev) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return bytes_of.at(dev);
}

bool expert_banks::holds(const ggml_tensor * weights, int32_t expert) const {
    const auto found = bank_tensors.find(weights);
    if (found == bank_tensors.end()) {
        return false;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    const bank & b = *banks[(size_t) found->second.first];
    return b.n_slots > 0 && b.slots()[expert] >= 0;
}

void expert_banks::copy_to(const ggml_tensor * weights, int32_t expert, ggml_tensor * to) const {
    const bank & b = *banks[(size_t) bank_tensors.at(weights).first];
    const ggml_tensor src = expert_in(*bank_of(weights), b.slots()[expert]);
    ggml_tensor dst = expert_in(*to, expert);
    ggml_backend_tensor_copy(&src, &dst);
}

void expert_banks::plan_to_keep(bank & b, const std::vector<int32_t> & most_chosen, bool may_leave) {
    b.now++;
    b.forget_coming();
    std::vector<int32_t> missing;
    for (int32_t e : most_chosen) {
        const int32_t slot = b.slots()[e];
        if (slot >= 0) {
            b.last_use[(size_t) slot] = b.now; // the batch's other tensors come from there, too
        } else {
            missing.push_back(e);
        }
    }
    const std::vector<int32_t> slots = slots_by_age(b);
    const auto n_max = (size_t) std::max(1, b.n_slots / kept_part);
    for (size_t i = 0; i < std::min({ missing.size(), slots.size(), n_max }); ++i) {
        const bool was_used = b.expert_of[(size_t) slots[i]] >= 0 && b.last_use[(size_t) slots[i]] > 0;
        if (was_used && !may_leave) {
            break;
        }
        own(b, slots[i], -1);
        b.coming.emplace_back(missing[i], slots[i]);
    }
}

void expert_banks::keep(const ggml_tensor * weights, const ggml_tensor * from, const std::vector<int32_t> & most_chosen,
                        bool may_leave) {
    const ggml_tensor * to = bank_of(weights);
    if (to == nullptr || ggml_backend_buffer_get_type(from->buffer) != ggml_backend_buffer_get_type(to->buffer)) {
        return;
    }
    const auto & [il, i] = bank_tensors.at(weights);
    bank & b = *banks[(size_t) il];
    if (b.came.empty() || b.came.count(i) > 0) {
        plan_to_keep(b, most_chosen, may_leave);
    }
    b.came.insert(i);
    for (const auto & [expert, slot] : b.coming) {
        const ggml_tensor src = expert_in(*from, expert);
        ggml_tensor dst = expert_in(*to, slot);
        ggml_backend_tensor_copy(&src, &dst);
    }
    if (b.came.size() == b.tensors.size()) {
        for (const auto & [expert, slot] : b.coming) {
            own(b, slot, expert);
        }
        b.forget_coming();
    }
}

} // namespace superllama
