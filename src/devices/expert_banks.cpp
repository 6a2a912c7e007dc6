#include "devices/expert_banks.h"

#include <algorithm>
#include <stdexcept>

namespace superllama {

// More of them choose most of the experts, and would leave nothing of what is there.
static const int64_t tokens_max = 32;

expert_banks::expert_banks(const std::vector<layer_weights> & layers, int32_t n_expert_used,
                           const std::vector<device> & all_devices) :
    n_expert_used(n_expert_used),
    ctx_maps(ggml_init({ (layers.size() + 1) * ggml_tensor_overhead(), nullptr, true })) {
    for (const device & d : all_devices) {
        devices[d.dev] = { d, {}, d.sends_ahead ? std::make_unique<guessed_sends>(d.dev) : nullptr };
    }
    for (const layer_weights & l : layers) {
        banks.resize(std::max(banks.size(), (size_t) l.layer + 1));
        banks[(size_t) l.layer] = std::make_unique<expert_bank>(l.layer, l.weights, ctx_maps.get());
        routers.add(l.layer, l.router);
        for (size_t i = 0; i < l.weights.size(); ++i) {
            bank_tensors[l.weights[i]] = { l.layer, i };
        }
        layer_of_map[banks[(size_t) l.layer]->map()] = l.layer;
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

expert_sizes expert_banks::sizes(int32_t il, ggml_backend_buffer_type_t buft) const {
    return has(il) ? banks[(size_t) il]->sizes(buft, n_expert_used) : expert_sizes();
}

int32_t expert_banks::n_slots(int32_t il) const {
    return has(il) ? banks[(size_t) il]->n_slots() : 0;
}

size_t expert_banks::bytes(int32_t il) const {
    return has(il) ? banks[(size_t) il]->bytes() : 0;
}

bool expert_banks::any() const {
    return std::any_of(banks.begin(), banks.end(), [](const auto & b) { return b != nullptr && b->n_slots() > 0; });
}

bool expert_banks::resize(int32_t il, ggml_backend_buffer_type_t buft, int32_t n_slots, uint64_t room,
                          const std::vector<ggml_tensor> & whole) {
    return !has(il) || banks[(size_t) il]->resize(buft, n_slots, room, whole);
}

// ------------------------------------------------------------------------------------------------- graphs

ggml_tensor * expert_banks::slot_map(int32_t il, int64_t n_tokens, int64_t n_chosen) const {
    if (n_slots(il) == 0 || n_tokens < 1 || n_tokens > tokens_max) {
        return nullptr;
    }
    const expert_bank & b = *banks[(size_t) il];
    return std::min<int64_t>(n_tokens * n_chosen, b.n_expert()) <= b.n_slots() ? b.map() : nullptr;
}

ggml_tensor * expert_banks::bank_of(const ggml_tensor * weights) const {
    const auto found = bank_tensors.find(weights);
    if (found == bank_tensors.end() || n_slots(found->second.first) == 0) {
        return nullptr;
    }
    return banks[(size_t) found->second.first]->tensor(found->second.second);
}

expert_bank * expert_banks::next_of(const expert_bank & b) const {
    for (size_t il = (size_t) b.layer + 1; il < banks.size(); ++il) {
        if (banks[il] != nullptr && banks[il]->n_slots() > 0) {
            return banks[il].get();
        }
    }
    return nullptr;
}

// What the next layer will probably choose and its bank lacks.
std::vector<int32_t> expert_banks::lacking(const expert_bank & next) {
    std::vector<int32_t> found;
    for (int32_t e : routers.guess(next.layer, n_expert_used)) {
        if (next.slot_of(e) < 0) {
            found.push_back(e);
        }
    }
    return found;
}

// Until the device has chosen; meanwhile what it will probably choose is on its way.
void expert_banks::wait_for_choice(ggml_backend_t backend, expert_bank & b, const host_side & host, device_state & d) {
    const int64_t t_begin = ggml_time_us();
    const std::vector<int32_t> guessed = d.guesses != nullptr ? lacking(b) : std::vector<int32_t>();
    if (guessed.empty()) {
        ggml_backend_synchronize(backend); // which may compute with what is to leave, too
        return;
    }
    d.guesses->send(backend, b, guessed, t_begin, host.serve_guess);
    n_guesses += (int64_t) d.guesses->sent().size();
    add_bytes(d.bytes.up, d.guesses->sent().size() * b.bytes_of_expert());
}

void expert_banks::add_bytes(int64_t & of, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    of += (int64_t) bytes;
}

void expert_banks::end_graph() {
    by_host.end();
    routers.forget();
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
    const auto some = [](const auto & entry) { return entry.second.is.shares; };
    return host_can && std::any_of(devices.begin(), devices.end(), some);
}

void expert_banks::after_node(const ggml_tensor * node) {
    if (stops_after(node)) {
        by_host.write(by_host_to);
    }
}

// Of the missing, those that the host is to compute: what the link does not take, as far as there is memory for it.
void expert_banks::leave_to_host(expert_bank & b, double link, std::set<int32_t> * missing, expert_request * r) {
    size_t n_pairs = 0;
    for (int32_t e : b.not_sent(*missing, link)) {
        n_pairs += (size_t) std::count(r->chosen.begin(), r->chosen.end(), e);
        if (n_pairs <= by_host.pairs_max()) {
            r->staying.push_back(e);
            missing->erase(e);
        }
    }
}

expert_banks::result expert_banks::copy(ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * dst,
                                        ggml_cgraph * part, const host_side & host, std::string * error) {
    const auto found = layer_of_map.find(src);
    if (found == layer_of_map.end()) {
        return result::not_ours;
    }
    expert_bank & b = *banks[(size_t) found->second];
    const auto fail = [&](const char * why) {
        *error = "layer " + std::to_string(b.layer) + " on " + ggml_backend_name(backend) + ": " + why;
        return result::failed;
    };
    const ggml_tensor * lookup = lookup_in(part, dst);
    const ggml_tensor * choice = lookup != nullptr ? host.original_of(lookup->src[1]) : nullptr;
    if (choice == nullptr || !ggml_is_contiguous(choice)) {
        return fail("its graph does not choose experts before it computes with them");
    }
    expert_request r;
    r.weights = b.weights.front();
    r.chosen.resize((size_t) ggml_nelements(choice));
    device_state & d = devices.at(ggml_backend_get_device(backend));
    wait_for_choice(backend, b, host, d);
    ggml_backend_tensor_get(choice, r.chosen.data(), 0, ggml_nbytes(choice));
    if (d.guesses != nullptr) {
        r.guessed = d.guesses->settle(r.chosen);
        n_guesses_used += (int64_t) r.guessed.size();
    }
    const auto exists = [&b](int32_t e) { return e >= 0 && e < b.n_expert(); };
    if (!std::all_of(r.chosen.begin(), r.chosen.end(), exists)) { // of a device that is gone, say
        return fail("the router asks for an expert that does not exist");
    }
    int64_t n_there = 0;
    std::set<int32_t> missing = b.use(r.chosen, &n_there);
    n_hits += n_there;
    n_misses += (int64_t) missing.size();
    by_host.end();
    if (!missing.empty() && host_can && d.is.shares) {
        const auto on_host = [&b](const ggml_tensor * t) { return b.host_twin(t); };
        host_can = by_host.begin(part, lookup, on_host, b.weights.size());
        if (host_can) {
            by_host_to = backend;
            leave_to_host(b, d.is.link_share, &missing, &r);
        }
    }
    b.note_asked(r.chosen);
    r.missing.assign(missing.begin(), missing.end());
    std::vector<int32_t> slots = b.slots_for(r.missing.size(), &r.leaving);
    if (slots.size() < r.missing.size()) {
        return fail("a ubatch wants more experts than there are slots");
    }
    n_stayed += (int64_t) r.staying.size();
    r.send = [&](int32_t expert, const expert_request::matrix_of & matrix) {
        const int32_t slot = slots.back();
        slots.pop_back();
        b.own(slot, -1); // until all of the next one is there
        for (size_t i = 0; i < b.weights.size(); ++i) {
            ggml_tensor * to = b.tensor(i);
            ggml_backend_tensor_set_async(backend, to, matrix(b.weights[i]), (size_t) slot * to->nb[2], to->nb[2]);
            add_bytes(d.bytes.up, to->nb[2]);
        }
        b.own(slot, expert);
    };
    r.fetch = [&](int32_t expert, const ggml_tensor * weights, uint8_t * to) {
        const ggml_tensor * t = bank_of(weights);
        ggml_backend_tensor_get(t, to, (size_t) b.slot_of(expert) * t->nb[2], t->nb[2]);
        add_bytes(d.bytes.down, t->nb[2]);
    };
    r.compute = [&](std::string * why) {
        return by_host.compute(host.backend, r.chosen, std::set<int32_t>(r.staying.begin(), r.staying.end()), why);
    };
    r.finish = [backend] { ggml_backend_synchronize(backend); };
    routers.forget();
    if (const expert_bank * next = next_of(b)) {
        if (d.guesses != nullptr && d.guesses->may_send()) {
            routers.see(b.layer, choice);
        }
        r.next_weights = next->weights.front();
        r.guess = [this, &b, choice, next] {
            routers.see(b.layer, choice);
            return lacking(*next);
        };
    }
    if (!host.serve(r, error)) {
        by_host.end();
        return result::failed;
    }
    const void * map = src->data;
    if (!r.staying.empty()) { // the device computes something in their place that nobody reads: best with what it has
        const auto any = std::find_if(r.chosen.begin(), r.chosen.end(), [&b](int32_t e) { return b.slot_of(e) >= 0; });
        map = b.map_with(any != r.chosen.end() ? b.slot_of(*any) : 0);
    }
    ggml_backend_tensor_set_async(backend, dst, map, 0, ggml_nbytes(src));
    return result::copied;
}

bool expert_banks::copy_nothing(ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * dst) {
    if ((src->flags & expert_bank::flag_waits) == 0) {
        return false;
    }
    ggml_backend_synchronize(backend);
    static const uint8_t zeros[1024] = {}; // not every device can clear a part of a buffer
    for (size_t at = 0; at < ggml_nbytes(dst); at += sizeof(zeros)) {
        ggml_backend_tensor_set(dst, zeros, at, std::min(sizeof(zeros), ggml_nbytes(dst) - at));
    }
    return true;
}

expert_banks::traffic expert_banks::traffic_of(ggml_backend_dev_t dev) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return devices.at(dev).bytes;
}

bool expert_banks::holds(const ggml_tensor * weights, int32_t expert) const {
    const auto found = bank_tensors.find(weights);
    return found != bank_tensors.end() && banks[(size_t) found->second.first]->holds(expert);
}

void expert_banks::copy_to(ggml_backend_t backend, const ggml_tensor * weights, int32_t expert,
                           ggml_tensor * to) const {
    const auto & [il, i] = bank_tensors.at(weights);
    banks[(size_t) il]->copy_to(backend, i, expert, to);
}

void expert_banks::keep(const ggml_tensor * weights, const ggml_tensor * from, const std::vector<int32_t> & most_chosen,
                        bool may_leave) {
    const ggml_tensor * to = bank_of(weights);
    if (to != nullptr && ggml_backend_buffer_get_type(from->buffer) == ggml_backend_buffer_get_type(to->buffer)) {
        const auto & [il, i] = bank_tensors.at(weights);
        banks[(size_t) il]->keep(i, *from, most_chosen, may_leave);
    }
}

} // namespace superllama
