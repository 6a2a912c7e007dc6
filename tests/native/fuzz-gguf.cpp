// Loads model files that may be malformed, each in a process of its own, and says how that ended.
//
// Reads lines "MODE PATH" and answers each with one line: a verdict, the most memory in MiB, milliseconds, and a
// reason. Verdicts: ok (loaded, decoded four tokens), refused (an error of the load, the context, or a decode call),
// and what must not be: signal, hang, exit. Modes: plain, dynamic (layers), plan (the arithmetic before a load), vocab
// (only). A child is forked for every file from a parent that has loaded the backends and started no thread.

#include "llama.h"
#include "superllama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <execinfo.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const rlim_t cpu_seconds = 10;                  // more is a hang
static const unsigned wall_seconds = 120;              // where it waits and computes nothing; machines are shared
static const rlim_t address_space = (rlim_t) 64 << 30; // an allocation of more fails, as it would on most machines

enum ending { ended_ok = 0, ended_refused = 10 };

static char * last_error; // shared with the child
static const size_t last_error_size = 4096;

static void on_log(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && strlen(text) > 1 && strstr(text, "failed to load model") == nullptr) {
        strncpy(last_error, text, last_error_size - 1);
    }
}

// What a program does with a vocabulary before it has a context.
static void use_vocab(const llama_vocab * vocab) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return;
    }
    const std::string text = "Hello world, 12 <s> \n\t \xC3\xA9\xE6\xBC\xA2";
    std::vector<llama_token> tokens(text.size() + 16);
    for (const bool special : { false, true }) {
        const int n = llama_tokenize(vocab, text.c_str(), (int) text.size(), tokens.data(), (int) tokens.size(),
                                     special, special);
        std::vector<char> back(4096);
        const auto end = std::remove_if(tokens.begin(), tokens.begin() + std::max(0, n), [&](llama_token id) {
            return id < 0 || id >= llama_vocab_n_tokens(vocab); // a vocabulary without a token for what is unknown
        });
        llama_detokenize(vocab, tokens.data(), (int) (end - tokens.begin()), back.data(), (int) back.size(), !special,
                         special);
    }
    char piece[256];
    for (int id = 0; id < llama_vocab_n_tokens(vocab); id += 1 + llama_vocab_n_tokens(vocab) / 64) {
        llama_token_to_piece(vocab, id, piece, sizeof(piece), 0, true);
        llama_vocab_is_eog(vocab, id);
    }
}

static ending decode(llama_model * model, llama_context * ctx) {
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> tokens;
    for (int i = 0; i < 4 && n_vocab > 0; ++i) {
        tokens.push_back((i * 7919 + 3) % n_vocab);
    }
    llama_batch batch = llama_batch_get_one(tokens.data(), (int) tokens.size());
    if (llama_model_has_encoder(model)) {
        if (llama_encode(ctx, batch) != 0) {
            return ended_refused;
        }
        if (!llama_model_has_decoder(model)) {
            return ended_ok;
        }
        const llama_token start = llama_model_decoder_start_token(model);
        tokens = { start == LLAMA_TOKEN_NULL ? 0 : start };
        batch = llama_batch_get_one(tokens.data(), 1);
    }
    if (llama_decode(ctx, batch) != 0) {
        return ended_refused;
    }
    float sum = 0;
    if (const float * logits = llama_get_logits_ith(ctx, -1)) {
        for (int i = 0; i < n_vocab; ++i) {
            sum += logits[i];
        }
    }
    if (const float * row = llama_get_embeddings_seq(ctx, 0)) {
        sum += row[llama_model_n_embd_out(model) - 1];
    }
    volatile float read = sum; // so that the reads happen
    (void) read;
    return ended_ok;
}

