// Where the pages of a KV cache are: in address space, and each as one record of the spill file.
// A page is `page_cells` neighbouring cells of one stream, over all layers' K and V; a slice is one layer of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace superllama {

// The cells of K or of V of one layer, all streams in order.
struct kv_rows {
    uint8_t * base;
    size_t row_bytes; // of one cell
};

struct kv_geometry {
    std::vector<std::vector<kv_rows>> layers; // [layer][K, V]

    uint32_t n_streams;
    uint32_t n_cells; // of one stream
    uint32_t page_cells;
};

std::string kv_mib(uint64_t bytes); // for people

class kv_layout {
  public:
    using page_id = uint32_t; // stream * pages_per_stream + page of the stream

    struct span {
        uint8_t * at;
        size_t size;
    };
    // A part of K or of V of one slice.
    struct piece {
        page_id p;
        uint32_t layer;
        uint8_t * at;
        size_t size;
        size_t record_offset;
    };

    kv_layout(kv_geometry geometry);

    uint32_t n_layers() const { return (uint32_t) geometry.layers.size(); }
    uint32_t n_here() const { return n_layers() - n_away; }
    // Its cells are on a device: its slices are empty here.
    bool is_away(uint32_t layer) const { return away[layer]; }
    uint32_t n_pages() const { return geometry.n_streams * n_per_stream; }
    uint32_t pages_per_stream() const { return n_per_stream; }
    page_id page_of(uint32_t stream, uint32_t cell) const { return stream * n_per_stream + cell / geometry.page_cells; }
    uint32_t stream_of(page_id p) const { return p / n_per_stream; }
    uint32_t first_cell(page_id p) const { return p % n_per_stream * geometry.page_cells; } // in its stream
    uint32_t n_cells_of(page_id p) const;

    // memory that a page or a slice may hold: whole pages of the system where slices share them; nothing of layers that
    // are away
    uint64_t page_charge() const { return sum_charge; }
    uint64_t page_charge_max() const { return sum_charge_max; } // with all layers here
    uint64_t layer_charge(uint32_t layer) const { return away[layer] ? 0 : charges[layer]; }
    uint64_t layer_charge_max() const;

    size_t record_bytes() const { return layer_begin.back(); }
    size_t bounce_bytes() const; // the buffer of one thread that reads or writes

    size_t n_spans(uint32_t layer) const { return geometry.layers[layer].size(); }
    span span_of(page_id p, uint32_t layer, size_t i) const;

    // The pieces of [at, at + size), in order, until one is not taken. False also for addresses beyond the rows.
    bool walk(const uint8_t * at, size_t size, const std::function<bool(const piece &)> & take) const;

    // Bytes [begin, end) of a page's record, between memory and a buffer.
    void copy_record(page_id p, size_t begin, size_t end, uint8_t * buffer, bool to_memory) const;

  protected:
    void set_away(uint32_t layer, bool is_away); // whose slices are empty

    size_t os_page;
    std::vector<size_t> layer_begin; // in a record, n_layers() + 1 of them

  private:
    kv_geometry geometry;
    uint32_t n_per_stream;
    std::vector<uint64_t> charges; // [layer]
    std::vector<bool> away;        // [layer]
    uint32_t n_away = 0;
    uint64_t sum_charge = 0;
    uint64_t sum_charge_max = 0;
    std::vector<std::pair<const uint8_t *, std::pair<uint32_t, size_t>>> by_address;
};

} // namespace superllama
