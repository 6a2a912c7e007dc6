// One graph whose KV pages are larger than the budget: they are in memory for one layer at a time. What fits beside
// that stays. Cold pages of a layer leave after the last node that touches it, while the next layer's are read.
#pragma once

#include "ggml.h"
#include "kv/pages.h"

#include <unordered_map>

namespace superllama {

class kv_layer_run {
  public:
    using page_id = page_table::page_id;

    // Of sorted lists; `ahead`: there are threads that read. Null with a text where not even that fits.
    static std::unique_ptr<kv_layer_run> create(page_table & pages, const std::vector<page_id> & needed,
                                                const std::vector<page_id> & writes, bool ahead, std::string * error);
    ~kv_layer_run(); // also of a graph that was cut short

    // layer_of: the tensors of the cache. False: error() says why.
    bool plan(ggml_cgraph * gf, const std::unordered_map<const ggml_tensor *, uint32_t> & layer_of);
    bool is_cut(const ggml_tensor * node) const; // after this node the callback must run
    bool advance();                              // past a cut; false = stop the graph
    const std::string & error() const { return failure; }

  private:
    struct step {
        uint32_t layer;
        const ggml_tensor * cut; // the last node that touches the layer's cache
    };

    kv_layer_run(page_table & pages, bool ahead) : pages(pages), ahead(ahead) {}
    bool split(const std::vector<page_id> & needed, const std::vector<page_id> & writes, uint64_t n_hot,
               std::string * error);
    bool prepare_layer();

    page_table & pages;
    bool ahead;                  // the memory of two layers: one computes, the next is read
    std::vector<page_id> cold;   // pages that are in memory for one layer at a time
    std::vector<page_id> writes; // those of them that the ubatch writes
    std::vector<step> steps;
    size_t i = 0;
    std::string failure;
};

} // namespace superllama
