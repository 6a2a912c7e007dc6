#include "model/dynamic_model.h"

#include "io/address_space.h"
#include "devices/upload.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"
#include "telemetry/pressure.h"
#include "io/weight_file.h"
#include "weights/sidecar.h"
#include "base/error.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <regex>
#include <stdexcept>
#include <system_error>

namespace superllama {

static const double MiB = 1024.0 * 1024.0;

// The least that works is rounded up: what a message names has to work as typed.
static double mib_up(uint64_t bytes) {
    return std::ceil((double) bytes / MiB);
}

// two reads of 4 MiB at once fill the drive that was measured; more of them wait for a processor that computes
static const int read_threads_default = 6;
static const size_t read_part_bytes = 4u << 20;
// how often to look at the memory that is left: half of it could be gone by the next time
static const double take_bytes_per_s = 4e9; // by another process
static const double sample_s_min = 0.01;
static const double sample_s_max = 0.25;
static const double grow_margin = 0.01;             // below the high mark, so that growing never triggers shrinking
static const uint64_t page_tables_free = 24u << 20; // with what a process takes besides its budget: those of 12 GiB

superllama_model_params dynamic_model::default_params() {
    superllama_model_params params = {};
    params.mem_pressure = 0.85f;
    params.mem_pressure_low = 0.70f;
    return params;
}

void dynamic_model::prepare(llama_model_params & params) {
    const superllama_model_params & p = params.superllama;
    if (!p.dynamic_layers || params.no_alloc || params.vocab_only) {
        return;
    }
    if (!weight_file::supported()) {
        throw std::runtime_error("--dynamic-layers is not supported on this system yet; it needs Linux");
    }
    if (!(p.mem_pressure > 0.0f && p.mem_pressure <= 1.0f && p.mem_pressure_low >= 0.0f &&
          p.mem_pressure_low < p.mem_pressure)) {
        throw std::runtime_error(format("--mem-pressure %.3f and --mem-pressure-low %.3f: both lie in 0..1 and low is "
                                        "below high",
                                        p.mem_pressure, p.mem_pressure_low));
    }
    if (params.load_mode != LLAMA_LOAD_MODE_AUTO && params.load_mode != LLAMA_LOAD_MODE_NONE) {
        LLAMA_LOG_WARN("%s: --dynamic-layers reads the weights itself, --load-mode is ignored\n", __func__);
    }
    params.load_mode = LLAMA_LOAD_MODE_NONE;
    if (params.split_mode == LLAMA_SPLIT_MODE_ROW || params.split_mode == LLAMA_SPLIT_MODE_TENSOR) {
        LLAMA_LOG_WARN("%s: --dynamic-layers moves whole layers, --split-mode is layer\n", __func__);
        params.split_mode = LLAMA_SPLIT_MODE_LAYER;
    }
    for (const auto * o = params.tensor_buft_overrides; o != nullptr && o->pattern != nullptr; ++o) {
        if (!ggml_backend_buft_is_host(o->buft)) {
            throw std::runtime_error(
                format("--override-tensor %s=%s: with --dynamic-layers tensors can be pinned to the "
                       "host only (=CPU); what goes to devices follows from --vram-budget, "
                       "--gpu-layers and --tensor-split",
                       o->pattern, ggml_backend_buft_name(o->buft)));
        }
    }
    params.no_host = true; // host memory is ours
}

// 0: no read-ahead.
static int n_readers_of(const superllama_model_params & params) {
    return !params.async_prefetch ? 0 : params.prefetch_threads > 0 ? params.prefetch_threads : read_threads_default;
}

dynamic_model::dynamic_model(llama_model & model, const llama_model_params & params, const llama_model_loader & ml) :
    model(model),
    loader(&ml),
    params(params.superllama),
    n_gpu_layers(params.n_gpu_layers),
    progress(params.progress_callback),
    progress_data(params.progress_callback_user_data),
    store(n_readers_of(params.superllama)) {
    for (const auto & file : ml.files) {
        store.add_file(file->file_id());
    }
    for (const auto * o = params.tensor_buft_overrides; o != nullptr && o->pattern != nullptr; ++o) {
        host_patterns.push_back(o->pattern);
    }
    const auto memory = telemetry.sample();
    budget_max = this->params.mem_budget_bytes > 0 ? this->params.mem_budget_bytes : memory.host_total;
    budget_now = this->params.mem_budget_bytes > 0
                     ? this->params.mem_budget_bytes
                     : (uint64_t) ((double) memory.host_available * this->params.mem_pressure);
}

std::unique_ptr<dynamic_model> dynamic_model::create(llama_model & model, const llama_model_params & params,
                                                     const llama_model_loader & ml) {
    if (!params.superllama.dynamic_layers || ml.no_alloc || ml.files.empty()) {
        return nullptr;
    }
    return std::unique_ptr<dynamic_model>(new dynamic_model(model, params, ml));
}

dynamic_model::~dynamic_model() {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        stopping = true;
    }
    stopped.notify_all();
    if (watcher.joinable()) {
        watcher.join();
    }
}

