// The heap's free memory: requests come and go on many threads, and what they leave free between the rest stays with
// the process until somebody asks for it. It lies in no budget, so it is given back.
#pragma once

#include <cstdint>

namespace superllama {

void free_heap(); // all of it, now

// For one thread that looks in again and again.
class heap_watch {
  public:
    // Every ten seconds in which requests were answered, where more than a little is free.
    void look(int64_t n_answered);

  private:
    int64_t t_next_ms = 0;
    int64_t n_before = 0;
};

} // namespace superllama
