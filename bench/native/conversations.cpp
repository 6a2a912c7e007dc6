// Many conversations in one context, each filled with a prompt of its own, then all resumed in turn: how long that
// takes, what memory it needs, what is answered. Prints one JSON object. Built against our library, with its flags,
// and against unpatched llama.cpp.
//
//     conversations -m MODEL [-n 16] [--tokens 4000] [-c 4096] [-t 2] [--answer 8] [--host-cache 0|1] [--turns 0|1]
//
// --host-cache 1: one sequence; a conversation that rests is a saved state in host memory, as in llama-server.
// --turns 1: filled once, all are resumed for every line on its standard input, each time as if it were the first.

#include "../../tests/native/log.h"
#include "llama.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <unistd.h>

#ifdef SUPERLLAMA
#    include "common.h"
#    include "api/flags.h"
#    include "superllama.h"
#endif

struct options {
    std::string model;
    int n = 16;
    int tokens = 4000;
    int context = 4096; // of one conversation
    int threads = 2;
    int answer = 8;
    int host_cache = 0;
    int turns = 0;
};

struct conversation {
    std::vector<llama_token> answer;
    llama_token next = 0;
    int n_past = 0;
    std::vector<uint8_t> state; // while it rests in the host cache
    double fill_s = 0, save_s = 0, resume_s = 0;
};

static double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static long long resident_bytes() {
    long long size = 0, resident = 0;
    FILE * file = fopen("/proc/self/statm", "r");
    if (file == nullptr || fscanf(file, "%lld %lld", &size, &resident) != 2) {
        fprintf(stderr, "conversations: cannot read /proc/self/statm\n");
        exit(1);
    }
    fclose(file);
    return resident * sysconf(_SC_PAGESIZE);
}

static options parse(int argc, char ** argv) {
    options o;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i];
        const std::pair<const char *, int *> numbers[] = {
            { "-n", &o.n },       { "--tokens", &o.tokens }, { "-c", &o.context },
            { "-t", &o.threads }, { "--answer", &o.answer }, { "--host-cache", &o.host_cache },
            { "--turns", &o.turns },
        };
        bool known = name == "-m";
        o.model = known ? argv[i + 1] : o.model;
        for (const auto & number : numbers) {
            if (name == number.first) {
                *number.second = atoi(argv[i + 1]);
                known = true;
            }
        }
        if (!known) {
            fprintf(stderr, "conversations: unknown option %s\n", argv[i]);
            exit(2);
        }
    }
    return o;
}

// Appends tokens to a conversation in sequence `seq`; what comes next is in c.next.
static void decode(llama_context * ctx, conversation & c, int seq, const std::vector<llama_token> & tokens) {
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    llama_batch batch = llama_batch_init((int) tokens.size(), 0, 1);
    for (llama_token token : tokens) {
        const int i = batch.n_tokens++;
        batch.token[i] = token;
        batch.pos[i] = c.n_past++;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i] = batch.n_tokens == (int) tokens.size();
    }
    if (llama_decode(ctx, batch) != 0) {
        fprintf(stderr, "conversations: decode failed\n");
        exit(1);
    }
    const float * logits = llama_get_logits_ith(ctx, -1);
    c.next = 0;
    for (llama_token t = 1; t < n_vocab; ++t) {
        c.next = logits[t] > logits[c.next] ? t : c.next;
    }
    llama_batch_free(batch);
}

static void answer(llama_context * ctx, conversation & c, int seq, int n) {
    for (int i = 0; i < n; ++i) {
        c.answer.push_back(c.next);
        decode(ctx, c, seq, { c.next });
    }
}

static void check_state(size_t n, const conversation & c) {
    if (n != c.state.size()) {
        fprintf(stderr, "conversations: a state could not be saved or loaded\n");
        exit(1);
    }
}

static void save(llama_context * ctx, conversation & c) {
    const double begin = now_s();
    c.state.resize(llama_state_seq_get_size(ctx, 0));
    check_state(llama_state_seq_get_data(ctx, c.state.data(), c.state.size(), 0), c);
    c.save_s = now_s() - begin;
    llama_memory_seq_rm(llama_get_memory(ctx), 0, -1, -1);
}

template <typename F>
static void print_list(const char * name, const std::vector<conversation> & list, const F & print) {
    printf("\"%s\":[", name);
    for (size_t i = 0; i < list.size(); ++i) {
        printf("%s", i ? "," : "");
        print(list[i]);
    }
    printf("],");
}

