#include "context/compute_buffers.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "io/address_space.h"

#include <algorithm>
#include <iterator>

namespace superllama {

static uint8_t * page_down(uint8_t * at) {
    return (uint8_t *) round_down((size_t) at, system_page());
}

static uint8_t * page_up(uint8_t * at) {
    return (uint8_t *) round_up((size_t) at, system_page());
}

void compute_buffers::pages::add(uint8_t * first, uint8_t * last) {
    auto at = ranges.upper_bound(first);
    if (at != ranges.begin() && std::prev(at)->second >= first) {
        --at;
        first = at->first;
    }
    while (at != ranges.end() && at->first <= last) {
        last = std::max(last, at->second);
        at = ranges.erase(at);
    }
    ranges[first] = last;
}

size_t compute_buffers::pages::bytes() const {
    size_t sum = 0;
    for (const auto & r : ranges) {
        sum += (size_t) (r.second - r.first);
    }
    return sum;
}

void compute_buffers::add(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->buffer;
    if (buffer == nullptr || t->data == nullptr || t->view_src != nullptr ||
        buffer->usage != GGML_BACKEND_BUFFER_USAGE_COMPUTE || !ggml_backend_buffer_is_host(buffer)) {
        return;
    }
    uint8_t * base = (uint8_t *) ggml_backend_buffer_get_base(buffer);
    const size_t size = ggml_backend_buffer_get_size(buffer);
    if (buffers.emplace(base, size).second) { // huge pages, where they are the default, would be more than is counted
        address_small_pages(page_up(base), (size_t) (page_down(base + size) - page_up(base)));
    }
    uint8_t * data = (uint8_t *) t->data;
    of_graph.add(page_down(data), page_up(data + ggml_backend_buffer_get_alloc_size(buffer, t)));
}

size_t compute_buffers::add(const ggml_cgraph * gf) {
    if (gf->uid == 0 || gf->uid != graph_id) {
        graph_id = gf->uid;
        of_graph.ranges.clear();
        buffers.clear(); // they may have been allocated anew
        for (int i = 0; i < gf->n_leafs; ++i) {
            add(gf->leafs[i]);
        }
        for (int i = 0; i < gf->n_nodes; ++i) {
            add(gf->nodes[i]);
        }
        for (const auto & r : of_graph.ranges) {
            in_memory.add(r.first, r.second);
        }
    }
    return in_memory.bytes();
}

void compute_buffers::give_back() {
    for (const auto & buffer : buffers) {
        uint8_t * at = page_up(buffer.first);
        uint8_t * end = page_down(buffer.first + buffer.second);
        for (const auto & used : of_graph.ranges) {
            if (used.second <= at || used.first >= end) {
                continue;
            }
            if (at < used.first) {
                address_discard(at, (size_t) (used.first - at));
            }
            at = used.second;
        }
        if (at < end) {
            address_discard(at, (size_t) (end - at));
        }
    }
    in_memory = of_graph;
}

} // namespace superllama
