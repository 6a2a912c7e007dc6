// superllama: what it adds to the C API of llama.cpp.
//
// Parameters are members of llama_context_params (superllama-params.h); these functions read what happened.
// Functions that can fail return 0 on success and a negative value otherwise; superllama_last_error() then
// says what was wrong, why, and what to try. No C++ exception leaves them.
#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes, unless the name says otherwise; 0 = not known on this system.
struct superllama_memory {
    uint64_t host_total; // memory that this process may use: the machine's, or its cgroup's limit where that is tighter
    uint64_t host_available; // of it, what can be had without swapping
    uint64_t machine_total;
    uint64_t machine_available;
    uint64_t cgroup_limit; // the tightest limit over this process's cgroup and its parents, 0 = none
    uint64_t cgroup_used;  // of that cgroup, without its page cache
    uint64_t resident;     // of this process
    uint64_t resident_anon;
    uint64_t resident_file;
    uint64_t resident_peak;
    uint64_t locked_limit; // RLIMIT_MEMLOCK, UINT64_MAX = unlimited
    uint64_t swap_total;
    uint64_t swap_free;
    uint64_t read_bytes; // read from storage by this process, ever
    uint64_t faults_minor;
    uint64_t faults_major;
};

// Of n cores of the machine those that this process may keep busy, by its affinity and by the CPU quota of its cgroups:
// the number of threads to compute with. Then that quota, in CPUs; 0 = no limit.
LLAMA_API int32_t superllama_usable_cores(int32_t n);
LLAMA_API double superllama_cpu_quota(void);

// llama_sampler_init_grammar(), _apply() and _accept(), which may throw: where a grammar and a token contradict each
// other, and where a grammar goes on in too many ways at once. Null, or -1, with superllama_last_error().
LLAMA_API struct llama_sampler * superllama_sampler_init_grammar(const struct llama_vocab * vocab, const char * grammar,
                                                                 const char * root);
LLAMA_API int32_t superllama_sampler_apply(struct llama_sampler * smpl, llama_token_data_array * tokens);
LLAMA_API int32_t superllama_sampler_accept(struct llama_sampler * smpl, llama_token token);

// Whether a grammar in GBNF can be used, its rule `root` being the whole text. The reason of a failure says where in
// it, and what was expected there. Without a vocabulary, a token's name ("<token>") is an error.
LLAMA_API int32_t superllama_check_grammar(const struct llama_vocab * vocab, const char * grammar, const char * root);

#define SUPERLLAMA_N_MEMORY_TAGS 16

// What bytes of the budget are for: "resident", "rows", "pinned", "ring", ...; NULL for an i that no tag has.
LLAMA_API const char * superllama_memory_tag(int32_t i);

// Bytes in memory now, by tag, of a model with dynamic layers and its contexts; all 0 for others.
LLAMA_API int32_t superllama_memory_by_tag(const struct llama_model * model, int64_t out[SUPERLLAMA_N_MEMORY_TAGS]);

// States that a program keeps beside a context, as a server's prompt cache, count towards the budget of its model with
// this. They may have what is left where all weights are in memory, or an eighth of the budget. Fails where that is
// exceeded, or where weights cannot make so much room, and then changes nothing.
LLAMA_API int32_t superllama_charge_prompt_cache(struct llama_context * ctx, uint64_t bytes);

// What one context has done. Counters only grow; a field of a feature that is off is 0.
struct superllama_stats {
    int64_t timestamp_ms; // Unix time

    int64_t token; // tokens processed: prompt and generated
    int64_t prompt_tokens;
    int64_t generated_tokens;

    int64_t gpu_layers_active;
    int64_t cpu_layers_active;
    int64_t layers_evicted;
    int64_t layers_loaded;

    int64_t kv_pages_gpu;
    int64_t kv_pages_cpu;
    int64_t kv_pages_evicted;
    int64_t kv_pages_prefetched;

    int64_t vram_used_bytes;
    int64_t vram_total_bytes;
    int64_t ram_used_bytes;

    double gpu_memory_pressure; // 0..1, the fullest device
    double cpu_memory_pressure; // 0..1, of the memory that this process may use

    double tokens_per_sec;     // generated, since the metrics line before this one
    double avg_tokens_per_sec; // generated, over the time spent generating

    int64_t prefetch_pending;
    int64_t prefetch_completed;
    int64_t prefetch_failed;

    int64_t disk_layers_active;
    int64_t kv_pages_disk;
    int64_t weight_bytes_resident;
    int64_t weight_bytes_read;
    int64_t kv_bytes_read;
    int64_t kv_bytes_written;
    double stall_ms;
    int64_t expert_hits;
    int64_t expert_misses;
    int64_t mem_budget_bytes;
    int64_t mem_peak_bytes;