// ------------------------------------------------------------------------------------------------ loading

ggml_backend_buffer_t dynamic_model::alloc(ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    const auto source = [this](const ggml_tensor * t) -> weight_source {
        const auto * weight = loader->get_weight(ggml_get_name(t));
        if (weight == nullptr) {
            throw std::runtime_error(format("tensor '%s' is not in the model file", ggml_get_name(t)));
        }
        return { weight->idx, weight->offs };
    };
    // the token embedding is looked up by rows, unless it serves as output matrix too
    const auto by_row = [this](const ggml_tensor * t) { return t == model.tok_embd && t != model.output; };
    return store.alloc(ctx, buft, source, by_row);
}

size_t dynamic_model::fixed_bytes() const {
    return store.resident_bytes() + store.row_bytes_max() + store.staging_bytes();
}

size_t dynamic_model::converted_bytes() const {
    size_t bytes = 0;
    for (uint32_t id = 0; id < store.blocks().size(); ++id) {
        bytes += store.converts(id) ? store.blocks()[id].bytes : 0;
    }
    return bytes;
}

bool dynamic_model::load() {
    layer_sched::config cfg = {};
    cfg.policy = params.layer_policy;
    cfg.n_threads = n_readers_of(params);
    cfg.part_bytes = read_part_bytes;
    cfg.n_expert_used = (int) model.hparams.n_expert_used_max();
    scheduler = std::make_unique<layer_sched>(store, cfg);

    if (params.plan_only) {
        loader = nullptr;
        return true;
    }

    // what is on devices needs no room on the host; can the rest work at all?
    std::string error;
    create_tier();
    charge_weights();
    if (devices && !devices->place(&error)) {
        throw std::runtime_error(error);
    }
    const weights_budget least = scheduler->plan(0, 1);
    if (budget_now < least_bytes()) {
        throw std::runtime_error(format(
            "--mem-budget: %.0f MiB are too few for this model: %.0f MiB are always resident and %.0f MiB are "
            "needed for the blocks in use; the least that works is %.0f MiB plus the KV cache and compute buffers",
            budget_now / MiB, taken_bytes() / MiB, least.min_bytes / MiB, mib_up(least_bytes())));
    }
    store.reserve_ring();
    if (!store.load_resident(&error)) {
        throw std::runtime_error(error);
    }

    if (converted_bytes() > 0) {
        const bool streams = budget_now < with_page_tables(fixed_bytes() + least.dense_bytes + least.expert_bytes);
        std::string key = model.arch_name();
        for (const auto & file : loader->files) {
            key += "/" + std::to_string(file->size());
        }
        for (const auto & entry : loader->weights_map) {
            key += "/" + entry.first + ":" + std::to_string(entry.second.offs);
        }
        key += "/" + store.content_key();
        weight_sidecar_info info;
        bool cancelled = false;
        const auto report = [&](float done) {
            cancelled = progress != nullptr && !progress(done * 0.99f, progress_data);
            return !cancelled;
        };
        if (weight_sidecar_attach(store, key, streams, report, &info, &error)) {
            LLAMA_LOG_INFO("%s: repacked weights %s %s (%.0f MiB; `superllama cache prune` removes it)\n", __func__,
                           info.written ? "written to" : "taken from", info.path.c_str(), info.bytes / MiB);
        } else if (cancelled) {
            return false;
        } else if (streams) {
            LLAMA_LOG_WARN("%s: no file of repacked weights (%s): blocks are repacked whenever they are loaded, which "
                           "costs processor time; --no-repack avoids it\n",
                           __func__, error.c_str());
        }
    }
    loader = nullptr;
    apply();
    try {
        watcher = std::thread([this] { watch(); });
    } catch (const std::system_error & e) {
        LLAMA_LOG_WARN("%s: memory pressure is not watched: no thread (%s)\n", __func__, e.what());
    }
    LLAMA_LOG_INFO(
        "%s: dynamic layers: budget %.0f MiB, %.0f MiB always resident, %.0f MiB in %zu blocks, %d readers\n", __func__,
        budget_now / MiB, taken_bytes() / MiB, (least.dense_bytes + least.expert_bytes) / MiB, store.blocks().size(),
        cfg.n_threads);
    return progress == nullptr || progress(1.0f, progress_data);
}

