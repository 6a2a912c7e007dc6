// Experts that a layer on a device will probably choose, sent to its bank while the device computes what chooses them,
// by a way beside its products: the host waits there anyway. How many are sent at once follows what came in time.
#pragma once

#include "devices/device_wait.h"
#include "devices/expert_bank.h"
#include "weights/experts/request.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace superllama {

class guessed_sends {
  public:
    explicit guessed_sends(ggml_backend_dev_t dev);

    using serve_guess = std::function<void(const guessed_experts & g)>;

    bool may_send(); // now: else nothing has to be guessed

    // Sends as many of the guessed as come in time, the first ones, and waits for them and for what the device
    // computes. `t_begin_us`: since when the host waits for it.
    void send(ggml_backend_t backend, expert_bank & b, const std::vector<int32_t> & guessed, int64_t t_begin_us,
              const serve_guess & serve);
    const std::vector<int32_t> & sent() const { return last; } // by the last send()
    // What the layer chose of that.
    std::vector<int32_t> settle(const std::vector<int32_t> & chosen);

  private:
    bool wait(ggml_backend_t backend, int64_t t_begin_us);

    ggml_backend_dev_t dev;
    bool tried = false;      // to find such a way
    ggml_backend_ptr copies; // null: the device has no such way
    device_wait sending;     // where copies wait for what the device computes, it is long
    size_t n_max = 1;        // sent at once
    bool more = false;       // were to be sent by the last send()
    bool late = false;       // the device waited for it
    int n_wasted = 0;        // it did, for what was mostly wrong: so many times, one after the other
    int n_left_out = 0;
    std::vector<int32_t> last; // that were sent
};

} // namespace superllama
