// Random schedules of everything that touches a KV cache, on two contexts of one model: one with the standard
// cache, one with pages and a budget that forces them out. Logits and saved states must be equal, bit for bit.
// With --rpc HOST:PORT, a server on this machine with one thread, the second is on a model of its own whose layers
// come to that device and go at random, the cells with them. Prints one JSON object with the counters.

#include "check.h"
#include "llama.h"
#include "log.h"
#include "rpc-devices.h"
#include "superllama.h"

#include "llama-context.h"
#include "kv/pager.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"

#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <random>
#include <set>
#include <sstream>
#include <thread>

using namespace superllama;

struct options {
    std::string model;
    std::string spill_dir = "/tmp";
    std::string rpc; // empty: no device
    int steps = 1000;
    int seed = 1;
    int n_seq = 4;
    int n_ctx_seq = 1024;
    int n_ubatch = 128;
    int page = 256;
    int threads = 1;
    double budget_pages = 4;
    int async = 0;
    int unified = 0;
    int poison = 1;
    int together = 1; // batches of several sequences
    int full_disk = 0;
    int large_batch = 0; // all sequences together do not fit
    int streamed = 0;    // expect layer-by-layer ubatches
    std::string type = "f16";
};

static options parse(int argc, char ** argv) {
    options o;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i], value = argv[i + 1];
        const std::pair<const char *, int *> numbers[] = {
            { "--steps", &o.steps },
            { "--seed", &o.seed },
            { "--seqs", &o.n_seq },
            { "--ctx", &o.n_ctx_seq },
            { "--ubatch", &o.n_ubatch },
            { "--page", &o.page },
            { "--threads", &o.threads },
            { "--async", &o.async },
            { "--unified", &o.unified },
            { "--poison", &o.poison },
            { "--full-disk", &o.full_disk },
            { "--streamed", &o.streamed },
            { "--large-batch", &o.large_batch },
            { "--together", &o.together },
        };
        bool known =
            name == "-m" || name == "--type" || name == "--spill-dir" || name == "--budget-pages" || name == "--rpc";
        o.model = name == "-m" ? value : o.model;
        o.type = name == "--type" ? value : o.type;
        o.rpc = name == "--rpc" ? value : o.rpc;
        o.spill_dir = name == "--spill-dir" ? value : o.spill_dir;
        o.budget_pages = name == "--budget-pages" ? std::stod(value) : o.budget_pages;
        for (const auto & number : numbers) {
            if (name == number.first) {
                *number.second = std::stoi(value);
                known = true;
            }
        }
        if (!known) {
            fprintf(stderr, "kv-schedule: unknown option %s\n", name.c_str());
            exit(2);
        }
    }
    return o;
}

static llama_context * make_context(llama_model * model, const options & o, bool paged, uint64_t budget) {
    llama_context_params p = llama_context_default_params();
    p.n_ctx = (uint32_t) (o.n_ctx_seq * (o.unified ? 1 : o.n_seq));
    p.n_batch = 2048;
    p.n_ubatch = (uint32_t) o.n_ubatch;
    p.n_seq_max = (uint32_t) o.n_seq;
    p.kv_unified = o.unified != 0;
    p.n_threads = p.n_threads_batch = o.threads;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    p.type_k = p.type_v = o.type == "q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    p.superllama.paged_kv = paged;
    p.superllama.kv_page_size = o.page;
    p.superllama.kv_budget_bytes = budget;
    p.superllama.async_prefetch = o.async != 0;
    p.superllama.prefetch_threads = 2;
    p.superllama.spill_dir = o.spill_dir.c_str();
    llama_context * ctx = llama_init_from_model(model, p);
    if (ctx == nullptr) {
        fprintf(stderr, "kv-schedule: no context: %s\n", superllama_last_error());
        exit(1);
    }
    return ctx;
}

static llama_kv_cache * cache_of(llama_context * ctx) {
    llama_memory_i * memory = ctx->get_memory();
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn();
    }
    return dynamic_cast<llama_kv_cache *>(memory);
}

