// The budget of a model: what of it is taken, lent and left for blocks, by the ledger; and how it follows the memory
// that is there.

#include "base/error.h"
#include "io/address_space.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "model/dynamic_model.h"
#include "model/mebibytes.h"
#include "telemetry/pressure.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>

namespace superllama {

// how often to look at the memory that is left: half of it could be gone by the next time
static const double take_bytes_per_s = 4e9; // by another process
static const double sample_s_min = 0.01;
static const double sample_s_max = 0.25;
static const double grow_margin = 0.01;             // below the high mark, so that growing never triggers shrinking
static const uint64_t page_tables_free = 24u << 20; // with what a process takes besides its budget: those of 12 GiB

// ------------------------------------------------------------------------------------------------ the ledger

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
    projector.set(params.projector_bytes);
    uploads.set(devices ? devices->staging_bytes() : 0);
    kv_of_devices.set(devices ? devices->kv_host_bytes() : 0);
}

size_t dynamic_model::taken_bytes() const {
    return memory.granted();
}

size_t dynamic_model::least_bytes() const {
    return with_page_tables(memory.granted() + memory.lent() + scheduler->plan(0, n_ubatch_max()).min_bytes);
}

// A part of the sums in errors, or "".
std::string dynamic_model::of_projector() const {
    return projector.used() > 0 ? format(" (%.0f MiB of the projector)", projector.used() / MiB) : "";
}

// Without what a server keeps beside its slots: it goes where the budget has no room for it.
size_t dynamic_model::least_without_prompts() const {
    const uint64_t granted = memory.granted() - memory.used(memory_tag::prompt_cache);
    return with_page_tables(granted + memory.lent() + scheduler->plan(0, n_ubatch_max()).min_bytes);
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
    const uint64_t rest = without_page_tables(bytes) - taken_bytes();
    const weights_budget blocks = scheduler->plan(rest, n_ubatch_max());
    const bool keeps_rows = rest >= memory.lent() + blocks.full_bytes() + store.row_bytes_all();
    scheduler->set_budget(rest, n_ubatch_max(), keeps_rows);
}

void dynamic_model::change_charges(const std::vector<change> & changes) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<change> before;
    for (const change & c : changes) {
        before.push_back({ c.of, c.of->granted(), c.of->promised() });
        c.of->set(c.granted, c.granted, c.promised);
    }
    charge_weights();
    const size_t need = least_without_prompts();
    if (budget_now < need) {
        const size_t in_use = scheduler->plan(0, n_ubatch_max()).min_bytes;
        const std::string why =
            format("--mem-budget: %.0f MiB are too few: %.0f MiB are always resident, %.0f MiB are needed for "
                   "the blocks in use, %.0f MiB for KV cache and other buffers%s; the least that works is %.0f MiB "
                   "(less with a smaller --ctx-size or --ubatch-size, or where fewer tokens want logits)",
                   budget_now / MiB, fixed_bytes() / MiB, in_use / MiB,
                   (memory.granted() + memory.lent() - fixed_bytes()) / MiB, of_projector().c_str(), mib_up(need));
        for (const change & c : before) {
            c.of->set(c.granted, c.granted, c.promised);
        }
        throw std::runtime_error(why);
    }
    apply();
}

uint64_t dynamic_model::prompt_cache_max(uint64_t now) const {
    const std::lock_guard<std::mutex> lock(mutex);
    const weights_budget blocks = scheduler->plan(0, n_ubatch_max());
    const uint64_t rest = memory.granted() + memory.lent() - now + blocks.full_bytes();
    const auto left_of = [&](uint64_t bytes) { return budget_now - std::min<uint64_t>(budget_now, bytes); };
    return std::min<uint64_t>(std::max<uint64_t>(left_of(with_page_tables(rest)), budget_now / 8),
                              left_of(least_without_prompts()));
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
            const auto has = [&it](const llama_adapter_lora * l) { return l == it->first; };
            const bool gone = it->first != adapter && std::none_of(model.loras.begin(), model.loras.end(), has);
            it = gone ? adapters.erase(it) : std::next(it);
        }
        its = &adapters.try_emplace(adapter, memory, memory_tag::adapters).first->second;
    }
    change_charges({ { its, its->granted() + bytes, its->granted() + bytes } });
}

void dynamic_model::remove_adapter(const void * adapter) {
    const std::lock_guard<std::mutex> lock(mutex);
    adapters.erase(adapter);
    tried([this] { apply(); });
}

void dynamic_model::add_context(const void * ctx, int n_ubatch) {
    const std::lock_guard<std::mutex> lock(mutex);
    contexts[ctx] = n_ubatch;
}

