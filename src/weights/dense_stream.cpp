#include "weights/dense_stream.h"

#include "ggml.h"
#include "io/address_space.h"

#include <algorithm>
#include <functional>
#include <map>

namespace superllama {

static const size_t queue_bytes = 16u << 20; // of reads that keep a drive busy
static const size_t ahead_max = 256u << 20;  // enough for any disk; the order stays that of need

// In the order of bit-reversed positions: whatever prefix is pinned, it and the rest are spread evenly over the layers,
// so that reading and computing overlap all the way.
static std::vector<uint32_t> spread(const std::vector<uint32_t> & ids) {
    size_t n_bits = 0;
    while (((size_t) 1 << n_bits) < ids.size()) {
        n_bits++;
    }
    std::vector<uint32_t> order;
    for (size_t i = 0; i < (size_t) 1 << n_bits; ++i) {
        size_t reversed = 0;
        for (size_t bit = 0; bit < n_bits; ++bit) {
            reversed |= (i >> bit & 1) << (n_bits - 1 - bit);
        }
        if (reversed < ids.size()) {
            order.push_back(ids[reversed]);
        }
    }
    return order;
}

dense_stream::dense_stream(weight_store & store, block_loader & loader, superllama_layer_policy policy) :
    store(store),
    loader(loader),
    policy(policy),
    pinned(loader.size()),
    used(loader.size()) {
    // The largest first: the smaller the blocks that are streamed, the smaller the ring that holds some of them.
    std::map<size_t, std::vector<uint32_t>, std::greater<size_t>> by_size;
    for (uint32_t id = 0; id < loader.size(); ++id) {
        if (!loader.is_expert(id)) {
            n_bytes += loader.bytes_of(id);
            by_size[loader.bytes_of(id) >> 20].push_back(id); // the same matrix of another layer may lie on a page more
        }
    }
    for (const auto & entry : by_size) {
        const std::vector<uint32_t> order = spread(entry.second);
        pin_order.insert(pin_order.end(), order.begin(), order.end());
    }
}

// ------------------------------------------------------------------------------------------------- budget

// The ring: blocks in use and one on its way, and a queue of reads. The longest prefix of pin_order is pinned that
// leaves this much for the rest.
dense_budget dense_stream::plan(size_t left) const {
    dense_budget b;
    for (uint32_t id : pin_order) {
        b.bytes += loader[id].elsewhere ? 0 : loader.bytes_of(id);
    }
    const size_t queue = std::min(queue_bytes, left / 16);
    const bool pins = policy == SUPERLLAMA_LAYER_POLICY_PIN;
    b.works = left >= b.bytes && (pins || b.bytes == 0);
    b.pinned = b.works ? b.bytes : 0;
    b.least = b.bytes;
    size_t rest = 0;
    size_t largest = 0;
    for (size_t k = pin_order.size(); k-- > 0;) {
        const uint32_t id = pin_order[k];
        if (loader[id].elsewhere) {
            continue;
        }
        rest += loader.bytes_of(id);
        largest = std::max(largest, loader.bytes_of(id));
        if (!pins && rest < b.bytes) {
            continue; // this policy pins nothing
        }
        const size_t at_once = std::max(2 * largest, in_use_max.empty() ? 0 : in_use_max[k]);
        const size_t ring = round_up(std::min(rest, at_once), store.ring_page());
        const size_t need = b.bytes - rest + ring;
        b.least = std::min(b.least, need + std::min(queue_bytes, need / 15 + 1)); // where `queue` fits besides
        if (!b.works && need + queue <= left) {
            b.works = true;
            b.ring = pins ? ring + queue : left;
            b.pinned = left - b.ring;
        }
    }
    b.streamed = b.bytes - std::min(b.bytes, b.pinned);
    return b;
}

// The most that is in use at any node, of these blocks alone. A block that ends at a node is in use while one begins
// there.
static size_t most_at_once(const std::vector<block_use> & uses, const std::vector<bool> & streamed,
                           const block_loader & loader) {
    std::map<int, std::pair<size_t, size_t>> events; // bytes that begin and that end
    for (const block_use & u : uses) {
        if (streamed[u.block]) {
            events[u.first].first += loader.bytes_of(u.block);
            events[u.last].second += loader.bytes_of(u.block);
        }
    }
    size_t now = 0, most = 0;
    for (const auto & e : events) {
        now += e.second.first;
        most = std::max(most, now);
        now -= e.second.second;
    }
    return most;
}

void dense_stream::expect(const std::vector<block_use> & uses) {
    in_use_max.resize(pin_order.size());
    std::vector<bool> streamed(loader.size());
    for (size_t k = pin_order.size(); k-- > 0;) {
        streamed[pin_order[k]] = true;
        in_use_max[k] = std::max(in_use_max[k], most_at_once(uses, streamed, loader));
    }
}

void dense_stream::apply(const dense_budget & budget) {
    size_t left = budget.pinned;
    size_t n_pinned = 0;
    for (uint32_t id : pin_order) {
        const bool pin = !loader[id].elsewhere && loader.bytes_of(id) <= left;
        if (pin) {
            left -= loader.bytes_of(id);
            n_pinned += loader.bytes_of(id);
        }
        pinned[id] = pin;
        if (loader[id].idle() && misplaced(id)) {
            loader.drop(id);
        }
    }
    pinned_max = n_pinned;
    const bool streams = budget.bytes > n_pinned;
    store.limit_ring(budget.ring + (streams ? left : 0)); // and what was too small for another block
}

// Blocks of this graph that come only now stay where they are read to. The ring keeps its size: what is in it is in
// use, or on its way. Reads are begun by the graph's thread and by nobody else: while it waits for room for a block, no
// other thread may begin that block.
size_t dense_stream::pin_more(size_t bytes) {
    const auto is_on_its_way_out = [this](uint32_t id) {
        return loader[id].state != block_state::absent && misplaced(id);
    };
    if (policy != SUPERLLAMA_LAYER_POLICY_PIN || !fits(0) ||
        std::any_of(pin_order.begin(), pin_order.end(), is_on_its_way_out)) {
        return bytes;
    }
    for (uint32_t id : pin_order) {
        const size_t size = loader.bytes_of(id);
        if (!pinned[id] && !loader[id].elsewhere && loader[id].state == block_state::absent && size <= bytes) {
            pinned[id] = true;
            pinned_max += size;
            bytes -= size;
        }
    }
    return bytes;
}

// ------------------------------------------------------------------------------------------- room in the ring

void dense_stream::take_memory(uint32_t id) {
    store.place(id, !pinned[id]);
    if (!store.in_ring(id)) {
        pinned_used += loader.bytes_of(id);
    }
}

void dense_stream::give_memory_back(uint32_t id) {
    if (!store.in_ring(id)) {
        pinned_used -= loader.bytes_of(id);
    }
    used.remove(id);
    store.drop(id);
}

// Pinned blocks have their memory reserved, whether they are there yet or not.
bool dense_stream::may_stay(uint32_t id) const {
    return !misplaced(id) && (pinned[id] || fits(0));
}

bool dense_stream::settled(uint32_t id) const {
    return pinned[id] && loader[id].state == block_state::ready && !misplaced(id);
}

// In the ring though it is pinned now, or at home though it is no more.
bool dense_stream::misplaced(uint32_t id) const {
    return pinned[id] == store.in_ring(id);
}

bool dense_stream::is_passing(uint32_t id) const {
    return loader[id].state == block_state::reading && !loader[id].in_use && !pinned[id];
}

// The idle block that is missed least; -1: all are in use, on their way, or pinned.
int64_t dense_stream::find_victim() const {
    if (policy == SUPERLLAMA_LAYER_POLICY_LRU) {
        for (uint32_t id : used.oldest_first()) {
            if (loader[id].idle()) {
                return id;
            }
        }
        return -1;
    }
    const size_t n = graph != nullptr ? graph->order.size() : 0;
    for (size_t k = n; k-- > 0;) { // the streamed block that is needed last
        const uint32_t id = graph->order[(head + 1 + k) % n];
        if (!pinned[id] && loader[id].idle()) {
            return id;
        }
    }
    for (uint32_t id : pin_order) { // of no graph yet, or of another one
        if (!pinned[id] && loader[id].idle()) {
            return id;
        }
    }
    return -1;
}

// Where there is room, but not in one piece, blocks in use move together.
bool dense_stream::make_room(size_t bytes, block_loader::guard & lock) {
    while (!fits(bytes)) {
        const int64_t victim = find_victim();
        if (victim >= 0) {
            loader.drop((uint32_t) victim);
        } else if (!wait_for_idle(lock)) {
            if (bytes > 0) {
                loader.wait_for_sending(lock);
                store.compact_ring([this](uint32_t id) { point(id); });
            }
            return fits(bytes);
        }
    }
    return true;
}

void dense_stream::make_room_now() {
    for (int64_t victim = 0; victim >= 0 && !fits(0);) {
        victim = find_victim();
        if (victim >= 0) {
            loader.drop((uint32_t) victim);
        }
    }
}

// Everything unused is still on its way in, or to a device: waits for one, it can go then. False: there is none.
bool dense_stream::wait_for_idle(block_loader::guard & lock) {
    for (uint32_t id : pin_order) {
        const bool goes = loader[id].sending && !pinned[id];
        if ((loader[id].state == block_state::reading || goes) && !loader[id].in_use) {
            loader.wait(lock);
            return true;
        }
    }
    return false;
}

// --------------------------------------------------------------------------------------- the way of a graph

void dense_stream::begin(const layer_graph & g, int64_t number) {
    graph = &g;
    n_graphs = number;
    end();
}

void dense_stream::end() {
    if (graph != nullptr) {
        head = graph->order.size() - 1; // the first block comes next
        pump();
    }
}

void dense_stream::forget() {
    graph = nullptr; // no read-ahead for what is gone
}

void dense_stream::point(uint32_t id) {
    store.point(id);
    if (graph == nullptr) {
        return;
    }
    const auto views = graph->views.find(id);
    if (views != graph->views.end()) {
        for (ggml_tensor * view : views->second) {
            view->data = (char *) view->view_src->data + view->view_offs;
        }
    }
}

// Reads ahead in graph order, round the end of the graph into the next one.
void dense_stream::pump() {
    if (!loader.reads_ahead()) {
        return;
    }
    block_loader::guard none; // with readers, nothing is read in this thread
    const size_t n = graph->order.size();
    bool full = policy == SUPERLLAMA_LAYER_POLICY_LRU; // there, what is read ahead would evict what is needed
    size_t ahead = 0;
    for (size_t k = 0; k < n; ++k) {
        const uint32_t id = graph->order[(head + 1 + k) % n];
        if (loader[id].state != block_state::absent) {
            ahead += loader[id].state == block_state::reading ? loader.bytes_of(id) : 0;
            continue;
        }
        if (!pinned[id]) {
            full = full || !fits(loader.bytes_of(id));
            if (full) {
                continue;
            }
        }
        ahead += loader.bytes_of(id);
        if (ahead > ahead_max) {
            break;
        }
        loader.begin(id, n_graphs * (int64_t) n + (int64_t) k, none);
    }
}

bool dense_stream::acquire_if_there(const std::vector<uint32_t> & ids) {
    if (!std::all_of(ids.begin(), ids.end(), [this](uint32_t id) { return settled(id); })) {
        return false;
    }
    for (uint32_t id : ids) {
        loader[id].in_use = true;
        loader[id].last_use = n_graphs;
        point(id);
    }
    return true;
}

bool dense_stream::acquire(uint32_t id, block_loader::guard & lock, std::string * error) {
    do {
        head = (head + 1) % graph->order.size(); // blocks are acquired in this order
    } while (graph->order[head] != id);
    return fetch(id, lock, error);
}

bool dense_stream::fetch(uint32_t id, block_loader::guard & lock, std::string * error) {
    block_status & b = loader[id];
    b.in_use = true;
    b.last_use = n_graphs;
    if (policy == SUPERLLAMA_LAYER_POLICY_LRU) {
        used.touch(id);
    }
    if (b.state == block_state::ready) {
        point(id);
        return true;
    }

    const int64_t t_begin = ggml_time_us();
    // a read ahead that fails, or is called off, is tried again here
    for (int attempt = 0; b.state != block_state::ready && attempt < 3; ++attempt) {
        const bool mine = b.state == block_state::absent;
        if (mine) {
            if (!pinned[id] && !make_room(loader.bytes_of(id), lock)) {
                *error = "no memory left for a block of " + std::to_string(loader.bytes_of(id)) +
                         " bytes of weights; raise --mem-budget";
                return false;
            }
            loader.begin(id, -1, lock);
        }
        loader.wait_for(id, lock);
        if (mine && b.state != block_state::ready) {
            break;
        }
    }
    waited_ms += (double) (ggml_time_us() - t_begin) / 1000.0;
    if (b.state != block_state::ready) {
        *error = b.error;
        b.error = "";
        return false;
    }
    point(id);
    pump();
    return true;
}

void dense_stream::release(uint32_t id) {
    block_status & b = loader[id];
    if (!b.in_use) {
        return;
    }
    b.in_use = false;
    if (policy == SUPERLLAMA_LAYER_POLICY_PIN && b.idle() && !settled(id)) {
        loader.drop(id);
        pump();
    }
}

} // namespace superllama
