// Weights that an RPC server has in files of its own, found by their content: what a client names by a hash is read
// here instead of sent.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace superllama {

// Of the protocol: upstream's clients send it with what is large (FNV-1a). Against accidents, not against attackers.
uint64_t rpc_content_hash(const void * data, size_t bytes);

// The GGUF files below one folder. A file is looked through once; what is found stays in the cache folder for as long
// as its size and time are the same.
class rpc_weight_files {
  public:
    // Throws std::runtime_error where the folder cannot be read. What is no readable GGUF file is passed over, with a
    // line in the log.
    explicit rpc_weight_files(const std::string & folder);
    ~rpc_weight_files();

    // The bytes with this hash. They are hashed again on their way: a file that changed is not used any more, and false
    // is the answer where no other has them.
    bool read(uint64_t hash, std::vector<uint8_t> & data);

    size_t n_files() const;
    uint64_t bytes() const; // of weights, each counted once

  private:
    struct impl;
    std::unique_ptr<impl> pimpl;
};

// Those of this server; false where it has none.
bool rpc_local_weights(uint64_t hash, std::vector<uint8_t> & data);

// Looks through the folder that this server was given, if it was. Throws as above.
void rpc_open_weights();

bool rpc_has_weights();

} // namespace superllama
