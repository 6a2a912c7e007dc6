#include "devices/speeds.h"

#include "ggml-cpp.h"
#include "llama-impl.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <future>
#include <limits>
#include <locale>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace superllama {

static const int n_repeats = 3; // the fastest counts: others were disturbed

double upload_bytes_per_s(ggml_backend_dev_t device, size_t bytes) {
    ggml_backend_buffer_type_t host = ggml_backend_dev_host_buffer_type(device);
    if (host == nullptr || bytes == 0) {
        return 0;
    }
    const ggml_backend_buffer_ptr from(ggml_backend_buft_alloc_buffer(host, bytes));
    const ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * to = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, (int64_t) bytes);
    const ggml_backend_buffer_ptr buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(device)));
    if (from == nullptr || buffer == nullptr) {
        return 0;
    }
    const void * data = ggml_backend_buffer_get_base(from.get());
    int64_t best_us = INT64_MAX;
    for (int i = 0; i < n_repeats + 1; ++i) { // the first one finds memory that was never used
        const int64_t t_begin = ggml_time_us();
        ggml_backend_tensor_set(to, data, 0, bytes);
        best_us = i == 0 ? best_us : std::min(best_us, ggml_time_us() - t_begin);
    }
    return (double) bytes * 1e6 / (double) std::max<int64_t>(1, best_us);
}

static double measured_memory(size_t buffer_bytes, unsigned n_threads) {
    const std::vector<uint64_t> words(buffer_bytes / sizeof(uint64_t), 1);
    const size_t share = words.size() / n_threads;
    const auto sum = [&](size_t i) {
        return std::accumulate(words.begin() + (ptrdiff_t) (i * share), words.begin() + (ptrdiff_t) ((i + 1) * share),
                               (uint64_t) 0);
    };
    int64_t best_us = INT64_MAX;
    uint64_t read = 0; // of words: that they are used keeps them from being left out
    for (int i = 0; i < n_repeats; ++i) {
        const int64_t t_begin = ggml_time_us();
        std::vector<std::future<uint64_t>> sums;
        for (size_t t = 0; t < n_threads; ++t) {
            sums.push_back(std::async(std::launch::async, sum, t));
        }
        for (std::future<uint64_t> & f : sums) {
            read += f.get();
        }
        best_us = std::min(best_us, ggml_time_us() - t_begin);
    }
    return (double) (read / n_repeats * sizeof(uint64_t)) * 1e6 / (double) std::max<int64_t>(1, best_us);
}

double memory_bytes_per_s(size_t buffer_bytes) {
    static std::atomic<double> known{ 0 };
    try {
        if (known <= 0) {
            known = measured_memory(buffer_bytes, std::max(1u, std::thread::hardware_concurrency() / 2));
        }
    } catch (const std::exception &) { // no memory or no threads for it
    }
    return known;
}

static const double always = std::numeric_limits<double>::infinity();

static double asked_share(const std::string & asked) {
    if (asked == "send" || asked == "stay") {
        return asked == "send" ? always : 0;
    }
    std::istringstream text(asked);
    text.imbue(std::locale::classic());
    double share = 0;
    if (!(text >> share) || !text.eof() || !(share >= 0)) {
        throw std::runtime_error("SUPERLLAMA_EXPERTS=" + asked +
                                 ": it is send, stay, or the speed of the way to the card as a part of the memory's, "
                                 "such as 0.3");
    }
    return share;
}

double link_share(ggml_backend_dev_t device, size_t device_bytes, size_t buffer_bytes) {
    if (const char * asked = getenv("SUPERLLAMA_EXPERTS")) {
        return asked_share(asked);
    }
    const double link = upload_bytes_per_s(device, device_bytes);
    const double memory = memory_bytes_per_s(buffer_bytes);
    LLAMA_LOG_INFO("%s: %.1f GB/s to %s, %.1f GB/s within memory\n", __func__, link / 1e9,
                   ggml_backend_dev_name(device), memory / 1e9);
    return memory > 0 ? link / memory : always;
}

} // namespace superllama
