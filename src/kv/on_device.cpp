// Layers of a paged KV cache on devices. A layer's cells are all there, or all in pages: memory of a device has no
// holes. It has no more of them than there have to be, and grows with them; where each sequence has a stream of its
// own, all of them from the beginning, for the last stream may be the first that is used. Pages that are on disk are
// read on the way there; on the way back idle ones go to disk where the budget is full.

#include "kv/pager.h"

#include "base/error.h"
#include "llama-impl.h"

#include "ggml-alloc.h"

#include <algorithm>

namespace superllama {

static const uint32_t device_cells_min = 512;
static const uint32_t graph_pad = 256; // cells, to which upstream's graphs are rounded up

// ------------------------------------------------------------------------------------------------- tensors

static void point(ggml_tensor * t, ggml_backend_buffer_t buffer, void * data, void * extra) {
    t->buffer = buffer;
    t->data = data;
    t->extra = extra;
}

static void set_cells(ggml_tensor * t, uint32_t n_cells) {
    t->ne[1] = n_cells;
    t->nb[2] = t->nb[1] * n_cells;
    t->nb[3] = t->nb[2] * (size_t) t->ne[2];
}

std::vector<ggml_tensor *> kv_pager::rows_of(uint32_t layer) const {
    const auto & of = kv.layers[layer];
    return of.v != nullptr ? std::vector<ggml_tensor *>{ of.k, of.v } : std::vector<ggml_tensor *>{ of.k };
}

// Of a layer that is on a device, as they are there.
std::vector<ggml_tensor> kv_pager::rows_on_device(uint32_t layer) const {
    std::vector<ggml_tensor> rows;
    for (const ggml_tensor * t : rows_of(layer)) {
        rows.push_back(*t);
        set_cells(&rows.back(), cells_on_device[layer]);
    }
    return rows;
}

// Null: no memory there. Kernels read cells that are masked, which must hold numbers.
ggml_backend_buffer_ptr kv_pager::alloc_rows(uint32_t layer, ggml_backend_buffer_type_t to,
                                             std::vector<ggml_tensor> & rows, uint32_t n_cells) const {
    size_t bytes = 0;
    for (const ggml_tensor * t : rows_of(layer)) {
        rows.push_back(*t);
        set_cells(&rows.back(), n_cells);
        point(&rows.back(), nullptr, nullptr, nullptr);
        bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(to, &rows.back()), ggml_backend_buft_get_alignment(to));
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(to, bytes));
    if (buffer != nullptr) {
        ggml_backend_buffer_clear(buffer.get(), 0);
        ggml_tallocr place = ggml_tallocr_new(buffer.get());
        for (ggml_tensor & t : rows) {
            ggml_tallocr_alloc(&place, &t);
        }
    }
    return buffer;
}

// From now on graphs find the cells there; without a buffer, in pages.
void kv_pager::place_rows(uint32_t layer, const std::vector<ggml_tensor> & rows, ggml_backend_buffer_ptr buffer,
                          uint32_t n_cells) {
    const std::vector<ggml_tensor *> own = rows_of(layer);
    for (size_t i = 0; i < own.size(); ++i) {
        if (buffer != nullptr) {
            point(own[i], rows[i].buffer, rows[i].data, rows[i].extra);
        } else {
            point(own[i], in_pages, pages->span_of(0, layer, i).at, nullptr);
        }
    }
    for (const auto * views : { &kv.layers[layer].k_stream, &kv.layers[layer].v_stream }) {
        for (ggml_tensor * view : *views) {
            if (view != nullptr) {
                point(view, nullptr, nullptr, nullptr);
                ggml_backend_view_init(view);
            }
        }
    }
    on_device[layer] = std::move(buffer);
    cells_on_device[layer] = n_cells;
    shape_rows(layer);
}

void kv_pager::shape_rows(uint32_t layer) {
    if (kv.n_stream > 1) {
        return; // all of them, wherever they are
    }
    const bool all = on_device[layer] == nullptr || shows_all;
    const uint32_t n_cells = all ? kv.get_size() : cells_on_device[layer];
    for (ggml_tensor * t :
         { kv.layers[layer].k, kv.layers[layer].v, kv.layers[layer].k_stream[0], kv.layers[layer].v_stream[0] }) {
        if (t != nullptr) {
            set_cells(t, n_cells);
        }
    }
}

void kv_pager::show_all_cells(bool all) {
    shows_all = all;
    for (uint32_t layer = 0; layer < pages->n_layers(); ++layer) {
        shape_rows(layer);
    }
}

// ------------------------------------------------------------------------------------------------- moves

