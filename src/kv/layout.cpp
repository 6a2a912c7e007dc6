#include "kv/layout.h"

#include "io/address_space.h"
#include "kv/spill.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace superllama {

std::string kv_mib(uint64_t bytes) {
    char text[32];
    const bool small = bytes < 1024 * 1024;
    snprintf(text, sizeof(text), "%.1f %s", (double) bytes / (small ? 1024.0 : 1024.0 * 1024.0), small ? "KiB" : "MiB");
    return text;
}

kv_layout::kv_layout(kv_geometry geometry_) :
    os_page(system_page()),
    geometry(std::move(geometry_)),
    n_per_stream((geometry.n_cells + geometry.page_cells - 1) / geometry.page_cells) {
    layer_begin.push_back(0);
    for (uint32_t il = 0; il < n_layers(); ++il) {
        size_t slice = 0;
        uint64_t charge = 0;
        for (size_t i = 0; i < n_spans(il); ++i) {
            const kv_rows & rows = geometry.layers[il][i];
            const size_t size = rows.row_bytes * geometry.page_cells;
            const bool aligned = size % os_page == 0 && (rows.row_bytes * geometry.n_cells) % os_page == 0;
            slice += size;
            charge += aligned ? size : round_up(size, os_page) + os_page;
            by_address.push_back({ rows.base, { il, i } });
        }
        layer_begin.push_back(layer_begin.back() + round_up(slice, kv_spill::alignment));
        charges.push_back(charge);
        sum_charge += charge;
    }
    sum_charge_max = sum_charge;
    away.resize(n_layers());
    std::sort(by_address.begin(), by_address.end());
}

void kv_layout::set_away(uint32_t layer, bool is_away) {
    n_away = n_away - (away[layer] ? 1 : 0) + (is_away ? 1 : 0);
    sum_charge = sum_charge - layer_charge(layer) + (is_away ? 0 : charges[layer]);
    away[layer] = is_away;
}

uint64_t kv_layout::layer_charge_max() const {
    return *std::max_element(charges.begin(), charges.end());
}

size_t kv_layout::bounce_bytes() const {
    return std::min<size_t>(1024 * 1024, record_bytes());
}

uint32_t kv_layout::n_cells_of(page_id p) const {
    return std::min(geometry.page_cells, geometry.n_cells - first_cell(p));
}

kv_layout::span kv_layout::span_of(page_id p, uint32_t layer, size_t i) const {
    const kv_rows & rows = geometry.layers[layer][i];
    return { rows.base + ((size_t) stream_of(p) * geometry.n_cells + first_cell(p)) * rows.row_bytes,
             n_cells_of(p) * rows.row_bytes };
}

bool kv_layout::walk(const uint8_t * at, size_t size, const std::function<bool(const piece &)> & take) const {
    while (size > 0) {
        auto found = std::upper_bound(by_address.begin(), by_address.end(), at,
                                      [](const uint8_t * a, const auto & entry) { return a < entry.first; });
        if (found == by_address.begin()) {
            return false;
        }
        --found;
        const uint32_t layer = found->second.first;
        const size_t i_span = found->second.second;
        const size_t row = (size_t) (at - found->first) / geometry.layers[layer][i_span].row_bytes;
        if (row >= (size_t) geometry.n_streams * geometry.n_cells) {
            return false;
        }
        const page_id p = page_of((uint32_t) (row / geometry.n_cells), (uint32_t) (row % geometry.n_cells));
        const span whole = span_of(p, layer, i_span);
        const size_t begin = (size_t) (at - whole.at), n = std::min(size, whole.size - begin);
        size_t offset = layer_begin[layer] + begin;
        for (size_t i = 0; i < i_span; ++i) {
            offset += span_of(p, layer, i).size;
        }
        if (!take({ p, layer, whole.at + begin, n, offset })) {
            return false;
        }
        at += n;
        size -= n;
    }
    return true;
}

void kv_layout::copy_record(page_id p, size_t begin, size_t end, uint8_t * buffer, bool to_memory) const {
    const auto first = std::upper_bound(layer_begin.begin(), layer_begin.end(), begin) - layer_begin.begin() - 1;
    for (uint32_t il = (uint32_t) first; il < n_layers() && layer_begin[il] < end; ++il) {
        size_t offset = layer_begin[il];
        for (size_t i = 0; i < n_spans(il); ++i) {
            const span s = span_of(p, il, i);
            const size_t from = std::max(begin, offset), to = std::min(end, offset + s.size);
            if (from < to && to_memory) {
                memcpy(s.at + (from - offset), buffer + (from - begin), to - from);
            } else if (from < to) {
                memcpy(buffer + (from - begin), s.at + (from - offset), to - from);
            }
            offset += s.size;
        }
    }
}

} // namespace superllama
