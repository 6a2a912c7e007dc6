// The heap's free memory: requests come and go on many threads, and what they leave free between the rest stays with
// the process until somebody asks for it. It lies in no budget, so it is given back.
#pragma once

#include <cstdint>

namespace superllama {

// From 1 MiB on, buffers have pages of their own and give them back, and no thread's heap keeps more than that free at
// its end. glibc begins so, too; but once such a buffer was freed it takes others from its heaps, where holes stay,
// where it writes zeros into all of a table that is hardly used, and whose ends it keeps, up to twice the largest
// buffer each.
void keep_heap_small();

void free_heap(); // all that is free in it, now: glibc leaves out the ends

// For one thread that looks in again and again.
class heap_watch {
  public:
    // Every ten seconds, where more than a little is free, until ten seconds have passed without a request.
    void look(int64_t n_asked, int n_running);

  private:
    int64_t t_next_ms = 0;
    int64_t n_before = 0;
    bool may_be_more = false; // what was asked before the last look was perhaps answered after it
};

} // namespace superllama
