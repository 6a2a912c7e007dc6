// A batch in the middle of which something throws, as where there is no memory for it: an error of the call.
#pragma once

#include "base/assert_guard.h" // for the same callers
#include "llama.h"

#include <functional>

namespace superllama {

// What `compute` returns; or -3 with superllama_last_error(), and of the batch's sequences what was there before.
int32_t computed(llama_context * ctx, const llama_batch & batch, const std::function<int32_t()> & compute);

} // namespace superllama