// What came after the fill is forgotten at the beginning of each turn.
static void take_turns(llama_context * ctx, const options & o, const std::vector<conversation> & filled) {
    while (getchar() != EOF) {
        std::vector<conversation> list = filled;
        for (int i = 0; i < o.n; ++i) {
            conversation & c = list[(size_t) i];
            llama_memory_seq_rm(llama_get_memory(ctx), i, o.tokens, -1);
            c.n_past = o.tokens;
            c.next = c.answer.front();
            const double begin = now_s();
            answer(ctx, c, i, 1);
            c.resume_s = now_s() - begin;
        }
        printf("{");
        print_list("resume_s", list, [](const conversation & c) { printf("%.4f", c.resume_s); });
        printf("\"next\":");
        for (int i = 0; i < o.n; ++i) {
            printf("%s%d", i ? "," : "[", list[(size_t) i].next);
        }
        printf("]}\n");
        fflush(stdout);
    }
}

int main(int argc, char ** argv) {
#ifdef SUPERLLAMA
    superllama::flags args;
    argc = superllama::take_flags(argc, argv, args);
#endif
    const options o = parse(argc, argv);
    log_from(GGML_LOG_LEVEL_WARN);
    ggml_backend_load_all();
    llama_backend_init();
    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(o.model.c_str(), mparams);
    if (model == nullptr) {
        return 1;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_context_params cparams = llama_context_default_params();
    cparams.n_seq_max = o.host_cache ? 1 : (uint32_t) o.n;
    cparams.n_ctx = (uint32_t) o.context * cparams.n_seq_max;
    cparams.n_batch = (uint32_t) o.context;
    cparams.n_threads = cparams.n_threads_batch = o.threads;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
#ifdef SUPERLLAMA
    args.apply(cparams);
#endif
    const long long rss_before = resident_bytes();
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (ctx == nullptr) {
        return 1;
    }

    std::vector<conversation> list((size_t) o.n);
    std::vector<std::pair<int, long long>> grown = { { 0, resident_bytes() } }; // tokens of the first one, bytes
    for (int i = 0; i < o.n; ++i) {
        conversation & c = list[(size_t) i];
        const int seq = o.host_cache ? 0 : i;
        const double begin = now_s();
        while (c.n_past < o.tokens) {
            std::vector<llama_token> part;
            for (int k = c.n_past; k < std::min(c.n_past + (int) cparams.n_ubatch, o.tokens); ++k) {
                part.push_back((llama_token) ((k * 7919ll + i * 1009ll + 13) % n_vocab));
            }
            decode(ctx, c, seq, part);
            if (i == 0) {
                grown.push_back({ c.n_past, resident_bytes() });
            }
        }
        c.fill_s = now_s() - begin;
        answer(ctx, c, seq, o.answer);
        if (o.host_cache) {
            save(ctx, c);
        }
    }
    const long long rss_filled = resident_bytes();
    if (o.turns != 0) {
        take_turns(ctx, o, list);
        llama_free(ctx);
        llama_model_free(model);
        llama_backend_free();
        return 0;
    }
    for (int i = 0; i < o.n; ++i) {
        conversation & c = list[(size_t) i];
        const int seq = o.host_cache ? 0 : i;
        const double begin = now_s();
        if (o.host_cache) {
            check_state(llama_state_seq_set_data(ctx, c.state.data(), c.state.size(), 0), c);
        }
        answer(ctx, c, seq, 1);
        c.resume_s = now_s() - begin;
        answer(ctx, c, seq, o.answer - 1);
        if (o.host_cache) {
            save(ctx, c);
        }
    }

    printf("{");
    print_list("fill_s", list, [](const conversation & c) { printf("%.4f", c.fill_s); });
    print_list("save_s", list, [](const conversation & c) { printf("%.4f", c.save_s); });
    print_list("resume_s", list, [](const conversation & c) { printf("%.4f", c.resume_s); });
    print_list("answers", list, [](const conversation & c) {
        for (size_t i = 0; i < c.answer.size(); ++i) {
            printf("%s%d", i ? "," : "[", c.answer[i]);
        }
        printf("]");
    });
    printf("\"grown\":[");
    for (size_t i = 0; i < grown.size(); ++i) {
        printf("%s[%d,%lld]", i ? "," : "", grown[i].first, grown[i].second);
    }
    printf("],\"rss_before\":%lld,\"rss_filled\":%lld", rss_before, rss_filled);
#ifdef SUPERLLAMA
    struct superllama_kv_pages pages = {};
    superllama_kv_pages(ctx, &pages);
    printf(",\"paged\":%s,\"page_size\":%lld,\"page_bytes\":%lld,\"kv_resident_peak_bytes\":%lld,"
           "\"restored\":%lld,\"bytes_read\":%lld,\"bytes_written\":%lld",
           pages.paged ? "true" : "false", (long long) pages.page_size, (long long) pages.page_bytes,
           (long long) pages.resident_peak_bytes, (long long) pages.restored, (long long) pages.bytes_read,
           (long long) pages.bytes_written);
#endif
    printf("}\n");
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
