// One object per llama_context; the only thing that the patched call sites in upstream talk to.
#pragma once

#include "ggml-backend.h"
#include "llama.h"

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

struct llama_context;
struct llama_ubatch;
struct ggml_cgraph;
struct ggml_tensor;
struct llama_memory_context_i;
struct superllama_kv_pages;
struct superllama_kv_seq_pages;
struct superllama_seq_stats;
struct superllama_stats;

namespace superllama {

class kv_pager;

class context_hooks {
  public:
    // throws std::runtime_error with a message for the user
    context_hooks(llama_context & ctx, const superllama_context_params & params);
    ~context_hooks(); // writes the final metrics line

    static superllama_context_params default_context_params();

    void context_ready(); // throws where the memory budget leaves nothing for weights

    // Taken by everything that refers to places of layers or of their KV: while it lives, nothing moves.
    std::unique_lock<std::recursive_mutex> hold() const;

    // That, and graphs that are not computed refer to all cells of the KV cache.
    class all_cells {
      public:
        all_cells(std::unique_lock<std::recursive_mutex> placement, kv_pager * pager);
        all_cells(all_cells && other) noexcept;
        ~all_cells();

      private:
        std::unique_lock<std::recursive_mutex> placement;
        kv_pager * pager; // null: they always do
    };
    all_cells with_all_cells() const;

    // Around reserving: KV goes where its layer is; layers make room on devices for the compute buffers.
    all_cells begin_reserve();
    void before_reserve(const llama_memory_context_i * mctx);

    // Of a context that is complete: the buffers of logits, and of the CPU's kernels. For a plan.
    static uint64_t output_bytes(const llama_context & ctx);
    static uint64_t work_bytes(llama_context & ctx);
    static ggml_cgraph * largest_graph(llama_context & ctx); // that it was measured with; null: none

    // For a plan with devices. Whether ubatches are computed one behind the other on several, and to do so whatever the
    // placement says: it is decided once, and layers may leave a device after that.
    static bool is_pipelined(const llama_context & ctx);
    static void pipeline(llama_context & ctx);

    // What one token sends between devices, in a context that is full to its end.
    struct crossing {
        ggml_backend_dev_t from, to; // the host is the CPU's
        size_t bytes;
    };
    struct token_crossings {
        std::vector<crossing> copies;          // each a message to a device, or an answer of one
        std::vector<ggml_backend_dev_t> parts; // of the graph, in the order in which they are computed
    };
    static token_crossings crossings_of_token(llama_context & ctx);

    bool before_outputs(size_t bytes); // of the buffer of logits and embeddings; false: there is no memory for it

    bool before_ubatch(const llama_ubatch & ubatch); // false: superllama_last_error() says why
    void before_inputs(const ggml_cgraph * gf);      // its tensors have their places, and nothing is in them
    bool before_graph(ggml_cgraph * gf);             // false: the graph cannot run; superllama_last_error() says why
    bool after_graph(bool computed);                 // false: what the graph computed is not to be used
    ggml_status failure() const;                     // it was stopped, or failed
    void after_ubatch(const llama_ubatch & ubatch);
    bool after_outputs(); // false: they come from a device that is gone

    // The result of saving or loading a state, or nothing where it is damaged, or KV data could not be read or written.
    // Copies and shifts that wait for the next decode come first, so that they are in what is saved, and cannot change
    // what was loaded.
    template <typename F>
    auto write_state(const F & write) const {
        decltype(write()) result{};
        return on_state(nullptr, [&] { return (result = write()) != 0; }) ? result : decltype(write())();
    }
    template <typename F>
    auto read_state(llama_seq_id seq, const F & read, uint64_t bytes = UINT64_MAX) const { // -1: all; of unknown size
        decltype(read()) result{};
        return on_state(&seq, [&] { return (result = read()) != 0; }, bytes) ? result : decltype(read())();
    }

    // ggml_backend_tensor_copy(), also of KV cells whose page is on disk; `dst` is in host memory then.
    static void copy_tensor(const ggml_tensor * src, ggml_tensor * dst);

    void kv_pages(struct superllama_kv_pages & out) const;
    void kv_seq_pages(llama_seq_id seq, struct superllama_kv_seq_pages & out) const;
    int kv_prefetch(llama_seq_id seq);

    // What a server keeps beside this context counts; throws where there is no memory for it.
    void charge_prompt_cache(uint64_t bytes);

    std::vector<struct superllama_seq_stats> seq_stats() const;

    void stats(struct superllama_stats & out) const;
    std::string metrics_json() const;

  private:
    bool on_state(const llama_seq_id * read, const std::function<bool()> & work, uint64_t bytes = 0) const;
    bool prepare(const llama_ubatch & ubatch);
    void count(const llama_ubatch & ubatch);
    bool end_graph();
    std::vector<size_t> buffer_sizes() const;
    void count_compute_buffers();
    bool lost_device(std::string * error) const; // one that this context computes on is gone

    struct impl;
    std::unique_ptr<impl> pimpl;
};

using context_hooks_ptr = std::unique_ptr<context_hooks>;

uint64_t bytes_of_file(const char * path); // UINT64_MAX: it does not say

} // namespace superllama
