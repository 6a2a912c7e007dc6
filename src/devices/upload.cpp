#include "devices/upload.h"

#include "ggml-backend.h"
#include "io/address_space.h"
#include "io/rpc_units.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>

namespace superllama {

static const size_t read_bytes_max = 4u << 20; // read at once; a multiple of send_bytes()
static_assert(read_bytes_max == rpc_unit_bytes, "what is read at once is what an RPC server is asked for");
static const size_t read_gap_max = 64u << 10; // bytes between two tensors that are read along

namespace {

struct piece {
    ggml_tensor * tensor;
    size_t first;
    size_t bytes;
    weight_source source;
};

struct read_range {
    weight_source source;
    size_t bytes;
    std::vector<piece> pieces;
};

} // namespace

ggml_backend_dev_t device_with(const ggml_tensor * t) {
    return ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
}

// On its way over RPC a message is copied four times; one of this size stays in the processors' caches meanwhile.
// Devices with copy engines of their own want it large, and so does a server that may have the weights itself: it is
// asked once for each.
static size_t send_bytes(const ggml_tensor * t) {
    ggml_backend_dev_t dev = device_with(t);
    ggml_backend_reg_t reg = dev != nullptr ? ggml_backend_dev_backend_reg(dev) : nullptr;
    if (reg == nullptr || strcmp(ggml_backend_reg_name(reg), "RPC") != 0) {
        return read_bytes_max;
    }
    const auto has_weights =
        (bool (*)(ggml_backend_dev_t)) ggml_backend_reg_get_proc_address(reg, "superllama_rpc_has_weights");
    return has_weights != nullptr && has_weights(dev) ? rpc_unit_bytes : 256u << 10;
}

static void send(ggml_tensor * t, const uint8_t * data, size_t first, size_t bytes) {
    const size_t step = send_bytes(t);
    for (size_t done = 0; done < bytes; done += step) {
        ggml_backend_tensor_set(t, data + done, first + done, std::min(step, bytes - done));
    }
}

static void add_piece(std::vector<read_range> & ranges, const device_upload_tensor & t, size_t first, size_t n) {
    const weight_source from = { t.source.file, t.source.offset + first };
    const uint64_t end = ranges.empty() ? 0 : ranges.back().source.offset + ranges.back().bytes;
    if (ranges.empty() || ranges.back().source.file != from.file || from.offset < end ||
        from.offset - end > read_gap_max || from.offset + n - ranges.back().source.offset > read_bytes_max) {
        ranges.push_back({ from, 0, {} });
    }
    ranges.back().bytes = from.offset + n - ranges.back().source.offset;
    ranges.back().pieces.push_back({ t.tensor, first, n, from });
}

// Neighbours in the file are read together. Pieces are the units of io/rpc_units.h.
static std::vector<read_range> ranges_of(const std::vector<device_upload_tensor> & tensors) {
    std::vector<read_range> ranges;
    for (const auto & t : tensors) {
        const size_t bytes = !t.held.empty() ? 0 : ggml_nbytes(t.tensor);
        const size_t slice = std::max<size_t>(1, bytes / rpc_slices(t.tensor));
        for (size_t begin = 0; begin < bytes; begin += slice) {
            for (size_t at = 0; at < slice; at += rpc_unit_bytes) {
                add_piece(ranges, t, begin + at, std::min(rpc_unit_bytes, slice - at));
            }
        }
    }
    return ranges;
}

static size_t staging_bytes() {
    return read_bytes_max + 3 * system_page(); // begins a page, and a range may end in the middle of one
}

size_t device_upload_staging() {
    return 2 * staging_bytes();
}

bool device_upload(const weight_store & store, const std::vector<device_upload_tensor> & tensors, bool ahead,
                   const std::function<locked_staging *(ggml_backend_dev_t)> & locked, std::string * error) {
    for (const auto & t : tensors) {   // what is in host memory was looked through on its way there
        locked(device_with(t.tensor)); // is made here, before another thread asks for it
        if (t.held.empty() && !store.check_tensor(t.tensor, t.source, error)) {
            return false;
        }
    }
    const std::vector<read_range> ranges = ranges_of(tensors);
    std::unique_ptr<uint8_t[]> staging[2];
    std::string read_error;
    const auto read = [&](size_t i) -> const uint8_t * {
        locked_staging * by_way = locked(device_with(ranges[i].pieces.front().tensor));
        auto & at = staging[i % 2];
        if (at == nullptr && by_way == nullptr) {
            at.reset(new uint8_t[staging_bytes()]);
        }
        uint8_t * memory = by_way != nullptr ? by_way->half((int) i % 2) : at.get();
        uint8_t * page = (uint8_t *) GGML_PAD((uintptr_t) memory, system_page());
        return store.read(ranges[i].source, ranges[i].bytes, page, &read_error);
    };
    const auto when = ahead ? std::launch::async : std::launch::deferred;
    std::future<const uint8_t *> next;
    if (!ranges.empty() && locked(device_with(ranges[0].pieces.front().tensor)) == nullptr) {
        next = std::async(when, read, 0); // while what is in memory goes, by no way that the two share
    }
    for (const auto & t : tensors) {
        locked_staging * by_way = locked(device_with(t.tensor));
        const size_t share = t.held.empty() ? 0 : ggml_nbytes(t.tensor) / t.held.size();
        for (size_t k = 0; k < t.held.size(); ++k) {
            if (by_way != nullptr && !t.held_locked) {
                by_way->send(t.tensor, k * share, t.held[k], share);
            } else {
                send(t.tensor, t.held[k], k * share, share);
            }
        }
    }
    if (!ranges.empty() && !next.valid()) {
        next = std::async(when, read, 0);
    }
    for (size_t i = 0; i < ranges.size(); ++i) {
        const uint8_t * data = next.get();
        if (data == nullptr) {
            *error = read_error;
            return false;
        }
        if (i + 1 < ranges.size()) {
            next = std::async(when, read, i + 1);
        }
        for (const piece & p : ranges[i].pieces) {
            send(p.tensor, data + (p.source.offset - ranges[i].source.offset), p.first, p.bytes);
        }
    }
    return true;
}

} // namespace superllama
