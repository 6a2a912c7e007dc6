// How many threads compute a graph while other processes need the cores too: no more than there are cores left.
//
// Nearly all of upstream's kernels compute the same bits with any number of threads. One does not: attention of a
// single token over many cells is split over the threads, and their sums are added. What is promised to be exact keeps
// its threads there.
#pragma once

#include "superllama-params.h"

#include <cstdint>

struct ggml_cgraph;
struct llama_context;

namespace superllama {

class graph_threads {
  public:
    // `managed`: weights or KV of the context are where a budget has them.
    graph_threads(llama_context & ctx, superllama_adapt_threads mode, bool managed);

    void before_graph(const ggml_cgraph * gf, bool batched); // batched: of more than one token
    void after_graph();                                      // the context has the numbers that its user gave it

    int used() const { return n_used; } // by the last graph; 0: none ran

  private:
    llama_context & ctx;
    const superllama_adapt_threads mode;
    const bool managed;
    int n_used = 0;
    int n_asked = 0; // by the user; 0: the context has them
    int n_asked_batch = 0;
    uint64_t graph_seen = 0;
    bool graph_counts = false;
};

} // namespace superllama
