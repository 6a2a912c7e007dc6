#include "devices/turns.h"

#include "devices/device_wait.h"

#include "ggml-backend-impl.h"

#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <type_traits>
#include <utility>

namespace superllama {

namespace {

struct turn {
    ggml_backend_i plain;                        // the backend's own functions
    std::shared_ptr<std::recursive_mutex> mutex; // of all backends of a context: a copy is between two of them
    std::unique_ptr<device_wait> wait;
};

struct turns {
    std::shared_mutex mutex; // of the map; what is in it stays where it is
    std::map<ggml_backend_t, turn> of;

    const turn & find(ggml_backend_t backend) {
        const std::shared_lock<std::shared_mutex> lock(mutex);
        return of.at(backend);
    }
};

turns & all() {
    static turns found;
    return found;
}

template <typename Signature>
struct in_turn;

template <typename Result, typename... Args>
struct in_turn<Result (*)(ggml_backend_t, Args...)> {
    template <auto call>
    static Result made(ggml_backend_t backend, Args... args) {
        const turn & t = all().find(backend);
        const std::lock_guard<std::recursive_mutex> lock(*t.mutex);
        return (t.plain.*call)(backend, args...);
    }
};

// Its function is the one of the backend that gets the copy.
bool copy_in_turn(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * src, ggml_tensor * dst) {
    const turn & t = all().find(to);
    const std::lock_guard<std::recursive_mutex> lock(*t.mutex);
    return t.plain.cpy_tensor_async(from, to, src, dst);
}

ggml_status compute_in_turn(ggml_backend_t backend, ggml_cgraph * graph) {
    const turn & t = all().find(backend);
    const std::lock_guard<std::recursive_mutex> lock(*t.mutex);
    const ggml_status status = t.plain.graph_compute(backend, graph);
    if (status == GGML_STATUS_SUCCESS) {
        t.wait->begin(backend, graph);
    }
    return status;
}

void wait_in_turn(ggml_backend_t backend) {
    const turn & t = all().find(backend);
    const std::lock_guard<std::recursive_mutex> lock(*t.mutex);
    t.wait->wait(backend, t.plain.synchronize);
}

template <auto call>
void take(ggml_backend_i & iface) {
    using signature = std::remove_reference_t<decltype(std::declval<ggml_backend_i &>().*call)>;
    if (iface.*call != nullptr) {
        iface.*call = in_turn<signature>::template made<call>;
    }
}

void take_all(ggml_backend_i & iface) {
    take<&ggml_backend_i::set_tensor_async>(iface);
    take<&ggml_backend_i::get_tensor_async>(iface);
    take<&ggml_backend_i::set_tensor_2d_async>(iface);
    take<&ggml_backend_i::get_tensor_2d_async>(iface);
    take<&ggml_backend_i::event_record>(iface);
    take<&ggml_backend_i::event_wait>(iface);
    take<&ggml_backend_i::graph_optimize>(iface);
    iface.graph_compute = compute_in_turn;
    if (iface.synchronize != nullptr) {
        iface.synchronize = wait_in_turn;
    }
    if (iface.cpy_tensor_async != nullptr) {
        iface.cpy_tensor_async = copy_in_turn;
    }
}

} // namespace

backend_turns::backend_turns(const std::vector<ggml_backend_t> & backends) {
    const auto mutex = std::make_shared<std::recursive_mutex>();
    const std::unique_lock<std::shared_mutex> lock(all().mutex);
    for (ggml_backend_t backend : backends) {
        if (ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            continue; // nothing runs on behind a call of it
        }
        all().of[backend] = { backend->iface, mutex, std::make_unique<device_wait>() };
        take_all(backend->iface);
        taken.push_back(backend);
    }
}

backend_turns::~backend_turns() {
    const std::unique_lock<std::shared_mutex> lock(all().mutex);
    for (ggml_backend_t backend : taken) {
        backend->iface = all().of[backend].plain;
        all().of.erase(backend);
    }
}

} // namespace superllama
