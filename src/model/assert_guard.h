// Failed assertions of upstream are exceptions while a model is loaded, a context is made, a state is read, a request
// is taken in, or a batch is decoded, but for its graph: kernels run in several threads, which no exception may leave.
// What an engine in somebody's program runs is guarded, too: the engine ends, with the reason, the program does not.
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
    // `blame` is what the message begins with: what is wrong, and what to do.
    explicit assert_guard(const char * blame =
                              "the model's metadata and tensors contradict each other, or are of a kind "
                              "that this library cannot run; fetch the file or convert it again");
    ~assert_guard();
    assert_guard(const assert_guard &) = delete;
    assert_guard & operator=(const assert_guard &) = delete;

    // Off for a while, in this thread. Returns what it was.
    static bool set_throwing(bool throwing);

  private:
    const char * blamed_before;
    bool threw_before;
};

} // namespace superllama
