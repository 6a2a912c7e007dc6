#include "model/dynamic_model.h"

#include "model/mebibytes.h"
#include "model/vocabulary.h"
#include "devices/link.h"
#include "devices/lost.h"
#include "devices/speeds.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"
#include "io/weight_file.h"
#include "weights/sidecar.h"
#include "base/error.h"

#include <algorithm>
#include <regex>
#include <stdexcept>
#include <system_error>

namespace superllama {

// two reads of 4 MiB at once fill the drive that was measured; more of them wait for a processor that computes
static const int read_threads_default = 6;
static const size_t read_part_bytes = 4u << 20;
static const size_t speed_bytes_max = 256u << 20; // of memory that is read to see how fast it is: more than caches hold
static const size_t upload_bytes_max = 16u << 20; // that are sent to a device to see how fast that is
static const size_t output_bytes_min = 32u << 20; // of an output matrix that is not always resident

superllama_model_params dynamic_model::default_params() {
    superllama_model_params params = {};
    params.mem_pressure = 0.85f;
    params.mem_pressure_low = 0.70f;
    return params;
}

void dynamic_model::prepare(llama_model_params & params) {
    set_error(""); // what failed before in this thread is no reason of this load
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
    survive_lost_devices();
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
    vocabulary.set(vocabulary_bytes(model.vocab));
    store.check_tensors(params.check_tensors);
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
    // where no layer can be on a device, and the output matrix is what else a small budget would be spent on
    const auto by_piece = [this](const ggml_tensor * t) {
        const bool is = t == model.output && model.devices.empty() && ggml_nbytes(t) >= output_bytes_min;
        return is && ggml_n_dims(t) == 2 ? (int32_t) model.hparams.n_layer() : -1;
    };
    // the token embedding is looked up by rows, unless it is an output matrix that is needed whole
    const auto by_row = [&](const ggml_tensor * t) {
        return t == model.tok_embd && (t != model.output || by_piece(t) >= 0);
    };
    return store.alloc(ctx, buft, source, by_row, by_piece);
}

size_t dynamic_model::fixed_bytes() const {
    return vocabulary.used() + store.resident_bytes() + store.row_bytes_max() + store.staging_bytes();
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
    cfg.send = [this](ggml_tensor * to, const uint8_t * data, size_t bytes) { devices->send(to, data, bytes); };
    cfg.ahead = [this](const ggml_tensor * to) { return devices ? devices->ahead(to) : sent_ahead::device(); };
    cfg.on_device.has = [this](const ggml_tensor * weights, int32_t expert) {
        return banks() != nullptr && banks()->holds(weights, expert);
    };
    cfg.on_device.copy = [this](ggml_backend_t backend, const ggml_tensor * weights, int32_t expert, ggml_tensor * to) {
        banks()->copy_to(backend, weights, expert, to);
    };
    cfg.on_device.keep = [this](const ggml_tensor * weights, const ggml_tensor * from,
                                const std::vector<int32_t> & most_chosen, bool may_leave) {
        if (banks() != nullptr) {
            banks()->keep(weights, from, most_chosen, may_leave);
        }
    };
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
            "--mem-budget: %.0f MiB are too few for this model: %.0f MiB are always resident%s and %.0f MiB are "
            "needed for the blocks in use; the least that works is %.0f MiB plus the KV cache and compute buffers",
            budget_now / MiB, taken_bytes() / MiB, of_projector().c_str(), least.min_bytes / MiB,
            mib_up(least_bytes())));
    }
    store.reserve_ring();
    if (!store.load_resident(&error)) {
        throw std::runtime_error(error);
    }

    if (converted_bytes() > 0) {
        const bool streams =
            budget_now < with_page_tables(fixed_bytes() + projector.used() + least.dense_bytes + least.expert_bytes);
        weight_sidecar_info info;
        bool cancelled = false;
        const auto report = [&](float done) {
            cancelled = progress != nullptr && !progress(done * 0.99f, progress_data);
            return !cancelled;
        };
        if (weight_sidecar_attach(store, streams, report, &info, &error)) {
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

// All that upstream's graphs of a cache of experts know.
std::vector<expert_banks::layer_weights> dynamic_model::experts_of_layers() const {
    std::vector<expert_banks::layer_weights> found;
    for (size_t il = 0; il < model.layers.size(); ++il) {
        const llama_layer & l = model.layers[il];
        std::vector<ggml_tensor *> weights;
        for (ggml_tensor * t : { l.ffn_gate_up_exps, l.ffn_gate_exps, l.ffn_up_exps, l.ffn_down_exps }) {
            if (t != nullptr) {
                weights.push_back(t);
            }
        }
        const auto moves = [this](const ggml_tensor * t) { return store.n_experts(t) > 0 && store.is_plain(t); };
        if (!weights.empty() && std::all_of(weights.begin(), weights.end(), moves)) {
            found.push_back({ (int32_t) il, weights, l.ffn_gate_inp });
        }
    }
    return found;
}

void dynamic_model::create_tier() {
    const int32_t n_all = (int32_t) model.hparams.n_layer_all + 1; // the output counts as one
    const int32_t n_max = n_gpu_layers < 0 ? n_all : std::min(n_gpu_layers, n_all);
    if (model.devices.empty() || n_max == 0) {
        return;
    }
    device_tier::config cfg;
    cfg.experts = experts_of_layers();
    cfg.n_expert_used = (int32_t) model.hparams.n_expert_used_max();
    cfg.share_misses = params.expert_misses == SUPERLLAMA_EXPERT_MISSES_SHARE;
    cfg.n_layers_max = n_max;
    cfg.n_layers = split_layers(model, n_max);
    for (size_t d = 0; d < model.devices.size(); ++d) {
        cfg.devices.push_back(model.devices[d].dev);
        const size_t last = SUPERLLAMA_MAX_DEVICES - 1; // holds for all that follow
        cfg.budgets.push_back(params.vram_budget_bytes[std::min(d, last)]);
        const bool asks = !cfg.experts.empty() && device_tier::holds_experts(model.devices[d].dev);
        const uint64_t budget = cfg.budgets.back(); // 0: automatic; nothing is there yet
        const size_t there = budget > 0 ? std::min<uint64_t>(upload_bytes_max, budget) : upload_bytes_max;
        const size_t here = std::min<size_t>(speed_bytes_max, budget_now / 4);
        cfg.link_share.push_back(asks ? link_share(model.devices[d].dev, there, here) : 0);
        cfg.crossing_s.push_back(crossing_s(model.devices[d].dev, token_state_bytes(model)));
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
    if (banks() != nullptr) {
        for (ggml_backend_dev_t dev : cfg.devices) {
            if (ggml_backend_buffer_type_t host = ggml_backend_dev_host_buffer_type(dev)) {
                store.lock_experts(host);
                break;
            }
        }
    }
}

device_tier & dynamic_model::paper_tier() {
    if (devices == nullptr) {
        create_tier();
    }
    if (devices == nullptr) {
        throw std::runtime_error("with --gpu-layers 0 no layer goes to another machine");
    }
    return *devices;
}

void dynamic_model::place_on_paper(const std::vector<int> & to) {
    devices->place_on_paper(to);
    for (int32_t il = 0; il < (int32_t) to.size(); ++il) {
        scheduler->layer_on_paper(il);
    }
}

std::vector<struct superllama_expert> dynamic_model::experts() const {
    std::vector<struct superllama_expert> found;
    for (const layer_sched::expert & e : scheduler->experts_by_layer()) {
        const bool in_bank = banks() != nullptr && banks()->holds(e.weights, e.index);
        ggml_backend_dev_t device = e.elsewhere || in_bank ? device_of(e.layer) : nullptr;
        const auto tier = device != nullptr ? SUPERLLAMA_TIER_DEVICE
                          : e.resident      ? SUPERLLAMA_TIER_HOST
                                            : SUPERLLAMA_TIER_DISK;
        found.push_back({ e.layer, e.index, tier, device != nullptr ? ggml_backend_dev_name(device) : nullptr,
                          (int64_t) e.bytes, e.heat.uses, e.heat.misses, e.n_loads });
    }
    return found;
}

} // namespace superllama
