// Host memory of one model, byte for byte: what it is for, and who gives it back.
//
// Blocks of weights (pinned, ring, experts) get what the rest leaves of the budget, so they have no charge: their
// scheduler knows them. Everything else is charged here before it is taken.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace superllama {

enum class memory_tag : uint8_t {
    resident,     // weights that are always in memory
    rows,         // rows of embeddings
    vocabulary,   // tokens and merges
    pinned,       // blocks that stay
    ring,         // blocks that are streamed
    experts,      // frames of experts
    staging,      // small pages are read by way of these; conversion
    kv,           // KV cache, recurrent states
    compute,      // buffers of graphs
    cpu_work,     // the work buffer of the CPU's kernels, and what graphs are described by
    outputs,      // logits and embeddings
    adapters,     // LoRA, control vectors
    uploads,      // on the way to a device
    prompt_cache, // states that a server keeps beside its slots
    projector,    // of images and sounds: its weights, and what it computes with
    page_tables,  // of all of it
};

static const size_t n_memory_tags = (size_t) memory_tag::page_tables + 1;

const char * name_of(memory_tag tag);

// Sums by tag; any thread may read them.
class ledger {
  public:
    uint64_t used(memory_tag tag) const;
    uint64_t granted() const; // over all tags: what owners may have without asking
    uint64_t lent() const;    // what they may ask for besides, and then have; until then weights use it

  private:
    friend class charge;

    mutable std::mutex mutex;
    std::array<uint64_t, n_memory_tags> n_used = {};
    uint64_t n_granted = 0;
    uint64_t n_promised = 0;
};

// The memory of one owner for one purpose, given back when the owner goes.
class charge {
  public:
    charge(ledger & of, memory_tag tag) : of(&of), tag(tag) {}
    ~charge() { set(0); }

    charge(const charge &) = delete;
    charge & operator=(const charge &) = delete;

    void set(uint64_t bytes) { set(bytes, bytes, bytes); } // all of it, now
    void set(uint64_t used, uint64_t granted, uint64_t promised);
    void use(uint64_t bytes) { set(bytes, n_granted, n_promised); } // within what is granted

    uint64_t used() const { return n_used; }
    uint64_t granted() const { return n_granted; }
    uint64_t promised() const { return n_promised; }

  private:
    ledger * of;
    memory_tag tag;
    uint64_t n_used = 0;
    uint64_t n_granted = 0;
    uint64_t n_promised = 0;
};

} // namespace superllama