// Memory behind the reserved address space, as the system counts it.
static uint64_t resident_bytes(llama_context * ctx) {
    uint64_t least = UINT64_MAX, most = 0;
    for (uint32_t il : cache_of(ctx)->get_layer_ids()) {
        const ggml_tensor * k = cache_of(ctx)->get_k_storage((int32_t) il);
        if (!ggml_backend_buffer_is_host(k->buffer)) {
            continue;
        }
        least = std::min(least, (uint64_t) ggml_backend_buffer_get_base(k->buffer));
        most = std::max(most,
                        (uint64_t) ggml_backend_buffer_get_base(k->buffer) + ggml_backend_buffer_get_size(k->buffer));
    }
    std::ifstream maps("/proc/self/smaps");
    uint64_t sum = 0;
    bool ours = false;
    for (std::string line; std::getline(maps, line);) {
        unsigned long long begin = 0, end = 0, kb = 0;
        if (sscanf(line.c_str(), "%llx-%llx ", &begin, &end) == 2) {
            ours = begin < most && end > least;
        } else if (ours && sscanf(line.c_str(), "Rss: %llu kB", &kb) == 1) {
            sum += kb * 1024;
        }
    }
    return sum;
}

// What a context says of its sequences is what its cache and its pages say.
static std::vector<struct superllama_seq_stats> checked_stats(llama_context * ctx, bool paged) {
    std::vector<struct superllama_seq_stats> found((size_t) llama_n_seq_max(ctx));
    CHECK(superllama_seq_stats(ctx, nullptr, 0) == (int) found.size());
    found.push_back({ -1, -1, -1, -1, -1, -1 });
    CHECK(superllama_seq_stats(ctx, found.data(), (int) found.size()) == (int) found.size() - 1);
    CHECK(found.back().prompt_tokens == -1);
    found.pop_back();
    struct superllama_kv_pages all = {};
    CHECK(superllama_kv_pages(ctx, &all) == 0);
    struct superllama_stats sum = {};
    CHECK(superllama_stats(ctx, &sum) == 0);
    for (size_t seq = 0; seq < found.size(); ++seq) {
        const struct superllama_seq_stats & s = found[seq];
        struct superllama_kv_seq_pages pages = {};
        CHECK(superllama_kv_seq_pages(ctx, (int) seq, &pages) == 0);
        CHECK(s.kv_tokens == llama_memory_seq_pos_max(llama_get_memory(ctx), (int) seq) + 1);
        CHECK(s.kv_tokens > 0 || s.kv_bytes == 0);
        if (s.kv_tokens > 0) {
            CHECK(s.kv_pages_cpu == pages.pages_cpu && s.kv_pages_disk == pages.pages_disk);
            CHECK(s.kv_bytes == pages.resident_bytes && s.kv_bytes <= all.resident_bytes);
            CHECK((s.kv_bytes > 0) == (s.kv_pages_cpu > 0));
            CHECK(s.kv_bytes <= s.kv_pages_cpu * all.page_bytes);
        }
        CHECK(paged || s.kv_pages_cpu + s.kv_pages_disk + s.kv_bytes == 0);
        sum.prompt_tokens -= s.prompt_tokens;
        sum.generated_tokens -= s.generated_tokens;
    }
    CHECK(sum.prompt_tokens == 0 && sum.generated_tokens == 0);
    return found;
}

struct schedule {
    options o;
    std::mt19937 rng;
    llama_context * ref;
    llama_context * paged;
    int n_vocab;
    llama_model * dynamic; // of the paged one, if its layers go to a device
    uint64_t vram = 0;     // bytes that all of them take there
    int64_t n_compared = 0;
    std::vector<int64_t> n_computed; // tokens, by sequence
    std::thread other;               // that moves layers meanwhile

    // Tokens count where they were computed, whatever became of them: not of batches that failed, and once.
    void check_stats() const {
        const auto expected = checked_stats(ref, false), found = checked_stats(paged, true);
        for (size_t seq = 0; seq < found.size(); ++seq) {
            CHECK(found[seq].prompt_tokens == expected[seq].prompt_tokens);
            CHECK(found[seq].generated_tokens == expected[seq].generated_tokens);
            CHECK(found[seq].kv_tokens == expected[seq].kv_tokens);
            CHECK(found[seq].prompt_tokens + found[seq].generated_tokens == n_computed[seq]);
        }
    }