bool dynamic_model::refuses(const llama_model & model, const char * call) {
    if (model.superllama == nullptr) {
        return false;
    }
    set_error(format("%s: not with dynamic layers, whose weights are not all in memory; load the model "
                     "without them",
                     call));
    LLAMA_LOG_ERROR("%s\n", error_text());
    return true;
}

// ------------------------------------------------------------------------------------------------- devices

// How many layers a static load with the same flags would put on each device: layers, as upstream counts them.
static std::vector<int32_t> split_layers(const llama_model & model, int32_t n_layers) {
    const float * split = model.tensor_split();
    const size_t n = model.n_devices();
    std::vector<float> ends(n);
    float sum = 0;
    for (size_t d = 0; d < n; ++d) {
        sum += split != nullptr ? split[d] : 0.0f;
        ends[d] = sum;
    }
    if (sum == 0) {
        return std::vector<int32_t>(n, n_layers);
    }
    std::vector<int32_t> layers(n);
    for (int32_t i = 0; i < n_layers; ++i) {
        const auto end = std::upper_bound(ends.begin(), ends.end(), (float) i / (float) n_layers,
                                          [sum](float at, float end) { return at < end / sum; });
        layers[(size_t) (end - ends.begin())]++;
    }
    return layers;
}

void dynamic_model::create_tier() {
    const int32_t n_all = (int32_t) model.hparams.n_layer_all + 1; // the output counts as one
    const int32_t n_max = n_gpu_layers < 0 ? n_all : std::min(n_gpu_layers, n_all);
    if (model.devices.empty() || n_max == 0) {
        return;
    }
    device_tier::config cfg;
    cfg.n_layers_max = n_max;
    cfg.n_layers = split_layers(model, n_max);
    for (size_t d = 0; d < model.devices.size(); ++d) {
        cfg.devices.push_back(model.devices[d].dev);
        const size_t last = SUPERLLAMA_MAX_DEVICES - 1; // holds for all that follow
        cfg.budgets.push_back(params.vram_budget_bytes[std::min(d, last)]);
    }
    cfg.n_layers_all = n_all;
    cfg.pinned = [this](const ggml_tensor * t) {
        return std::any_of(host_patterns.begin(), host_patterns.end(), [t](const std::string & pattern) {
            return std::regex_search(t->name, std::regex(pattern));
        });
    };
    cfg.mem_pressure = params.mem_pressure;
    cfg.mem_pressure_low = params.mem_pressure_low;
    cfg.async = params.async_prefetch;
    cfg.output = &model.output;
    cfg.tok_embd = model.tok_embd;
    cfg.layer_moves = [this](int32_t layer, bool on_device, bool force, std::string * error) {
        const std::lock_guard<std::mutex> lock(mutex);
        scheduler->layer_moved(layer);
        if (!on_device && params.mem_budget_bytes > 0 && budget_now < least_bytes()) {
            *error = format("with it the host needs %.0f MiB at least, --mem-budget is %.0f MiB; raise it, or lower "
                            "--ctx-size or --ubatch-size",
                            mib_up(least_bytes()), budget_now / MiB);
            if (!force) {
                return false;
            }
            LLAMA_LOG_WARN("%s: layer %d: %s\n", __func__, layer, error->c_str());
        }
        apply();
        return true;
    };
    cfg.keep = [this](const ggml_tensor * t) -> std::vector<const uint8_t *> {
        if (!store.is_plain(t)) {
            return {};
        }
        return store.is_resident(t) ? std::vector<const uint8_t *>{ (const uint8_t *) t->data } : scheduler->keep(t);
    };
    devices = std::make_unique<device_tier>(store, cfg);
}

// ------------------------------------------------------------------------------------------------- budget

