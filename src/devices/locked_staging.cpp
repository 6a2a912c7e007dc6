#include "devices/locked_staging.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
#include <thread>

namespace superllama {

static const size_t bytes_of_half = 8u << 20; // a device's copy of it takes much longer than to begin one
static const unsigned n_threads_max = 8;      // memory is as fast as it gets with fewer, on most machines

size_t locked_staging::half_bytes() {
    return bytes_of_half;
}

std::unique_ptr<locked_staging> locked_staging::create(ggml_backend_dev_t dev) {
    ggml_backend_buffer_type_t buft = ggml_backend_dev_host_buffer_type(dev);
    if (buft == nullptr) {
        return nullptr;
    }
    std::unique_ptr<locked_staging> s(new locked_staging);
    for (ggml_backend_buffer_ptr & half : s->halves) {
        half.reset(ggml_backend_buft_alloc_buffer(buft, bytes_of_half));
        if (half == nullptr || ggml_backend_buffer_get_type(half.get()) != buft) {
            GGML_LOG_WARN("superllama: no page-locked memory for what goes to %s, which takes it more slowly then\n",
                          ggml_backend_dev_name(dev));
            return nullptr;
        }
    }
    std::string why;
    const unsigned n = std::min(n_threads_max, std::max(2u, std::thread::hardware_concurrency() / 2));
    s->threads = readers::create((int) n, &why);
    return s->threads != nullptr ? std::move(s) : nullptr;
}

// Each thread has a share, at borders that no two of them write near.
std::vector<std::future<void>> locked_staging::fill(int i, const uint8_t * data, size_t bytes) {
    const size_t n = (size_t) threads->n_threads();
    const size_t share = GGML_PAD((bytes + n - 1) / n, 4096);
    std::vector<std::future<void>> parts;
    for (size_t first = 0; first < bytes; first += share) {
        auto copied = std::make_shared<std::promise<void>>();
        parts.push_back(copied->get_future());
        uint8_t * to = half(i) + first;
        const size_t size = std::min(share, bytes - first);
        threads->submit(0, [=](bool) {
            memcpy(to, data + first, size);
            copied->set_value();
            return true;
        });
    }
    return parts;
}

void locked_staging::send(ggml_tensor * to, size_t at, const uint8_t * data, size_t bytes) {
    if (bytes == 0) {
        return;
    }
    std::vector<std::future<void>> filling = fill(0, data, std::min(bytes, bytes_of_half));
    for (size_t done = 0, i = 0; done < bytes; done += bytes_of_half, ++i) {
        const size_t size = std::min(bytes_of_half, bytes - done);
        for (std::future<void> & part : filling) {
            part.get();
        }
        if (done + size < bytes) {
            filling = fill((int) (i + 1) % 2, data + done + size, std::min(bytes_of_half, bytes - done - size));
        }
        ggml_backend_tensor_set(to, half((int) i % 2), at + done, size);
    }
}

} // namespace superllama