    int pick(int n) { return (int) (rng() % (unsigned) n); }

    int end_of(int seq) const { return llama_memory_seq_pos_max(llama_get_memory(ref), seq) + 1; }

    template <typename F>
    void both(const F & body) {
        body(ref);
        body(paged);
    }

    // Where sequences share a stream, kernels read the cells of all of them, zeros where they are on disk.
    void poison() {
        if (o.poison != 0 && o.unified == 0) {
            const auto placement = paged->superllama->hold();
            cache_of(paged)->pager->get_pages()->for_each_evicted(
                [](uint8_t * at, size_t size) { memset(at, 0xff, size); });
        }
    }

    void decode(const std::vector<std::pair<int, int>> & parts) { // sequence, tokens
        llama_batch batch = llama_batch_init(2048, 0, 1);
        for (const auto & part : parts) {
            const int begin = end_of(part.first);
            for (int i = 0; i < part.second; ++i) {
                batch.token[batch.n_tokens] = (llama_token) pick(n_vocab);
                batch.pos[batch.n_tokens] = begin + i;
                batch.n_seq_id[batch.n_tokens] = 1;
                batch.seq_id[batch.n_tokens][0] = part.first;
                batch.logits[batch.n_tokens] = i + 1 == part.second || i % 16 == 0;
                batch.n_tokens++;
            }
        }
        poison();
        const int status = llama_decode(ref, batch);
        const int status_paged = llama_decode(paged, batch);
        if (status != status_paged) {
            fprintf(stderr, "status %d, paged %d: %s\n", status, status_paged, superllama_last_error());
        }
        CHECK(status == status_paged);
        if (status == 1) { // full
            const int seq = parts[0].first;
            both([&](llama_context * ctx) { llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1); });
        } else {
            CHECK(status == 0);
            for (int i = 0; i < batch.n_tokens; ++i) {
                if (batch.logits[i]) {
                    const float * a = llama_get_logits_ith(ref, i);
                    const float * b = llama_get_logits_ith(paged, i);
                    CHECK(a[0] == a[0]); // a number
                    CHECK(memcmp(a, b, sizeof(float) * (size_t) n_vocab) == 0);
                    n_compared++;
                }
            }
            for (const auto & part : parts) {
                n_computed[(size_t) part.first] += part.second;
            }
        }
        llama_batch_free(batch);
    }

    // Layers go to the device or leave it, now, or beside what this step does.
    void move_layers() {
        const std::vector<uint64_t> budgets(SUPERLLAMA_MAX_DEVICES, 1 + rng() % (vram + vram / 4));
        const auto set = [this, budgets] { CHECK(superllama_set_budgets(dynamic, nullptr, budgets.data()) == 0); };
        if (pick(2) == 0) {
            set();
        } else {
            other = std::thread(set);
        }
    }

    // But for signs of zeros: a context shift turns all keys of the standard cache, those that stay where they are by
    // no angle, which makes 0 of some -0; of pages it turns only those that move.
    template <typename T>
    static bool same_state(const T & a, const T & b) {
        bool same = a.size() == b.size();
        for (size_t i = 0; same && i < a.size(); ++i) {
            const auto x = (uint8_t) a[i];
            const auto y = (uint8_t) b[i];
            same = x == y || ((x ^ y) == 0x80 && (x & 0x7f) == 0 && i > 0 && a[i - 1] == 0 && b[i - 1] == 0);
        }
        return same;
    }

    // By files: what a tool saves and loads between runs.
    void save_and_load_file(int from, int to) { // -1: all sequences
        std::string data[2];
        const std::string path = o.spill_dir + "/state.bin";
        llama_token tokens[3] = { 1, 2, 3 };
        size_t n_tokens = 0;
        int i = 0;
        both([&](llama_context * ctx) {
            CHECK(from < 0 ? llama_state_save_file(ctx, path.c_str(), tokens, 3)
                           : llama_state_seq_save_file(ctx, path.c_str(), from, tokens, 3) > 0);
            std::ifstream file(path, std::ios::binary);
            data[i++].assign(std::istreambuf_iterator<char>(file), {});
        });
        CHECK(same_state(data[0], data[1]));
        bool loaded[2] = {};
        i = 0;
        both([&](llama_context * ctx) {
            loaded[i++] = from < 0 ? llama_state_load_file(ctx, path.c_str(), tokens, 3, &n_tokens)
                                   : llama_state_seq_load_file(ctx, path.c_str(), to, tokens, 3, &n_tokens) > 0;
        });
        CHECK(loaded[0] == loaded[1] && (loaded[0] || o.unified));
        CHECK(remove(path.c_str()) == 0);
    }

    void save_and_load(int from, int to) { // -1: all sequences
        std::vector<uint8_t> blob[2];
        int i = 0;
        both([&](llama_context * ctx) {
            std::vector<uint8_t> & data = blob[i++];
            data.resize(from < 0 ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, from));
            const size_t n = from < 0 ? llama_state_get_data(ctx, data.data(), data.size())
                                      : llama_state_seq_get_data(ctx, data.data(), data.size(), from);
            CHECK(n == data.size());
        });
        CHECK(same_state(blob[0], blob[1]));
        both([&](llama_context * ctx) {
            const size_t n = from < 0 ? llama_state_set_data(ctx, blob[0].data(), blob[0].size())
                                      : llama_state_seq_set_data(ctx, blob[0].data(), blob[0].size(), to);
            CHECK(n == blob[0].size() || (o.unified && n == 0));
        });
    }

    void step() {
        if (dynamic != nullptr && pick(3) == 0) {
            move_layers();
        }
        const int a = pick(o.n_seq), b = pick(o.n_seq), end = end_of(a), what = pick(100);
        if (what < 50 || end < 2) {
            const int sizes[] = { 1, 1, 1 + pick(8), 1 + pick(40), 1 + pick(300) };
            decode({ { a, std::min(sizes[pick(5)], 1024) } });
        } else if (what < 60 && o.together != 0) {
            std::vector<std::pair<int, int>> parts;
            const int n = 1 + pick(3);
            for (int s = 0; s < o.n_seq; ++s) {
                if (pick(2) == 0 && end_of(s) + n < o.n_ctx_seq / (o.unified ? o.n_seq : 1)) {
                    parts.push_back({ s, n });
                }
            }
            if (!parts.empty()) {
                decode(parts);
            }
        } else if (what < 68) {
            const int from = end - 1 - pick(std::min(end - 1, 200));
            both([&](llama_context * ctx) { llama_memory_seq_rm(llama_get_memory(ctx), a, from, -1); });
        } else if (what < 71) {
            both([&](llama_context * ctx) { llama_memory_seq_rm(llama_get_memory(ctx), a, -1, -1); });
        } else if (what < 77) {
            if (a != b) {
                both([&](llama_context * ctx) {
                    llama_memory_seq_rm(llama_get_memory(ctx), b, -1, -1);
                    llama_memory_seq_cp(llama_get_memory(ctx), a, b, -1, -1);
                });
            }
            if (pick(3) == 0) { // the copy is made with the next decode: its source may be gone by then
                both([&](llama_context * ctx) { llama_memory_seq_rm(llama_get_memory(ctx), a, -1, -1); });
            }
        } else if (what < 78) {
            both([&](llama_context * ctx) { llama_memory_seq_keep(llama_get_memory(ctx), a); });
        } else if (what < 84) {
            const int from = pick(end - 1), n = 1 + pick(std::min(64, end - 1 - from));
            if (llama_memory_can_shift(llama_get_memory(ref)) && from + n < end) {
                both([&](llama_context * ctx) {
                    llama_memory_seq_rm(llama_get_memory(ctx), a, from, from + n);
                    llama_memory_seq_add(llama_get_memory(ctx), a, from + n, -1, -n);
                });
                decode({ { b, 1 } }); // saving a state between a shift and its execution is not supported upstream
            }
        } else if (what < 90) {
            decode({ { b, 1 } }); // so that no copy waits
            if (end_of(a) > 0) {
                pick(2) == 0 ? save_and_load(a, b) : save_and_load_file(a, b);
            }
        } else if (what < 92) {
            decode({ { b, 1 } });
            pick(2) == 0 ? save_and_load(-1, -1) : save_and_load_file(-1, -1);
        } else {
            CHECK(superllama_kv_prefetch(paged, a) >= 0);
        }
    }
};