    int64_t metrics_dropped; // lines that a slow or full disk could not take

    int64_t vram_own_bytes;    // weights, KV and compute buffers of this model's contexts on devices
    int64_t vram_budget_bytes; // that they may have there now, over all devices
    double move_ms;            // spent moving layers to and from devices

    int64_t expert_guesses;      // experts read before the router had chosen them
    int64_t expert_guesses_used; // those of them that it chose

    int64_t memory_by_tag[SUPERLLAMA_N_MEMORY_TAGS]; // in memory now, of what lies in the budget

    int64_t threads;     // that computed the last graph on the host
    double core_wait_ms; // threads of this process were ready and had no core, together, while graphs were computed
    double throttled_ms; // its control groups held it back for their CPU quota

    int64_t expert_device_hits;   // experts that ubatches chose and that were on the device of their layer
    int64_t expert_device_misses; // and those that were not
    int64_t expert_host_computed; // of these, those that the host computed; the others were sent there first

    int64_t weight_bytes_ahead; // of the host, that devices had for large batches before it was their turn

    int64_t expert_device_guesses;      // experts sent to the device of their layer before they were chosen
    int64_t expert_device_guesses_used; // those of them that were chosen then
};

// The paged KV cache of a context. Counters only grow.
struct superllama_kv_pages {
    bool paged;       // false: the standard cache, `reason` says why
    char reason[256]; // also what part of the cache is not paged, "" = all of it is

    int64_t page_size;  // cells
    int64_t page_bytes; // memory that a page may hold, over all layers
    int64_t budget_bytes;
    int64_t resident_bytes;
    int64_t resident_peak_bytes;
    int64_t pages_cpu;  // with data in memory
    int64_t pages_disk; // with data on disk only

    int64_t evicted_clean; // on disk already
    int64_t evicted_dirty; // written first
    int64_t dropped;       // no sequence used them any more
    int64_t restored;
    int64_t prefetched;
    int64_t prefetched_used;
    int64_t prefetched_wasted; // evicted before their use

    int64_t ubatches_streamed; // that ran layer by layer, their sequences being larger than the budget
    int64_t bytes_read;
    int64_t bytes_written;
    double stall_ms; // waiting for the disk
};

struct superllama_kv_seq_pages {
    int64_t tokens;
    int64_t pages_cpu;
    int64_t pages_disk;
    int64_t resident_bytes; // of its pages, which others may use as well
};

// What one sequence has computed and holds. Tokens only grow, whatever is removed of it; those of all sequences are
// the context's.
struct superllama_seq_stats {
    int64_t prompt_tokens; // a token of several sequences counts for the lowest of them
    int64_t generated_tokens;
    int64_t kv_tokens;     // its length: the last position that it holds, and 1
    int64_t kv_pages_cpu;  // of the paged cache, with data in memory; a page of several sequences counts for each
    int64_t kv_pages_disk; // with data on disk only
    int64_t kv_bytes;      // of them in memory; of an unpaged cache too where cells take it when they are used, else 0
};

// What the model and its contexts have on one device. Counters only grow.
struct superllama_device {
    const char * name; // lives as long as the process
    int64_t bytes;     // weights, KV and compute buffers, now
    int64_t budget_bytes;
    int64_t bytes_up;   // weights and KV that moved to it
    int64_t bytes_down; // KV that moved from it; weights are in the file
};

LLAMA_API const char * superllama_version(void);        // "0.1.0"
LLAMA_API const char * superllama_upstream_build(void); // the pin of llama.cpp, such as b11549

// The reason of the last failure in this thread. "" if there was none since the last call that begins without one: a
// function of this header that can fail, a load of a model, a decode. So it is never an older one of these.
LLAMA_API const char * superllama_last_error(void);

// "8GiB", "512MiB", "60%" of what this process may use, plain bytes; "auto" is 0.
LLAMA_API int32_t superllama_size(const char * text, uint64_t * bytes);

LLAMA_API int32_t superllama_memory(struct superllama_memory * out);
LLAMA_API int32_t superllama_stats(const struct llama_context * ctx, struct superllama_stats * out);

LLAMA_API int32_t superllama_kv_pages(const struct llama_context * ctx, struct superllama_kv_pages * out);
LLAMA_API int32_t superllama_kv_seq_pages(const struct llama_context * ctx, llama_seq_id seq,
                                          struct superllama_kv_seq_pages * out);