void dynamic_model::remove_context(const void * ctx) {
    const std::lock_guard<std::mutex> lock(mutex);
    contexts.erase(ctx);
    tried([this] { apply(); });
}

bool dynamic_model::serve(ggml_cgraph * gf, std::string * error) {
    return hold_whole(read_whole(store, gf), "the graph reads", error);
}

bool dynamic_model::lend_embeddings(std::string * error) {
    return hold_whole({ model.tok_embd, model.output }, "a draft model reads", error);
}

// Of these only rows or pieces are there.
bool dynamic_model::hold_whole(const std::vector<const ggml_tensor *> & tensors, const char * who,
                               std::string * error) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const ggml_tensor * t : tensors) {
        if (!store.is_partial(t)) {
            continue; // read twice by this graph, or by another one meanwhile
        }
        const uint64_t need = least_bytes() + ggml_nbytes(t);
        if (budget_now < need && params.mem_budget_bytes > 0) {
            *error = format("--mem-budget: %.0f MiB are too few: %s all of %s (%.0f MiB), not only rows of it; the "
                            "least that works is %.0f MiB",
                            budget_now / MiB, who, t->name, ggml_nbytes(t) / MiB, mib_up(need));
            return false;
        }
        scheduler->hold_whole(t);
        apply();
        has_unread = true;
    }
    has_unread = has_unread && !store.load_resident(error); // and where that failed, the next graph tries again
    return !has_unread;
}

void dynamic_model::set_mem_budget(uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto memory = telemetry.sample();
    const uint64_t need = least_without_prompts();
    if (bytes > 0 && bytes < need) {
        throw std::runtime_error(
            format("mem_budget: a budget of %.0f MiB is too small, the least that works is %.0f MiB", bytes / MiB,
                   mib_up(need)));
    }
    params.mem_budget_bytes = bytes;
    budget_max = bytes > 0 ? bytes : memory.host_total;
    budget_now =
        bytes > 0 ? bytes : std::max<uint64_t>(need, (uint64_t) (params.mem_pressure * (double) memory.host_available));
    apply();
}

void dynamic_model::set_vram_budget(const uint64_t * bytes) {
    if (devices == nullptr) {
        throw std::runtime_error("vram_budget: there is no device to move layers to");
    }
    std::vector<uint64_t> asked(bytes, bytes + SUPERLLAMA_MAX_DEVICES);
    asked.resize(devices->n_devices(), asked.back()); // the last holds for all that follow
    devices->ask(asked);
    const auto placement = devices->hold();
    std::string error;
    if (!devices->apply_asked(&error)) {
        throw std::runtime_error("vram_budget: " + error);
    }
    std::copy_n(bytes, SUPERLLAMA_MAX_DEVICES, params.vram_budget_bytes);
}

void dynamic_model::budgets(uint64_t * mem, uint64_t * vram) const {
    const std::lock_guard<std::mutex> one_at_a_time(budgets_mutex);
    *mem = params.mem_budget_bytes;
    std::copy_n(params.vram_budget_bytes, SUPERLLAMA_MAX_DEVICES, vram);
}

void dynamic_model::budget_range(uint64_t * least, uint64_t * full) const {
    const std::lock_guard<std::mutex> lock(mutex);
    const weights_budget blocks = scheduler->plan(0, n_ubatch_max());
    *least = least_without_prompts();
    *full = with_page_tables(memory.granted() + memory.lent() + blocks.full_bytes());
}

void dynamic_model::set_budgets(const uint64_t * mem, const uint64_t * vram) {
    const std::lock_guard<std::mutex> one_at_a_time(budgets_mutex);
    const superllama_model_params before = params;
    const auto put_back = [&] { // what worked a moment ago works again, or a device was lost meanwhile
        if (vram != nullptr && devices != nullptr) {
            tried([&] { set_vram_budget(before.vram_budget_bytes); });
        }
        if (mem != nullptr) {
            tried([&] { set_mem_budget(before.mem_budget_bytes); });
        }
    };
    const auto change = [&](bool host_first) {
        try {
            if (mem != nullptr && host_first) {
                set_mem_budget(*mem);
            }
            if (vram != nullptr) {
                set_vram_budget(vram);
            }
            if (mem != nullptr && !host_first) {
                set_mem_budget(*mem);
            }
        } catch (...) {
            put_back();
            throw;
        }
    };
    try {
        change(true);
    } catch (const std::exception &) {
        if (mem == nullptr || vram == nullptr) {
            throw;
        }
        change(false); // a host that is to have less may need the devices to take their layers first
    }
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
    const size_t filled =
        (size_t) counters.bytes_resident + vocabulary.used() + store.row_bytes_now() + taken_bytes() - fixed_bytes();
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