// The same token appended to each of some sequences, in one batch.
static int decode_one(llama_context * ctx, const std::vector<llama_seq_id> & seqs) {
    llama_batch batch = llama_batch_init((int) seqs.size(), 0, 1);
    for (llama_seq_id seq : seqs) {
        const int i = batch.n_tokens++;
        batch.token[i] = 5;
        batch.pos[i] = llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i] = 1;
    }
    const int status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return status;
}

// A disk that takes nothing more: the decode that has to evict fails, nothing else is harmed, and it works again
// once there is room.
static void try_full_disk(schedule & s) {
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit before = {}, none = {};
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    none.rlim_max = before.rlim_max;
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        s.both([&](llama_context * ctx) { llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1); });
        s.decode({ { seq, s.o.n_ctx_seq / 2 } });
    }
    CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
    int n_failed = 0;
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        if (decode_one(s.paged, { seq }) != 0) {
            CHECK(std::string(superllama_last_error()).find("spill file") != std::string::npos);
            n_failed++;
        } else {
            CHECK(decode_one(s.ref, { seq }) == 0);
            CHECK(memcmp(llama_get_logits_ith(s.ref, 0), llama_get_logits_ith(s.paged, 0),
                         sizeof(float) * (size_t) s.n_vocab) == 0);
            s.n_computed[(size_t) seq]++;
        }
        s.check_stats();
    }
    CHECK(n_failed > 0);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        s.decode({ { seq, 3 } });
    }
}

