// Included before ggml's amx/mmq.cpp where GCC compiles it. GCC's own _tile_loadconfig() says that it reads one pointer of
// the 64 bytes, so the compiler drops what is written to the others: no tile gets a shape, and the first matrix on a CPU
// with AMX ends the process with SIGILL (seen with GCC 12).
#pragma once

#ifdef __AMX_TILE__
#    include <immintrin.h>
#    undef _tile_loadconfig
#    define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" ::"m"(*(const char(*)[64])(config)))
#endif