static ending run(const std::string & mode, const char * path) {
    llama_model_params mparams = llama_model_default_params();
    llama_context_params cparams = llama_context_default_params();
    mparams.vocab_only = mode == "vocab";
    mparams.superllama.dynamic_layers = mode == "dynamic";
    mparams.superllama.mem_budget_bytes = (uint64_t) 2 << 30;
    mparams.use_extra_bufts = false; // kernels differ from machine to machine, and so would what is found
    cparams.n_ctx = 256;
    cparams.n_batch = cparams.n_ubatch = 16;
    cparams.n_threads = cparams.n_threads_batch = 1;

    if (mode == "plan") {
        struct superllama_plan plan = {};
        const uint64_t budget = (uint64_t) 2 << 30;
        if (superllama_plan(path, mparams, cparams, &budget, 1, &plan) != 0) {
            return ended_refused;
        }
        return ended_ok;
    }
    llama_model * model = llama_model_load_from_file(path, mparams);
    if (model == nullptr) {
        return ended_refused;
    }
    use_vocab(llama_model_get_vocab(model));
    ending end = ended_ok;
    if (mode != "vocab") {
        llama_context * ctx = llama_init_from_model(model, cparams);
        if (ctx == nullptr) {
            end = ended_refused;
        } else {
            end = decode(model, ctx);
            llama_free(ctx);
        }
    }
    llama_model_free(model);
    return end;
}

static double now_ms() {
    timespec t = {};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double) t.tv_sec + 1e-6 * (double) t.tv_nsec;
}

// Where it happened, for the reason; then the signal as it came.
static void on_signal(int number) {
    void * frames[32];
    const int n = backtrace(frames, 32);
    backtrace_symbols_fd(frames, n, 2);
    signal(number, SIG_DFL);
    raise(number);
}

static void in_child(const std::string & mode, const char * path, int out) {
    const rlimit cpu = { cpu_seconds, cpu_seconds + 1 }, space = { address_space, address_space }, core = { 0, 0 };
    setrlimit(RLIMIT_CPU, &cpu);
    setrlimit(RLIMIT_AS, &space);
    setrlimit(RLIMIT_CORE, &core);
    alarm(wall_seconds);
    for (const int number : { SIGSEGV, SIGFPE, SIGBUS, SIGILL, SIGABRT, SIGXCPU }) {
        signal(number, on_signal);
    }
    dup2(out, 1);
    dup2(out, 2);
    const ending end = run(mode, path);
    fflush(nullptr);
    _exit(end);
}

static void answer(const std::string & mode, const char * path, int out) {
    last_error[0] = '\0';
    if (ftruncate(out, 0) != 0 || lseek(out, 0, SEEK_SET) != 0) {
        exit(2);
    }
    const double start = now_ms();
    const pid_t child = fork();
    if (child == 0) {
        in_child(mode, path, out);
    }
    int status = 0;
    rusage usage = {};
    wait4(child, &status, 0, &usage);

    std::string verdict = "exit", reason = last_error;
    if (WIFSIGNALED(status)) {
        const int number = WTERMSIG(status);
        verdict = number == SIGALRM || number == SIGXCPU ? "hang" : "signal";
        std::vector<char> text(6000);
        const ssize_t n = pread(out, text.data(), text.size(), 0);
        reason = std::to_string(number) + " " + std::string(text.data(), (size_t) (n > 0 ? n : 0)) + " | " + reason;
    } else if (WEXITSTATUS(status) == ended_ok || WEXITSTATUS(status) == ended_refused) {
        verdict = WEXITSTATUS(status) == ended_ok ? "ok" : "refused";
    }
    for (char & c : reason) {
        c = (unsigned char) c < 0x20 ? ' ' : c;
    }
    printf("%s %ld %.0f %s\n", verdict.c_str(), usage.ru_maxrss / 1024, now_ms() - start, reason.c_str());
    fflush(stdout);
}

int main() {
    setenv("GGML_NO_BACKTRACE", "1", 1); // it would start a debugger for each
    void * frames[1];
    backtrace(frames, 1); // loads what it needs, which no signal handler may
    last_error = (char *) mmap(nullptr, last_error_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const int out = memfd_create("fuzz-gguf", MFD_CLOEXEC);
    if (last_error == MAP_FAILED || out < 0) {
        return 2;
    }
    llama_log_set(on_log, nullptr);
    ggml_backend_load_all();
    llama_backend_init();
    char line[4096];
    while (fgets(line, sizeof(line), stdin) != nullptr) {
        line[strcspn(line, "\n")] = '\0';
        const char * space = strchr(line, ' ');
        if (space == nullptr) {
            return 2;
        }
        answer(std::string(line, (size_t) (space - line)), space + 1, out);
    }
    return 0;
}