// A batch of all sequences whose pages do not fit, not even layer by layer: refused, and each alone goes on.
static void try_large_batch(schedule & s) {
    std::vector<llama_seq_id> all;
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        s.both([&](llama_context * ctx) { llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1); });
        s.decode({ { seq, s.o.n_ctx_seq / 2 } });
        all.push_back(seq);
    }
    CHECK(decode_one(s.paged, all) < 0);
    const std::string error = superllama_last_error();
    s.check_stats();
    CHECK(error.find("layer by layer") != std::string::npos && error.find("--kv-budget leaves") != std::string::npos);
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        s.decode({ { seq, 3 } });
    }
}

// More than the pages may have goes to the device, and all of it leaves: for memory, and the rest for disk. Then each
// sequence comes back for a token. So there is something on disk whatever the random steps do, and when.
static void try_leaving_device(schedule & s) {
    const auto set = [&s](uint64_t bytes) {
        const std::vector<uint64_t> budgets(SUPERLLAMA_MAX_DEVICES, bytes);
        CHECK(superllama_set_budgets(s.dynamic, nullptr, budgets.data()) == 0);
    };
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        s.decode({ { seq, s.o.n_ctx_seq / (s.o.unified ? s.o.n_seq : 1) * 3 / 4 } });
    }
    set(1);
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        s.decode({ { seq, 1 } });
    }
    for (int seq = 0; seq < s.o.n_seq; ++seq) {
        s.both([&](llama_context * ctx) { llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1); });
    }
    set(s.vram);
}