size_t kv_pager::device_bytes(int il) const {
    size_t bytes = 0;
    for (const ggml_tensor * t : rows_of(index_of.at(il))) {
        bytes += t->nb[1] * device_cells * kv.n_stream;
    }
    return bytes;
}

bool kv_pager::is_at(int il, ggml_backend_buffer_type_t to) const {
    const uint32_t layer = index_of.at(il);
    if (on_device[layer] == nullptr) {
        return to == ggml_backend_cpu_buffer_type();
    }
    return ggml_backend_buffer_get_type(on_device[layer].get()) == to && cells_on_device[layer] == device_cells;
}

bool kv_pager::move(int il, ggml_backend_buffer_type_t to, uint64_t * copied) {
    if (is_at(il, to)) {
        return true;
    }
    end_streaming();
    pages->unpin_all();
    const uint32_t layer = index_of.at(il);
    const ggml_backend_buffer_t there = on_device[layer].get();
    std::string error;
    bool ok = false;
    moving = true;
    tried([&] {
        if (there != nullptr && ggml_backend_buffer_get_type(there) == to) {
            ok = resize(layer);
        } else {
            ok = (there == nullptr || fetch(layer, copied, &error)) &&
                 (to == ggml_backend_cpu_buffer_type() || send(layer, to, copied, &error));
        }
    });
    moving = false;
    if (!ok && !error.empty()) {
        LLAMA_LOG_ERROR("%s: KV cache of layer %d: %s\n", __func__, il, error.c_str());
    }
    return ok;
}

bool kv_pager::send(uint32_t layer, ggml_backend_buffer_type_t to, uint64_t * copied, std::string * error) {
    std::vector<ggml_tensor> rows;
    ggml_backend_buffer_ptr buffer = alloc_rows(layer, to, rows, device_cells);
    const auto copy = [&](size_t i, size_t offset, const uint8_t * data, size_t n) {
        ggml_backend_tensor_set(&rows[i], data, offset, n);
        *copied += n;
    };
    if (buffer == nullptr || !pages->send_layer(layer, copy, error)) {
        return false;
    }
    place_rows(layer, rows, std::move(buffer), device_cells);
    return true;
}

bool kv_pager::fetch(uint32_t layer, uint64_t * copied, std::string * error) {
    const std::vector<ggml_tensor> rows = rows_on_device(layer);
    const auto copy = [&](size_t i, size_t offset, uint8_t * data, size_t n) {
        ggml_backend_tensor_get(&rows[i], data, offset, n);
        *copied += n;
    };
    if (!pages->fetch_layer(layer, copy, error)) {
        return false;
    }
    place_rows(layer, {}, nullptr, 0);
    return true;
}

// To memory for more cells, or for fewer, on the same device.
bool kv_pager::resize(uint32_t layer) {
    std::vector<ggml_tensor> before = rows_on_device(layer), rows;
    ggml_backend_buffer_ptr buffer =
        alloc_rows(layer, ggml_backend_buffer_get_type(on_device[layer].get()), rows, device_cells);
    if (buffer == nullptr) {
        return false;
    }
    const uint32_t kept = std::min(cells_on_device[layer], device_cells);
    for (size_t i = 0; i < rows.size(); ++i) {
        ggml_tensor to = rows[i];
        set_cells(&before[i], kept);
        set_cells(&to, kept);
        ggml_backend_tensor_copy(&before[i], &to);
    }
    place_rows(layer, rows, std::move(buffer), device_cells);
    return true;
}

// ------------------------------------------------------------------------------------------------- growth

size_t kv_pager::spare_bytes() const {
    return kv.n_stream == 1 && kv.get_size() > device_cells_min ? bytes_of_cell_max * device_cells : 0;
}

// A ubatch's cells are the first empty ones behind the last that were taken.
bool kv_pager::expect_cells(uint64_t n) {
    const uint32_t all = kv.get_size();
    if (kv.n_stream > 1) {
        device_cells = all;
        return false;
    }
    const uint64_t end = std::max(kv.v_heads[0], kv.v_cells[0].used_max_p1()) + std::min<uint64_t>(n, all);
    const auto in_pages_of = [&](uint64_t cells) {
        const uint64_t page = pages->n_cells_of(0), least = std::max<uint64_t>(cells, device_cells_min);
        return (uint32_t) std::min<uint64_t>((GGML_PAD(least, graph_pad) + page - 1) / page * page, all);
    };
    const uint32_t least = in_pages_of(end), wanted = in_pages_of(end + end / 4);
    if (device_cells >= least && device_cells / 2 <= wanted) {
        return false;
    }
    sweep(0); // beyond what is wanted there is nothing then
    device_cells = wanted;
    return std::any_of(on_device.begin(), on_device.end(), [](const auto & buffer) { return buffer != nullptr; });
}

} // namespace superllama
