#include "weights/experts/frame_memory.h"

#include "ggml-cpp.h"
#include "ggml-impl.h"
#include "io/address_space.h"

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

namespace superllama {

static const size_t huge_bytes_min = 64u << 20; // of all frames; below, huge pages would be a large share of them
static const size_t slab_bytes_max = 32u << 20; // asked of a device's library at once, which takes its time for each
static const size_t n_slabs = 64;               // of all frames, or more: what is not filled is a small share of them

static size_t page_of(size_t frame_bytes, size_t n_max) {
    return frame_bytes * n_max < huge_bytes_min ? system_page() : huge_page;
}

static size_t frames_in_slab(size_t frame_bytes, size_t n_max) {
    return std::max<size_t>(1, std::min(slab_bytes_max, frame_bytes * n_max / n_slabs) / frame_bytes);
}

namespace {

// Frames lie on huge pages where there are many of them; the last page is then partly unused.
class own_pages : public frame_memory {
  public:
    own_pages(size_t frame_bytes, size_t n_max) :
        frame_bytes(frame_bytes),
        page(page_of(frame_bytes, n_max)),
        range(frame_bytes * n_max, page, "experts") {}

    uint8_t * at(size_t i) const override { return range.base() + i * frame_bytes; }

    void grow(size_t i) override {
        const auto pages = pages_of(i);
        if (pages.first < pages.second) {
            address_commit(range.base() + pages.first, pages.second - pages.first, kind_of(page));
        }
    }

    void shrink(size_t i) override {
        const auto pages = pages_of(i);
        if (pages.first < pages.second) {
            address_decommit(range.base() + pages.first, pages.second - pages.first);
        }
    }

  private:
    // Where the pages begin and end that this frame needs beside those before it.
    std::pair<size_t, size_t> pages_of(size_t i) const {
        return { round_up(i * frame_bytes, page), round_up((i + 1) * frame_bytes, page) };
    }

    size_t frame_bytes;
    size_t page; // memory comes and goes in these
    address_range range;
};

class locked_slabs : public frame_memory {
  public:
    locked_slabs(size_t frame_bytes, size_t n_max, ggml_backend_buffer_type_t buft) :
        frame_bytes(frame_bytes),
        n_each(frames_in_slab(frame_bytes, n_max)),
        buft(buft) {}

    uint8_t * at(size_t i) const override {
        uint8_t * base = (uint8_t *) ggml_backend_buffer_get_base(slabs[i / n_each].get());
        return (uint8_t *) GGML_PAD((uintptr_t) base, system_page()) + i % n_each * frame_bytes;
    }

    void grow(size_t i) override {
        if (i % n_each > 0) {
            return;
        }
        // files are read straight into frames, which begin a page
        slabs.emplace_back(ggml_backend_buft_alloc_buffer(buft, n_each * frame_bytes + system_page()));
        if (slabs.back() == nullptr) {
            slabs.pop_back();
            throw std::bad_alloc();
        }
        if (ggml_backend_buffer_get_type(slabs.back().get()) != buft && !told) {
            told = true;
            GGML_LOG_WARN(
                "superllama: experts in host memory are not page-locked, for there is no more memory that can "
                "be; devices take them more slowly\n");
        }
    }

    void shrink(size_t i) override {
        if (i % n_each == 0) {
            slabs.pop_back();
        }
    }

  private:
    size_t frame_bytes;
    size_t n_each; // frames in a slab
    ggml_backend_buffer_type_t buft;
    std::vector<ggml_backend_buffer_ptr> slabs;
    bool told = false;
};

} // namespace

std::unique_ptr<frame_memory> frame_memory::create(size_t frame_bytes, size_t n_max,
                                                   ggml_backend_buffer_type_t locked) {
    if (locked != nullptr) {
        return std::make_unique<locked_slabs>(frame_bytes, n_max, locked);
    }
    return std::make_unique<own_pages>(frame_bytes, n_max);
}

size_t frame_memory::slack(size_t frame_bytes, size_t n_max, bool locked) {
    if (!locked) {
        return page_of(frame_bytes, n_max) - system_page();
    }
    const size_t n_each = frames_in_slab(frame_bytes, n_max);
    return (n_each - 1) * frame_bytes + (n_max + n_each - 1) / n_each * system_page();
}

} // namespace superllama