// Fills up to n_max entries, by the sequence's number, and returns how many sequences the context can have. To be
// called like llama_decode: not from two threads.
LLAMA_API int32_t superllama_seq_stats(const struct llama_context * ctx, struct superllama_seq_stats * out,
                                       int32_t n_max);

// Restores pages of a sequence that is about to run, as many as the budget takes; with async_prefetch in
// worker threads. Returns the number of pages asked for. To be called like llama_decode: not from two threads.
LLAMA_API int32_t superllama_kv_prefetch(struct llama_context * ctx, llama_seq_id seq);

// The metrics line as it would be written now, event "periodic"; the length of a sequence is that after its last
// ubatch, its pages and bytes are those of some moment shortly before. Returns the line's length without the final 0;
// if that is >= size, nothing was written. tokens_per_sec is since the last line or call.
LLAMA_API int32_t superllama_metrics_json(const struct llama_context * ctx, char * buf, size_t size);

// What would live where under a budget, and what each token would read. Bytes.
struct superllama_plan {
    uint64_t mem_budget_bytes;
    uint64_t mem_least_bytes; // the smallest budget that works with this context
    uint64_t mem_full_bytes;  // the smallest budget that holds everything

    uint64_t kv_bytes;
    uint64_t compute_bytes;     // buffers of graphs, of kernels, of logits
    uint64_t fixed_bytes;       // weights that are always resident
    uint64_t dense_bytes;       // weights in blocks that every token needs
    uint64_t expert_bytes;      // weights of experts
    uint64_t pinned_bytes;      // of dense_bytes, resident
    uint64_t ring_bytes;        // for streamed blocks in use and on their way
    uint64_t expert_pool_bytes; // for experts
    uint64_t streamed_bytes;    // of dense_bytes, read for every pass over the weights

    uint64_t expert_used_bytes; // experts that one token asks for
    uint64_t repacked_bytes;    // size of the file of repacked blocks, 0 = not needed

    int32_t n_layers;
    int32_t n_blocks;
    int32_t n_experts;
    int32_t n_experts_used;
    int32_t n_ubatch; // a prompt streams the weights once per ubatch

    uint64_t projector_bytes; // as mparams.superllama says

    bool works; // the budget is at least mem_least_bytes; else the bytes of what would be resident are 0
};

// Fills out[i] for budgets[i]; reads the model's metadata, not its weights. mparams.superllama gives the policy.
LLAMA_API int32_t superllama_plan(const char * path, struct llama_model_params mparams,
                                  struct llama_context_params cparams, const uint64_t * budgets, int32_t n_budgets,
                                  struct superllama_plan * out);

// The same for a model whose layers may be on other machines, which lend their memory over RPC. Sizes are those of
// servers that compute with a processor.
struct superllama_plan_node {
    uint64_t free_bytes;   // of the device's memory, before the model is loaded
    uint64_t budget_bytes; // as --vram-budget; 0 = automatic, of what is free
    double round_trip_s;   // of the smallest message to it, and the answer
    double bytes_per_s;    // of the network between
};

struct superllama_node_share {
    uint64_t budget_bytes;  // of the device
    uint64_t weight_bytes;  // there, always resident
    uint64_t kv_bytes;      // of its layers
    uint64_t compute_bytes; // compute buffers there; without layers, those that left no room for one

    uint64_t load_bytes;        // sent to it until a context is there: also layers that then leave for its buffers
    uint64_t load_hashed_bytes; // both ways, if it has the file (--model-dir)
    int64_t n_load_asks;        // then: questions that wait for an answer

    // One token, in a context that is full to its end.
    uint64_t sent_bytes;     // to it
    uint64_t received_bytes; // from it
    int64_t n_waits;         // answers that the token waits for, each a round trip

    int32_t n_layers;
};

struct superllama_plan_layer {
    uint64_t weight_bytes; // as they would be on a device
    uint64_t token_bytes;  // of them, what one token uses: experts as if every one were as likely
    uint64_t kv_bytes;
    int32_t node; // -1 = the host
};

// For each of n_cases: nodes[case][n_nodes] and mem_budgets[case] of the host. Fills host[case], shares[case][n_nodes]
// and layers[case][n_layers_max], the output matrix the last; returns how many layers there are. `plan` of the host
// has its own layers only.
LLAMA_API int32_t superllama_plan_nodes(const char * path, struct llama_model_params mparams,
                                        struct llama_context_params cparams, const struct superllama_plan_node * nodes,
                                        int32_t n_nodes, const uint64_t * mem_budgets, int32_t n_cases,
                                        struct superllama_plan * host, struct superllama_node_share * shares,
                                        struct superllama_plan_layer * layers, int32_t n_layers_max);

