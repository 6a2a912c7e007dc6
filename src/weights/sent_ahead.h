// Weights of the host that a device computes a large batch with, sent before the graph comes to them, in its order, by
// a thread: while the device computes with one matrix, and the host what is its own, the next ones are on their way.
// They wait in memory of the device, from which a copy within it takes them to where the graph reads them.
#pragma once

#include "weights/block_loader.h"
#include "weights/graph.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

namespace superllama {

class sent_ahead {
  public:
    struct device {
        ggml_backend_buffer_t memory = nullptr; // null: there is none, and nothing is sent
        ggml_backend_t copies = nullptr;        // the thread's own
    };

    struct config {
        std::function<device(const ggml_tensor * to)> device_of; // what it has for this, until end()
        std::function<void(ggml_tensor * to, const uint8_t * data, size_t bytes)> send;
        // Of a tensor of experts: the blocks of those that the batch will probably choose. With the loader's lock held.
        std::function<std::vector<uint32_t>(const ggml_tensor * weights)> expected;
    };

    sent_ahead(weight_store & store, block_loader & loader, config cfg);
    ~sent_ahead(); // after stop()
    void stop();   // joins the thread

    void begin(const layer_graph & graph);
    void end();

    // Where the weights wait that the graph wants to have copied to `to`; nothing: they have not been sent. Those whose
    // turn was before are not wanted any more. The lock is the loader's. Until go_on() they stay.
    struct arrived {
        ggml_tensor at;
        std::vector<bool> experts; // of a tensor of experts, those that are there
    };
    std::optional<arrived> take(const ggml_tensor * to, block_loader::guard & lock);
    void go_on(); // past what was taken

  private:
    enum class step { waits, goes, there };

    struct item {
        const ggml_tensor * weights;
        ggml_tensor * to;
        size_t bytes;
        size_t first; // in the device's memory
        step state;
        std::vector<bool> experts;
    };

    void run();
    bool may_go(item & it) const;
    bool find_room(item & it) const;
    void send(item & it, block_loader::guard & lock);
    void send_experts(item & it, block_loader::guard & lock);
    ggml_tensor place_of(const item & it) const;
    bool is_over() const { return next >= items.size(); }

    weight_store & store;
    block_loader & loader;
    const config cfg;
    std::thread thread; // begins with the first graph that has something to send

    // With the loader's lock held.
    device there;
    std::deque<item> items;        // of the graph that runs, in its order
    size_t next = 0;               // of the thread
    size_t taken = 0;              // those before it are not wanted any more
    const item * wanted = nullptr; // the graph waits for it
    bool ending = false;
    bool sends = false;
    bool stopping = false;
};

} // namespace superllama
