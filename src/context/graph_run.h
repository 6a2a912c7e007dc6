// One graph of a context, from before it is computed until after: it takes the turn at the model's blocks, stops the
// graph where something has to happen, and owns what went wrong.
//
// Once a graph that is watched failed, nothing is computed any more; another one runs to its end, with maps that name
// experts which exist. Upstream ends only the split in which the callback says no and goes on
// with the next one, whose inputs nobody computed: its kernels would ask for experts that nobody reads, or for rows
// that do not exist.
#pragma once

#include "context/piecewise.h"
#include "devices/expert_banks.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

struct ggml_backend;
struct ggml_cgraph;
struct ggml_tensor;
struct llama_context;

namespace superllama {

class kv_pager;
class layer_sched;

class graph_run {
  public:
    // Any may be null: nothing to read there. `pager` only where KV pages come and go in the middle of the graph.
    graph_run(llama_context & ctx, layer_sched * weights, expert_banks * banks, kv_pager * pager);
    ~graph_run(); // ends what end() did not

    graph_run(const graph_run &) = delete;
    graph_run & operator=(const graph_run &) = delete;

    bool begin(ggml_cgraph * gf); // false: it cannot run, error() says why
    bool end();                   // false: what it computed is not to be used

    const std::string & error() const { return failure; }
    bool was_stopped() const { return stopped; } // by the user's abort callback, in a product of ours

  private:
    static bool on_node(ggml_tensor * node, bool ask, void * data);
    static bool on_copy(ggml_backend * to, const ggml_tensor * src, ggml_tensor * dst, ggml_cgraph * part, void * data);
    expert_banks::result copy_slots(ggml_backend * to, const ggml_tensor * src, ggml_tensor * dst, ggml_cgraph * part,
                                    std::string * error);
    bool stops_after(ggml_tensor * node);
    bool after_node(ggml_tensor * node);
    void skip(ggml_tensor * node);
    bool multiply_in_pieces(ggml_tensor * node, const std::vector<uint32_t> & pieces);
    void unhook();
    bool fail(const std::string & why);

    llama_context & ctx;
    layer_sched * weights;
    expert_banks * banks; // null also where none has slots
    kv_pager * pager;
    ggml_cgraph * graph = nullptr;
    bool watched = false;   // the scheduler calls on_node()
    bool hooked = false;    // it calls any of these
    bool turn = false;      // it is ours
    bool cut_short = false; // by the user's callback, or by an error: what comes is skipped
    bool stopped = false;
    bool user_asked = false; // the user's callback wants to see the node
    std::string failure;
    piecewise products;
    std::vector<std::pair<ggml_tensor *, int32_t>> skipped; // nodes, and their flags
};

} // namespace superllama
