// A fast 64-bit checksum: against damaged files, not against attackers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace superllama {

inline uint64_t checksum(const void * data, size_t size, uint64_t seed = 0xcbf29ce484222325ull) {
    static const uint64_t prime = 0x9e3779b97f4a7c15ull;
    const uint8_t * p = (const uint8_t *) data;
    // four lanes, for the processor to multiply side by side
    uint64_t lane[4] = { seed, seed ^ 1, seed ^ 2, seed ^ 3 };
    for (; size >= 32; size -= 32, p += 32) {
        for (int i = 0; i < 4; ++i) {
            uint64_t word;
            memcpy(&word, p + 8 * i, 8);
            lane[i] = (lane[i] ^ word) * prime;
            lane[i] ^= lane[i] >> 32;
        }
    }
    uint64_t hash = seed + size;
    for (; size > 0; --size, ++p) {
        hash = (hash ^ *p) * prime;
    }
    for (uint64_t l : lane) {
        hash = (hash ^ l) * prime;
        hash ^= hash >> 29;
    }
    return hash;
}

} // namespace superllama
