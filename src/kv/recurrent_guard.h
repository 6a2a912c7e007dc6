// The recurrent part of a memory around a graph that may fail. A recurrent state has no positions to go back to:
// what a graph that was cut short leaves behind would pass for the state of the sequence.
#pragma once

#include "llama-memory-recurrent.h"

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace superllama {

class recurrent_guard {
  public:
    // Null: the memory has no recurrent part. `finish` waits for what devices compute, before states are read or
    // written. `undoes`: reads of ours can fail in the middle of a graph; else it only clears what sequences begin
    // with.
    static std::unique_ptr<recurrent_guard> create(llama_memory_i * memory, std::function<void()> finish, bool undoes);

    bool before_ubatch(const llama_ubatch & ubatch, std::string * error); // false: a sequence in it is lost
    void clear_from_now_on() { clears = true; } // a state was loaded, whose numbers may be none
    void before_graph(bool keep); // the ubatch has its cells; keep: copy their states, so that they can come back
    void undo(const std::string & reason); // the ubatch failed; states that cannot come back are lost from here on

  private:
    recurrent_guard(llama_memory_recurrent & memory, std::function<void()> finish, bool undoes) :
        memory(memory),
        finish(std::move(finish)),
        undoes(undoes) {}
    bool is_lost(llama_seq_id seq) const;
    void clear_first();
    template <typename F>
    void for_each_written(const F & visit) const;

    llama_memory_recurrent & memory;
    const std::function<void()> finish;
    const bool undoes;

    // before the ubatch had cells
    std::vector<llama_memory_recurrent::mem_cell> cells;
    std::vector<uint32_t> rs_idx;
    uint32_t head = 0, used = 0, n = 0;
    int32_t rs_z = -1;

    uint32_t n_seqs = 0; // of the ubatch
    bool runs = false;   // the graph, so states may be half changed
    bool kept = false;   // `states` holds them as they were
    std::vector<uint8_t> states;
    bool clears = false; // what a sequence begins with
    std::string lost;    // why states were lost in this context; empty: none was
};

} // namespace superllama
