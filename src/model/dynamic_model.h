// One object per llama_model with --dynamic-layers: the memory of its weights, shared by its contexts.
#pragma once

#include "base/ledger.h"
#include "devices/tier.h"
#include "weights/scheduler.h"
#include "telemetry/memory.h"
#include "weights/store.h"
#include "llama.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

struct llama_model;
struct llama_model_loader;
struct superllama_expert;

namespace superllama {

class dynamic_model {
  public:
    ~dynamic_model();

    static superllama_model_params default_params();

    // Before the model's files are opened: what dynamic layers need of the other parameters. Throws on bad values.
    static void prepare(llama_model_params & params);

    // Null where the feature is off or nothing is to be allocated. Throws.
    static std::unique_ptr<dynamic_model> create(llama_model & model, const llama_model_params & params,
                                                 const llama_model_loader & ml);

    // Called while the model loads. alloc() returns null for buffers that are not ours to manage.
    ggml_backend_buffer_t alloc(ggml_context * ctx, ggml_backend_buffer_type_t buft);
    bool owns(const ggml_context * ctx) const { return store.owns(ctx); }
    bool load(); // false: cancelled by the progress callback; throws on errors

    // For calls that need every weight in memory, to save a model or to train it: true where its layers are dynamic,
    // logged and with superllama_last_error().
    static bool refuses(const llama_model & model, const char * call);

    // What contexts have of the budget: KV, buffers, adapters. All changes of one call are made, or none: throws
    // std::runtime_error where what they leave is less than the weights need.
    struct change {
        charge * of;
        uint64_t granted;  // may be used at once
        uint64_t promised; // may be asked for; until then it is lent to weights
    };
    void change_charges(const std::vector<change> & changes);
    void grant(charge & of, uint64_t bytes); // within what it was promised: weights make room, or get it back
    void add_context(const void * ctx, int n_ubatch);
    void remove_context(const void * ctx); // its charges are gone; for destructors, as remove_adapter(): nothing throws
    ledger & accounts() { return memory; }
    // What a server may keep beside its slots, which has so much now: what is left where all weights are in memory, or
    // an eighth of the budget, for which weights stream. Without it a prompt is read again, in passes over the weights.
    uint64_t prompt_cache_max(uint64_t now) const;

    // A LoRA's buffers, before they are allocated; throws where there is no memory for them.
    void add_adapter(const void * adapter, const ggml_context * tensors, ggml_backend_buffer_type_t buft);
    void remove_adapter(const void * adapter);

    std::array<uint64_t, n_memory_tags> memory_by_tag() const; // what is in memory now

    // A graph that will run, or one of the same file: how many blocks it uses at once.
    void expect(ggml_cgraph * gf) { scheduler->expect(uses_of(store, gf)); }

    // Before a graph that was not seen yet: what it reads of the weights can be read so. False with an error text.
    // A graph that will run may read as a whole what is there only in part; so may those of a draft model, which have
    // the embedding and the output matrix of this one.
    bool serve(ggml_cgraph * gf, std::string * error);
    bool lend_embeddings(std::string * error);

    // While running; see superllama_set_budgets(). Throws std::runtime_error.
    void set_budgets(const uint64_t * mem, const uint64_t * vram);
    void budgets(uint64_t * mem, uint64_t * vram) const;
    void budget_range(uint64_t * least, uint64_t * full) const;

    // Page tables of memory lie in the budget too. What of one is left for the rest, and the one that this needs.
    static uint64_t without_page_tables(uint64_t budget);
    static uint64_t with_page_tables(uint64_t bytes);

    // For a plan before a load.
    size_t fixed_bytes() const;     // in memory whatever the budget
    size_t converted_bytes() const; // of blocks that need a repacked copy on disk to stream
    size_t n_blocks() const { return store.blocks().size(); }
    weights_budget plan(size_t bytes, int n_ubatch) const { return scheduler->plan(bytes, n_ubatch); }
    device_tier & paper_tier();                       // of the devices that it was loaded with, which have no memory
    void place_on_paper(const std::vector<int> & to); // the device of each layer: fixed_bytes() and plan() follow
    size_t n_experts_of(const ggml_tensor * t) const { return (size_t) std::max(0, store.n_experts(t)); }

    layer_sched & sched() { return *scheduler; }
    device_tier * tier() { return devices.get(); } // null: no device to use
    expert_banks * banks() const { return devices ? devices->experts() : nullptr; }
    ggml_backend_dev_t device_of(int il) const { return devices ? devices->device_of(il) : nullptr; }
    std::vector<struct superllama_expert> experts() const; // layer by layer
    int n_device_layers() const { return devices ? devices->n_device_layers() : 0; }
    uint64_t budget_bytes() const { return budget_now; }

  private:
    dynamic_model(llama_model & model, const llama_model_params & params, const llama_model_loader & ml);

    // 0 = automatic. Throw where it cannot work.
    void set_mem_budget(uint64_t bytes);
    void set_vram_budget(const uint64_t * bytes);

    void create_tier();
    std::vector<expert_banks::layer_weights> experts_of_layers() const;
    bool hold_whole(const std::vector<const ggml_tensor *> & tensors, const char * who, std::string * error);

    void charge_weights();      // those that are no blocks, at the present placement
    size_t taken_bytes() const; // of the budget: all but blocks
    size_t least_bytes() const; // that works at the present placement
    size_t least_without_prompts() const;
    std::string of_projector() const;
    int n_ubatch_max() const; // of all contexts
    void apply();             // hands what is left to the scheduler
    size_t follow_pressure(); // sets the budget after the memory that is there now; returns what is available
    void watch();             // does so again and again, until the end

    llama_model & model;
    const llama_model_loader * loader; // while loading only
    superllama_model_params params;
    int32_t n_gpu_layers;
    std::vector<std::string> host_patterns; // of names of tensors that the user pinned to the host
    llama_progress_callback progress;
    void * progress_data;

    weight_store store;
    std::unique_ptr<layer_sched> scheduler;
    std::unique_ptr<device_tier> devices;
    memory_telemetry telemetry;

    mutable std::mutex budgets_mutex; // one change of budgets at a time; taken first
    mutable std::mutex mutex;
    ledger memory;
    charge resident{ memory, memory_tag::resident };
    charge rows{ memory, memory_tag::rows };
    charge vocabulary{ memory, memory_tag::vocabulary };
    charge staging{ memory, memory_tag::staging };
    charge projector{ memory, memory_tag::projector }; // which somebody else loads
    charge uploads{ memory, memory_tag::uploads };
    charge kv_of_devices{ memory, memory_tag::kv }; // of layers that could be on a device, and are on the host
    std::map<const void *, int> contexts;           // and their n_ubatch
    std::map<const void *, charge> adapters;
    uint64_t budget_max = 0; // as asked for; automatic: all there is
    std::atomic<uint64_t> budget_now{ 0 };
    bool has_unread = false; // a resident tensor that could not be read yet

    // other processes take memory at any time, in the middle of a graph too
    std::thread watcher;
    std::condition_variable stopped;
    bool stopping = false;
};

using dynamic_model_ptr = std::unique_ptr<dynamic_model>;

} // namespace superllama
