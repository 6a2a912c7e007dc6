// Failed assertions of upstream are exceptions while a model is loaded or a context is made.
//
// A check of metadata can only know what it was written for; upstream asserts in some hundred places of its
// graphs. Within the scope of a guard, in its thread, GGML_ASSERT and GGML_ABORT throw what the callers of a load
// and of a context catch already: the file is refused, the process lives.
#pragma once

namespace superllama {

class assert_guard {
  public:
    assert_guard();
    ~assert_guard();
    assert_guard(const assert_guard &) = delete;
    assert_guard & operator=(const assert_guard &) = delete;
};

} // namespace superllama
