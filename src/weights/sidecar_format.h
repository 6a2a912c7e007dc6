// How a sidecar is laid out: a header, the model files that it is of, a checksum for each block, then the blocks, each
// part on whole pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace superllama {

struct sidecar_header {
    uint64_t magic;
    uint64_t key[2]; // what is wanted of a sidecar, twice hashed
    uint64_t n_blocks;
    uint64_t bytes; // of the whole file
    uint64_t sums;  // checksum of the blocks' checksums
    uint64_t self;  // checksum of the header before it
};

size_t sidecar_data_offset(size_t n_blocks); // where the first block begins

// What a file begins with, into memory for so many bytes. `identity` is that of the model's files.
void sidecar_begin(sidecar_header head, uint64_t identity, const std::vector<uint64_t> & sums, uint8_t * to);

// The blocks' checksums of a file that is whole and has the key, number of blocks and size that are wanted; else *why.
// Nothing that it says is used before it was compared. `proven`: it names these model files.
bool sidecar_read(int fd, const sidecar_header & wanted, uint64_t identity, std::vector<uint64_t> * sums, bool * proven,
                  std::string * why);

// Names these model files too, so that their next load need not compare any more. Where that fails, it does.
void sidecar_add_origin(int fd, const sidecar_header & head, uint64_t identity);

} // namespace superllama
