// Failed assertions of upstream are exceptions while a model is loaded, a context is made, or a state is read.
//
// A check of metadata can only know what it was written for; upstream asserts in some hundred places of its
// graphs. Within the scope of a guard, in its thread, GGML_ASSERT and GGML_ABORT throw what the callers of a load
// and of a context catch already: the file is refused, the process lives.
#pragma once

namespace superllama {

class assert_guard {
  public:
    // `blame` is what the message begins with: what is wrong, and what to do.
    explicit assert_guard(const char * blame =
                              "the model's metadata and tensors contradict each other, or are of a kind "
                              "that this library cannot run; fetch the file or convert it again");
    ~assert_guard();
    assert_guard(const assert_guard &) = delete;
    assert_guard & operator=(const assert_guard &) = delete;

  private:
    const char * before;
};

} // namespace superllama
