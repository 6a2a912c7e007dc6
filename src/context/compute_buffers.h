// Host memory of a context's compute buffers: how much of it graphs use, and giving the rest back. Buffers are as large
// as the largest ubatch needs; a token that is decoded alone uses a small part of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

struct ggml_cgraph;
struct ggml_tensor;

namespace superllama {

class compute_buffers {
  public:
    // A graph whose tensors have their places: bytes of pages that are in memory once it runs.
    size_t add(const ggml_cgraph * gf);
    size_t bytes_of_graph() const { return of_graph.bytes(); } // of the last one alone

    void give_back(); // what the last graph does not use

  private:
    // Whole pages, begin to end, apart from each other.
    struct pages {
        std::map<uint8_t *, uint8_t *> ranges;

        void add(uint8_t * first, uint8_t * last);
        size_t bytes() const;
    };
    void add(const ggml_tensor * t);

    uint64_t graph_id = 0;
    pages of_graph;
    pages in_memory;
    std::map<uint8_t *, size_t> buffers;
};

} // namespace superllama