// 8 bytes for each page, of huge ones too.
static uint64_t page_tables(uint64_t bytes) {
    const uint64_t tables = bytes / system_page() * 8;
    return tables - std::min(tables, page_tables_free);
}

uint64_t dynamic_model::without_page_tables(uint64_t budget) {
    return budget - page_tables(budget);
}

uint64_t dynamic_model::with_page_tables(uint64_t bytes) {
    const uint64_t tables = page_tables(bytes);
    return tables == 0 ? bytes : bytes + tables + tables / 256 + 64; // they have page tables themselves
}

void dynamic_model::charge_weights() {
    resident.set(store.resident_bytes());
    rows.set(store.row_bytes_now(), store.row_bytes_max(), store.row_bytes_max());
    staging.set(store.staging_bytes());
    uploads.set(devices ? device_upload_staging() : 0);
    kv_of_devices.set(devices ? devices->kv_host_bytes() : 0);
}

size_t dynamic_model::taken_bytes() const {
    return memory.granted();
}

size_t dynamic_model::least_bytes() const {
    return with_page_tables(memory.granted() + memory.lent() + scheduler->plan(0, n_ubatch_max()).min_bytes);
}

std::array<uint64_t, n_memory_tags> dynamic_model::memory_by_tag() const {
    std::array<uint64_t, n_memory_tags> bytes = {};
    for (size_t i = 0; i < n_memory_tags; ++i) {
        bytes[i] = memory.used((memory_tag) i);
    }
    const layer_sched::counters blocks = scheduler->count();
    bytes[(size_t) memory_tag::rows] = store.row_bytes_now();
    bytes[(size_t) memory_tag::pinned] = (uint64_t) blocks.bytes_pinned;
    bytes[(size_t) memory_tag::ring] = (uint64_t) blocks.bytes_ring;
    bytes[(size_t) memory_tag::experts] = (uint64_t) blocks.bytes_experts;
    bytes[(size_t) memory_tag::page_tables] = page_tables(std::accumulate(bytes.begin(), bytes.end(), (uint64_t) 0));
    return bytes;
}

int dynamic_model::n_ubatch_max() const {
    int n_ubatch = 1;
    for (const auto & entry : contexts) {
        n_ubatch = std::max(n_ubatch, entry.second);
    }
    return n_ubatch;
}

void dynamic_model::apply() {
    charge_weights();
    const uint64_t bytes = std::max<uint64_t>(budget_now, least_bytes());
    scheduler->set_budget(without_page_tables(bytes) - taken_bytes(), n_ubatch_max());
}

void dynamic_model::change_charges(const std::vector<change> & changes) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<change> before;
    for (const change & c : changes) {
        before.push_back({ c.of, c.of->granted(), c.of->promised() });
        c.of->set(c.granted, c.granted, c.promised);
    }
    charge_weights();
    const size_t need = least_bytes();
    if (budget_now < need) {
        const size_t in_use = scheduler->plan(0, n_ubatch_max()).min_bytes;
        const std::string why = format(
            "--mem-budget: %.0f MiB are too few: %.0f MiB of weights are always resident, %.0f MiB are needed for "
            "the blocks in use, %.0f MiB for KV cache and other buffers; the least that works is %.0f MiB "
            "(less with a smaller --ctx-size or --ubatch-size, or where fewer tokens want logits)",
            budget_now / MiB, fixed_bytes() / MiB, in_use / MiB,
            (memory.granted() + memory.lent() - fixed_bytes()) / MiB, mib_up(need));
        for (const change & c : before) {
            c.of->set(c.granted, c.granted, c.promised);
        }
        throw std::runtime_error(why);
    }
    apply();
}

void dynamic_model::grant(charge & of, uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    of.set(of.used(), std::min(bytes, of.promised()), of.promised());
    apply();
}

void dynamic_model::add_adapter(const void * adapter, const ggml_context * tensors, ggml_backend_buffer_type_t buft) {
    if (!ggml_backend_buft_is_host(buft)) {
        return;
    }
    uint64_t bytes = 0;
    for (ggml_tensor * t = ggml_get_first_tensor(tensors); t != nullptr; t = ggml_get_next_tensor(tensors, t)) {
        bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, t), ggml_backend_buft_get_alignment(buft));
    }
    charge * its = nullptr;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        for (auto it = adapters.begin(); it != adapters.end();) { // one whose load failed was never registered
            const bool gone = it->first != adapter && model.loras.count((llama_adapter_lora *) it->first) == 0;
            it = gone ? adapters.erase(it) : std::next(it);
        }
        its = &adapters.try_emplace(adapter, memory, memory_tag::adapters).first->second;
    }
    change_charges({ { its, its->granted() + bytes, its->granted() + bytes } });
}