int main(int argc, char ** argv) {
    const options o = parse(argc, argv);
    log_from(GGML_LOG_LEVEL_ERROR);
    ggml_backend_load_all();
    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    mparams.use_extra_bufts = o.rpc.empty(); // the device has no repacked weights
    llama_model * model = llama_model_load_from_file(o.model.c_str(), mparams);
    CHECK(model != nullptr);
    llama_model * dynamic = nullptr;
    if (!o.rpc.empty()) {
        add_rpc_device(o.rpc.c_str());
        mparams.n_gpu_layers = -1;
        mparams.superllama.dynamic_layers = true;
        dynamic = llama_model_load_from_file(o.model.c_str(), mparams);
        CHECK(dynamic != nullptr);
    }
    llama_model * of_paged = dynamic != nullptr ? dynamic : model;

    struct superllama_kv_pages pages = {};
    llama_context * measure = make_context(of_paged, o, true, (uint64_t) 1 << 40);
    CHECK(superllama_kv_pages(measure, &pages) == 0);
    if (!pages.paged) {
        fprintf(stderr, "kv-schedule: not paged: %s\n", pages.reason);
        return 1;
    }
    llama_free(measure);
    const uint64_t bounce = std::min<uint64_t>((uint64_t) pages.page_bytes, 1 << 20) * (o.async ? 3 : 1);
    const uint64_t budget = (uint64_t) (o.budget_pages * (double) pages.page_bytes) + bounce;

    schedule s = { o,
                   std::mt19937((unsigned) o.seed),
                   make_context(model, o, false, 0),
                   make_context(of_paged, o, true, budget),
                   llama_vocab_n_tokens(llama_model_get_vocab(model)),
                   dynamic };
    struct superllama_stats stats = {};
    CHECK(superllama_stats(s.paged, &stats) == 0);
    CHECK((stats.vram_own_bytes > 0) == (dynamic != nullptr));
    s.vram = (uint64_t) stats.vram_own_bytes;
    s.n_computed.resize((size_t) o.n_seq);
    if (dynamic != nullptr) {
        try_leaving_device(s);
    }
    if (o.full_disk != 0) {
        try_full_disk(s);
    }
    if (o.large_batch != 0) {
        try_large_batch(s);
    }
    uint64_t resident_most = 0;
    std::set<int64_t> n_on_device;
    for (int i = 0; i < o.steps; ++i) {
        s.step();
        if (s.other.joinable()) {
            s.other.join();
        }
        s.check_stats();
        CHECK(superllama_stats(s.paged, &stats) == 0);
        n_on_device.insert(stats.gpu_layers_active);
        CHECK(superllama_kv_pages(s.paged, &pages) == 0);
        CHECK(pages.resident_peak_bytes <= pages.budget_bytes);
        if (o.poison == 0 && i % 16 == 0) {
            resident_most = std::max(resident_most, resident_bytes(s.paged));
            CHECK(resident_most <= (uint64_t) pages.budget_bytes);
        }
    }
    CHECK(pages.evicted_dirty > 0 && pages.restored > 0 && pages.bytes_read > 0 && pages.bytes_written > 0);
    CHECK(o.streamed == 0 || pages.ubatches_streamed > 0);
    printf(
        "{\"steps\":%d,\"logits_compared\":%lld,\"page_bytes\":%lld,\"budget_bytes\":%lld,\"resident_peak_bytes\":%lld,"
        "\"resident_rss_bytes\":%llu,\"evicted_clean\":%lld,\"evicted_dirty\":%lld,\"dropped\":%lld,\"restored\":%lld,"
        "\"streamed\":%lld,\"prefetched\":%lld,\"prefetched_used\":%lld,\"prefetched_wasted\":%lld,"
        "\"bytes_read\":%lld,\"bytes_written\":%lld,\"stall_ms\":%.1f,\"placements\":%zu}\n",
        o.steps, (long long) s.n_compared, (long long) pages.page_bytes, (long long) pages.budget_bytes,
        (long long) pages.resident_peak_bytes, (unsigned long long) resident_most, (long long) pages.evicted_clean,
        (long long) pages.evicted_dirty, (long long) pages.dropped, (long long) pages.restored,
        (long long) pages.ubatches_streamed, (long long) pages.prefetched, (long long) pages.prefetched_used,
        (long long) pages.prefetched_wasted, (long long) pages.bytes_read, (long long) pages.bytes_written,
        pages.stall_ms, n_on_device.size());
    llama_free(s.ref);
    llama_free(s.paged);
    llama_model_free(model);
    llama_model_free(dynamic);
    llama_backend_free();
    return 0;
}
