// Failed assertions of upstream are exceptions while a model is loaded, a context is made, a state is read, a request
// is taken in, a client of an RPC server is served, or a batch is decoded, but for its graph: kernels run in several
// threads, which no exception may leave. What an engine in somebody's program runs is guarded, too: the engine ends,
// with the reason, the program does not.
//
// A check of metadata can only know what it was written for; upstream asserts in some hundred places of its
// graphs. Within the scope of a guard, in its thread, GGML_ASSERT and GGML_ABORT throw what the callers of a load
// and of a context catch already: the file is refused, the process lives.
#pragma once

#include <stdexcept>

namespace superllama {

class failed_assertion : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class assert_guard {
  public:
    // Of upstream's source file, by its name without a folder: whether its assertions are exceptions.
    using file_rule = bool (*)(const char * file);

    // `blame` is what the message begins with: what is wrong, and what to do. Without a rule, those of all files are
    // exceptions.
    explicit assert_guard(const char * blame =
                              "the model's metadata and tensors contradict each other, or are of a kind "
                              "that this library cannot run; fetch the file or convert it again",
                          file_rule of_file = nullptr);
    ~assert_guard();
    assert_guard(const assert_guard &) = delete;
    assert_guard & operator=(const assert_guard &) = delete;

    // Off for a while, in this thread. Returns what it was.
    static bool set_throwing(bool throwing);

  private:
    const char * blamed_before;
    file_rule rule_before;
    bool threw_before;
};

} // namespace superllama