// How fast this CPU multiplies weights of a type with one token's vector: bytes of weights per second, 0 on failure.
LLAMA_API double superllama_measure_cpu(enum ggml_type type, bool repack, int32_t n_threads);

// Where a layer of a model with dynamic layers is.
enum superllama_tier {
    SUPERLLAMA_TIER_HOST = 0, // all of it in memory
    SUPERLLAMA_TIER_DISK =
        1, // some of it is read for every pass over the weights, or for every expert that is asked for
    SUPERLLAMA_TIER_DEVICE = 2, // in the memory of a device
};

struct superllama_layer {
    int32_t index;
    enum superllama_tier tier;
    int64_t bytes;          // of its streamable weights; on a device, of all that lies there
    int64_t bytes_resident; // of them, in memory now
    int64_t last_use;       // number of the ubatch on the host, 0 = never
    int64_t n_loads;        // of its blocks
    int64_t n_evictions;
    const char * device;        // name of the device that it is on, NULL = host; lives as long as the process
    int64_t n_device_loads;     // moves to a device
    int64_t n_device_evictions; // moves back to the host
};

// Fills up to n_max entries and returns how many layers there are: 0 for a model without dynamic layers. Where
// layers can go to devices, or an output matrix is not always in memory, the last entry is the output matrix, which
// -ngl counts as a layer.
LLAMA_API int32_t superllama_layers(const struct llama_model * model, struct superllama_layer * out, int32_t n_max);

// One expert of one layer. Counters begin at 0 with the load; a warm-up, which computes with all experts, is left out.
// What a layer chooses while it is on a device is not counted: the host does not see it.
struct superllama_expert {
    int32_t layer;
    int32_t index;             // of the expert in its layer
    enum superllama_tier tier; // disk: not in memory now, and read when a router chooses it
    const char * device;       // that its layer is on, NULL = host; lives as long as the process
    int64_t bytes;
    int64_t uses;    // tokens that a router sent to it
    int64_t misses;  // ubatches that wanted it while it was not in memory
    int64_t n_loads; // that it was read, guesses included
};

// Fills up to n_max entries, layer by layer and in each by number, and returns how many experts of all layers there
// are: 0 for a model without experts, or without dynamic layers.
LLAMA_API int32_t superllama_experts(const struct llama_model * model, struct superllama_expert * out, int32_t n_max);

// Fills up to n_max entries, in the order of budgets, and returns how many devices layers can go to: 0 for a model
// without dynamic layers.
LLAMA_API int32_t superllama_devices(const struct llama_model * model, struct superllama_device * out, int32_t n_max);

// The budgets of a model with dynamic layers, of the host (from the next ubatch on) and of its devices, in their order
// (layers move before it returns; the last one holds for all that follow); 0 = automatic, NULL: stays as it is. A
// device budget in which nothing fits leaves no layer there. All that is given changes, or nothing: a budget that
// cannot work, devices that there are not, a layer that could not be moved. The error begins with "mem_budget: " or
// "vram_budget: ".
LLAMA_API int32_t superllama_set_budgets(struct llama_model * model, const uint64_t * mem_budget_bytes,
                                         const uint64_t * vram_budget_bytes);

// The least host budget that works now, and the one from which on more would gain nothing. They change with what
// contexts hold.
LLAMA_API int32_t superllama_budget_range(const struct llama_model * model, uint64_t * least, uint64_t * full);

// As they were given last, by the parameters of the load or the call above.
LLAMA_API int32_t superllama_budgets(const struct llama_model * model, uint64_t * mem_budget_bytes,
                                     uint64_t vram_budget_bytes[SUPERLLAMA_MAX_DEVICES]);

// "8GiB,512MiB": a size for each device, "auto" is 0; the last one holds for all devices that follow. "0" becomes 1
// byte, in which nothing fits.
LLAMA_API int32_t superllama_vram_budget(const char * text, uint64_t bytes[SUPERLLAMA_MAX_DEVICES]);

// The file with the secret that is shared with the RPC server at "host:port", or with all that have none of their own
// (null); it is read now. Without a path it is forgotten. Before the server is added.
LLAMA_API int32_t superllama_rpc_secret(const char * endpoint, const char * path);

// Makes the devices of an RPC server at "host:port" known, as --rpc does; returns how many it has. The server has to be
// there: upstream ends the process where it cannot connect. Adding it again changes nothing.
LLAMA_API int32_t superllama_add_rpc_server(const char * endpoint);

#ifdef __cplusplus
}
#endif
