#include "server/set_aside.h"

#include "io/temporary.h"

#include <numeric>

namespace superllama {

static uint64_t sum(const std::vector<uint64_t> & sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), uint64_t(0));
}

aside_file::aside_file(std::string folder) : file(unnamed_file(folder, "a file of kept prompts")) {}

bool aside_file::write(const state_parts & parts) {
    std::vector<uint64_t> written;
    uint64_t at = n_written;
    for (const auto * part : parts) {
        if (write_exact(file.get(), const_cast<uint8_t *>(part->data()), part->size(), at).done < part->size()) {
            return false;
        }
        at += part->size();
        written.push_back(part->size());
    }
    forget_written(file.get(), n_written, at - n_written);
    n_written = at;
    sizes.push_back(std::move(written));
    for (auto * part : parts) {
        std::vector<uint8_t>().swap(*part);
    }
    return true;
}

uint64_t aside_file::all_bytes() const {
    return n_written - n_read;
}

uint64_t aside_file::next_bytes() const {
    return sizes.empty() ? 0 : sum(sizes.front());
}

bool aside_file::read(const state_parts & parts) {
    if (sizes.empty() || sizes.front().size() != parts.size()) {
        return false;
    }
    uint64_t at = n_read;
    for (size_t i = 0; i < parts.size(); ++i) {
        const uint64_t size = sizes.front()[i];
        parts[i]->resize(size);
        if (read_exact(file.get(), parts[i]->data(), size, at).done < size) {
            return false;
        }
        at += size;
    }
    skip();
    return true;
}

void aside_file::skip() {
    if (!sizes.empty()) {
        n_read += sum(sizes.front());
        sizes.pop_front();
    }
}

} // namespace superllama
