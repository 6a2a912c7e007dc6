// Blocks by when they were used last.
#pragma once

#include <cstdint>
#include <list>
#include <vector>

namespace superllama {

class recency {
  public:
    explicit recency(size_t n_blocks) : at(n_blocks), listed(n_blocks) {}

    void touch(uint32_t id) { // used now
        if (listed[id]) {
            ids.splice(ids.end(), ids, at[id]);
        } else {
            at[id] = ids.insert(ids.end(), id);
            listed[id] = true;
        }
    }

    void add_cold(uint32_t id) { // the first to leave, until somebody uses it
        remove(id);
        at[id] = ids.insert(ids.begin(), id);
        listed[id] = true;
    }

    void remove(uint32_t id) {
        if (listed[id]) {
            ids.erase(at[id]);
            listed[id] = false;
        }
    }

    const std::list<uint32_t> & oldest_first() const { return ids; }

  private:
    std::list<uint32_t> ids;
    std::vector<std::list<uint32_t>::iterator> at;
    std::vector<bool> listed;
};

} // namespace superllama