void dynamic_model::remove_adapter(const void * adapter) {
    const std::lock_guard<std::mutex> lock(mutex);
    adapters.erase(adapter);
    apply();
}

void dynamic_model::add_context(const void * ctx, int n_ubatch) {
    const std::lock_guard<std::mutex> lock(mutex);
    contexts[ctx] = n_ubatch;
}

void dynamic_model::remove_context(const void * ctx) {
    const std::lock_guard<std::mutex> lock(mutex);
    contexts.erase(ctx);
    apply();
}

bool dynamic_model::serve(ggml_cgraph * gf, std::string * error) {
    const std::vector<const ggml_tensor *> whole = read_whole(store, gf);
    if (whole.empty()) {
        return true;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (const ggml_tensor * t : whole) {
        if (!store.is_by_row(t)) {
            continue; // read twice by this graph, or by another one meanwhile
        }
        const uint64_t need = least_bytes() + ggml_nbytes(t);
        if (budget_now < need && params.mem_budget_bytes > 0) {
            *error =
                format("--mem-budget: %.0f MiB are too few: the graph reads all of %s (%.0f MiB), not only rows of "
                       "it; the least that works is %.0f MiB",
                       budget_now / MiB, t->name, ggml_nbytes(t) / MiB, mib_up(need));
            return false;
        }
        scheduler->between_graphs([&] { store.hold_whole(t); });
        apply();
    }
    return store.load_resident(error);
}

bool dynamic_model::set_budget(uint64_t bytes, std::string * error) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto memory = telemetry.sample();
    const uint64_t need = least_bytes();
    if (bytes > 0 && bytes < need) {
        *error =
            format("a budget of %.0f MiB is too small, the least that works is %.0f MiB", bytes / MiB, mib_up(need));
        return false;
    }
    params.mem_budget_bytes = bytes;
    budget_max = bytes > 0 ? bytes : memory.host_total;
    budget_now =
        bytes > 0 ? bytes : std::max<uint64_t>(need, (uint64_t) (params.mem_pressure * (double) memory.host_available));
    apply();
    return true;
}

void dynamic_model::watch() {
    std::unique_lock<std::mutex> lock(mutex);
    double wait_s = 0;
    while (!stopped.wait_for(lock, std::chrono::duration<double>(wait_s), [this] { return stopping; })) {
        double available = 0;
        try {
            available = (double) follow_pressure();
        } catch (const std::exception & e) { // no memory to look; there may be some the next time
            LLAMA_LOG_WARN("%s: %s\n", __func__, e.what());
        }
        wait_s = std::min(std::max(sample_s_min, 0.5 * available / take_bytes_per_s), sample_s_max);
    }
}

size_t dynamic_model::follow_pressure() {
    const auto memory = telemetry.sample();

    // an automatic budget follows all that this process may use; one that was asked for gives way only where the
    // machine itself runs short, for its own cgroup was the asker's to choose
    const bool automatic = params.mem_budget_bytes == 0;
    const double total = (double) (automatic ? memory.host_total : memory.machine_total);
    const double available = (double) (automatic ? memory.host_available : memory.machine_available);
    const uint64_t budget = budget_now;
    if (total <= 0) {
        return SIZE_MAX;
    }
    // memory that the budget grants and that is not filled yet counts as used
    const auto counters = scheduler->count();
    const size_t filled = (size_t) counters.bytes_resident + taken_bytes() - fixed_bytes();
    const double unfilled = (double) (budget - std::min<uint64_t>(budget, filled));
    const double wanted = std::min(unfilled, (double) scheduler->block_bytes());
    const pressure_marks marks = { params.mem_pressure, params.mem_pressure_low, grow_margin };
    const double change = marks.change(total, available - wanted);
    const uint64_t target = (uint64_t) std::min(std::max(0.0, (double) budget + change), (double) budget_max);
    const uint64_t differ = target > budget ? target - budget : budget - target;
    if (differ >= (8u << 20)) {
        budget_now = target;
        apply();
    }
    return (size_t) available;
}

} // namespace superllama
