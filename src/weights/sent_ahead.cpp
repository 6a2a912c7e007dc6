#include "weights/sent_ahead.h"

#include "llama-impl.h"
#include "weights/experts/view.h"

#include <algorithm>
#include <system_error>
#include <utility>

namespace superllama {

static const size_t bytes_min = 256u << 10; // of weights that are worth a copy more
static const size_t experts_at_once = 16;   // are begun to be sent, before they are waited for

sent_ahead::sent_ahead(weight_store & store, block_loader & loader, config cfg) :
    store(store),
    loader(loader),
    cfg(std::move(cfg)) {}

sent_ahead::~sent_ahead() {
    stop();
}

void sent_ahead::stop() {
    {
        const auto lock = loader.lock();
        stopping = true;
        loader.tell();
    }
    if (thread.joinable()) {
        thread.join();
    }
}

// ------------------------------------------------------------------------------------------------ the graph

void sent_ahead::begin(const layer_graph & graph) {
    std::deque<item> wanted_items;
    device all;
    for (const layer_copy & c : graph.copies) {
        const bool is_block =
            store.n_experts(c.weights) > 0 || (store.block_of(c.weights) >= 0 && store.pieces_of(c.weights).empty());
        if (!is_block) {
            continue; // always in memory
        }
        const device here = ggml_nbytes(c.to) < bytes_min ? device() : cfg.device_of(c.to);
        all = all.memory == nullptr ? here : all;
        if (here.memory == nullptr || here.memory != all.memory) {
            continue;
        }
        const size_t bytes = GGML_PAD(ggml_nbytes(c.to), ggml_backend_buffer_get_alignment(here.memory));
        if (bytes <= ggml_backend_buffer_get_size(here.memory) / 2) {
            wanted_items.push_back({ c.weights, c.to, bytes, 0, step::waits, {} });
        }
    }
    if (wanted_items.empty()) {
        return;
    }
    const auto lock = loader.lock();
    items = std::move(wanted_items);
    there = all;
    next = taken = 0;
    if (!thread.joinable()) {
        try {
            thread = std::thread([this] { run(); });
        } catch (const std::system_error & e) {
            LLAMA_LOG_WARN("superllama: weights of large batches are not sent ahead: no thread (%s)\n", e.what());
            items.clear();
        }
    }
    loader.tell();
}

void sent_ahead::end() {
    auto lock = loader.lock();
    next = items.size();
    ending = true;
    while (sends) {
        loader.wait(lock);
    }
    ending = false;
    items.clear();
    next = taken = 0;
    there = {};
}

std::optional<sent_ahead::arrived> sent_ahead::take(const ggml_tensor * to, block_loader::guard & lock) {
    const auto first = items.begin() + (ptrdiff_t) taken; // what was before may be overwritten
    const auto found = std::find_if(first, items.end(), [to](const item & it) { return it.to == to; });
    if (found == items.end()) {
        return {};
    }
    taken = (size_t) (found - items.begin());
    next = std::max(next, taken);
    wanted = &*found;
    while (found->state == step::goes) {
        loader.wait(lock);
    }
    wanted = nullptr;
    if (found->state == step::there) {
        return arrived{ place_of(*found), found->experts };
    }
    go_on(); // what has not begun to go does so by another way
    return {};
}

void sent_ahead::go_on() {
    taken++;
    next = std::max(next, taken);
    loader.tell();
}

// ----------------------------------------------------------------------------------------------- the thread

ggml_tensor sent_ahead::place_of(const item & it) const {
    ggml_tensor t = *it.to;
    t.buffer = there.memory;
    t.data = (uint8_t *) ggml_backend_buffer_get_base(there.memory) + it.first;
    t.extra = nullptr;
    return t;
}

// Behind what was sent last, round the end of the memory. What is there begins with the first that is still wanted.
bool sent_ahead::find_room(item & it) const {
    const size_t size = ggml_backend_buffer_get_size(there.memory);
    if (taken == next) {
        it.first = 0;
        return true; // nothing is there
    }
    const size_t begin = items[taken].first;
    const size_t end = items[next - 1].first + items[next - 1].bytes;
    if (end > begin) {
        it.first = size - end >= it.bytes ? end : 0;
        return it.first == end || it.bytes <= begin;
    }
    it.first = end;
    return begin - end >= it.bytes;
}

void sent_ahead::run() {
    auto lock = loader.lock();
    while (!stopping) {
        if (is_over() || !may_go(items[next])) {
            loader.wait(lock);
            continue;
        }
        item & it = items[next++];
        it.state = step::goes;
        sends = true;
        try {
            send(it, lock);
            it.state = step::there;
        } catch (const std::exception &) { // no memory: the graph sends it itself, and what follows
            it.state = step::waits;
            next = items.size();
        }
        sends = false;
        loader.tell();
    }
}

// A dense block that is not in memory comes, or the graph gets there first.
bool sent_ahead::may_go(item & it) const {
    const int32_t block = store.n_experts(it.weights) > 0 ? -1 : store.block_of(it.weights);
    return (block < 0 || loader[(uint32_t) block].state == block_state::ready) && find_room(it);
}

void sent_ahead::send(item & it, block_loader::guard & lock) {
    if (store.n_experts(it.weights) > 0) {
        send_experts(it, lock);
        return;
    }
    const auto id = (uint32_t) store.block_of(it.weights);
    const uint8_t * data = store.data(id, store.slice_of(id, it.weights));
    ggml_tensor to = place_of(it);
    {
        const block_loader::sending stays(loader, { id }, lock);
        cfg.send(&to, data, ggml_nbytes(&to));
    }
    loader.drop_unwanted({ id });
}

// Those that are in memory, until the graph waits: it knows which ones it wants.
void sent_ahead::send_experts(item & it, block_loader::guard & lock) {
    it.experts.assign((size_t) it.to->ne[2], false);
    const ggml_tensor to = place_of(it);
    const std::vector<uint32_t> ids = cfg.expected(it.weights);
    for (size_t i = 0; i < ids.size() && wanted != &it && !ending;) {
        std::vector<uint32_t> some;
        std::vector<const uint8_t *> data;
        for (; i < ids.size() && some.size() < experts_at_once; ++i) {
            if (loader[ids[i]].state == block_state::ready) {
                some.push_back(ids[i]);
                data.push_back(store.data(ids[i], store.slice_of(ids[i], it.weights)));
            }
        }
        {
            const block_loader::sending stays(loader, some, lock);
            for (size_t k = 0; k < some.size(); ++k) {
                ggml_tensor one = experts_in(to, store.blocks()[some[k]].expert, 1);
                ggml_backend_tensor_set_async(there.copies, &one, data[k], 0, ggml_nbytes(&one));
            }
            ggml_backend_synchronize(there.copies);
        }
        loader.drop_unwanted(some);
        for (uint32_t id : some) {
            it.experts[(size_t) store.blocks()[id].expert] = true;
        }
    }
}

} // namespace superllama
