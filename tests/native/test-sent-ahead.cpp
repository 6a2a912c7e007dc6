// Weights that a thread sends before the graph wants them, over random schedules: what arrived is what is wanted, and a
// block that is on its way is not overwritten, whatever leaves memory meanwhile. The device is the processor.

#include "weights/sent_ahead.h"

#include "check.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstring>
#include <random>
#include <thread>

void llama_log_internal(ggml_log_level, const char *, ...) {}

static const int64_t n_row = 1024, n_rows = 80, n_expert = 24; // a matrix has 320 kB
static const int n_dense = 12, n_moe = 3;
static const int elsewhere = 7, resident = 8; // among them: a matrix of another device, and one that is no block

// A store whose blocks are numbers that are made when they are "read": one matrix each, or one expert of a layer.
namespace superllama {

struct weight_store::impl {
    std::vector<std::vector<uint8_t>> memory; // of each block
    std::map<const ggml_tensor *, uint32_t> first;
};

static std::vector<ggml_tensor *> matrices; // of the model

weight_store::weight_store(int) : pimpl(new impl) {
    for (ggml_tensor * t : matrices) {
        pimpl->first[t] = (uint32_t) all_blocks.size();
        for (int64_t e = 0; e < t->ne[2]; ++e) {
            weight_block b;
            b.layer = (int32_t) pimpl->first.size();
            b.expert = t->ne[2] > 1 ? (int32_t) e : -1;
            b.bytes = t->nb[2];
            b.slices.push_back({ t, b.bytes, { 0, 0 }, b.bytes, 0 });
            all_blocks.push_back(b);
            pimpl->memory.emplace_back(b.bytes, (uint8_t) 0xff);
        }
    }
}

weight_store::~weight_store() = default;

int32_t weight_store::n_experts(const ggml_tensor * t) const {
    return t->ne[2] > 1 ? (int32_t) t->ne[2] : 0;
}
int32_t weight_store::block_of(const ggml_tensor * t, int32_t e) const {
    return t == matrices[resident] ? -1 : (int32_t) pimpl->first.at(t) + e;
}
const std::vector<uint32_t> & weight_store::pieces_of(const ggml_tensor *) const {
    static const std::vector<uint32_t> none;
    return none;
}
size_t weight_store::slice_of(uint32_t, const ggml_tensor *) const {
    return 0;
}
const uint8_t * weight_store::data(uint32_t id, size_t) const {
    return pimpl->memory[id].data();
}
bool weight_store::is_locked(const ggml_tensor * t) const {
    return t->ne[2] > 1;
}
bool weight_store::verified(uint32_t) const {
    return true;
}
bool weight_store::verify(uint32_t, std::string *) {
    return true;
}
void weight_store::publish(uint32_t, size_t) {}
void weight_store::drop(uint32_t id) {
    std::fill(pimpl->memory[id].begin(), pimpl->memory[id].end(), (uint8_t) 0xff);
}

std::vector<weight_part> weight_store::parts(uint32_t id, size_t) const {
    return { { id, 0, 0, all_blocks[id].bytes } };
}

static uint8_t content(uint32_t id) {
    return (uint8_t) (1 + id % 250);
}

bool weight_store::read_part(const weight_part & part, std::string *) const {
    std::fill(pimpl->memory[part.block].begin(), pimpl->memory[part.block].end(), content(part.block));
    return true;
}

} // namespace superllama

using namespace superllama;

namespace {

struct owner : block_owner {
    weight_store & store;
    explicit owner(weight_store & store) : store(store) {}
    void take_memory(uint32_t) override {}
    void give_memory_back(uint32_t id) override { store.drop(id); }
    bool may_stay(uint32_t) const override { return true; }
};

struct model {
    ggml_context_ptr ctx{ ggml_init({ 4 * (n_dense + n_moe) * ggml_tensor_overhead(), nullptr, true }) };
    ggml_context_ptr ctx_to{ ggml_init({ 4 * (n_dense + n_moe) * ggml_tensor_overhead(), nullptr, true }) };
    ggml_backend_buffer_ptr buffer;
    layer_graph graph;

    model() {
        for (int i = 0; i < n_dense + n_moe; ++i) {
            const bool moe = i % 5 == 4;
            matrices.push_back(
                ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_row, moe ? 4 : n_rows, moe ? n_expert : 1));
            graph.copies.push_back({ matrices.back(), ggml_dup_tensor(ctx_to.get(), matrices.back()) });
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_to.get(), ggml_backend_cpu_buffer_type()));
    }
};

bool is_filled(const ggml_tensor & t, uint8_t with, int64_t e = 0) {
    const uint8_t * data = (const uint8_t *) t.data + (size_t) e * t.nb[2];
    return std::all_of(data, data + t.nb[2], [with](uint8_t b) { return b == with; });
}

} // namespace

int main() {
    model m;
    weight_store store(2);
    block_loader loader(store, 2, 1u << 20);
    owner blocks(store);
    loader.set_owners(blocks, blocks);
    ggml_backend_ptr copies(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ggml_backend_buffer_ptr memory(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), 1000000));
    std::atomic<int> n_sent{ 0 };
    sent_ahead ahead(store, loader,
                     { [&](const ggml_tensor * to) {
                          const bool none = to == m.graph.copies[elsewhere].to; // is of another device
                          return none ? sent_ahead::device() : sent_ahead::device{ memory.get(), copies.get() };
                      },
                       [&](ggml_tensor * to, const uint8_t * data, size_t bytes) {
                           ggml_backend_tensor_set(to, data, 0, bytes);
                           n_sent++;
                       },
                       [&](const ggml_tensor * t) { // every other one
                           std::vector<uint32_t> ids;
                           for (int32_t e = 0; e < store.n_experts(t); e += 2) {
                               ids.push_back((uint32_t) store.block_of(t, e));
                           }
                           return ids;
                       } });

    std::mt19937 random(3);
    int n_whole = 0, n_dense_arrived = 0, n_experts_arrived = 0;
    for (int round = 0; round < 300; ++round) {
        ahead.begin(m.graph);
        const bool ends_early = random() % 8 == 0;
        for (const layer_copy & c : m.graph.copies) {
            if (random() % 4 == 0) {
                std::this_thread::sleep_for(std::chrono::microseconds(random() % 400));
            }
            if (ends_early && random() % 10 == 0) {
                break;
            }
            if (c.weights == matrices[resident]) {
                continue;
            }
            auto lock = loader.lock();
            const int32_t n = std::max(1, store.n_experts(c.weights));
            for (int32_t e = 0; e < n; ++e) { // some leave, some come
                const auto any = (uint32_t) (random() % loader.size());
                if (loader[any].idle() && random() % 2 == 0) {
                    loader.drop(any);
                }
                const auto id = (uint32_t) store.block_of(c.weights, e);
                loader[id].in_use = true;
                if (loader[id].state == block_state::absent) {
                    loader.begin(id, 0, lock);
                }
            }
            if (random() % 8 != 0) { // else the graph does not want it
                if (const auto there = ahead.take(c.to, lock)) {
                    lock.unlock();
                    for (int32_t e = 0; e < n; ++e) {
                        const bool came = there->experts.empty() || there->experts[(size_t) e];
                        CHECK(!came || is_filled(there->at, content((uint32_t) store.block_of(c.weights, e)), e));
                        n_experts_arrived += came && !there->experts.empty() ? 1 : 0;
                    }
                    n_dense_arrived += there->experts.empty() ? 1 : 0;
                    CHECK(c.to != m.graph.copies[elsewhere].to);
                    lock.lock();
                    ahead.go_on();
                }
            }
            for (int32_t e = 0; e < n; ++e) {
                loader.wait_for((uint32_t) store.block_of(c.weights, e), lock);
                loader[(uint32_t) store.block_of(c.weights, e)].in_use = false;
            }
        }
        ahead.end();
        auto lock = loader.lock(); // nothing is on its way to the device: all may go
        loader.wait_for_sending(lock);
        for (uint32_t id = 0; id < loader.size(); ++id) {
            loader.wait_for(id, lock);
            loader[id].in_use = false;
            CHECK(!loader[id].sending);
            if (random() % 4 == 0 && loader[id].idle()) {
                loader.drop(id);
            }
        }
    }
    // while the graph is elsewhere, all that is expected goes
    for (int round = 0; round < 20; ++round) {
        auto lock = loader.lock();
        for (uint32_t id = 0; id < loader.size(); ++id) {
            if (loader[id].state == block_state::absent) {
                loader.begin(id, 0, lock);
            }
            loader.wait_for(id, lock);
        }
        lock.unlock();
        ahead.begin(m.graph);
        for (const layer_copy & c : m.graph.copies) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            lock.lock();
            if (const auto there = ahead.take(c.to, lock)) {
                n_whole += std::count(there->experts.begin(), there->experts.end(), true) == n_expert / 2 ? 1 : 0;
                ahead.go_on();
            }
            lock.unlock();
        }
        ahead.end();
    }
    CHECK(n_whole > 0);
    CHECK(n_dense_arrived > 0 && n_experts_arrived > 0 && n_sent >= n_dense_arrived);
    ahead.begin(m.graph); // ends with one that has begun
    ahead.stop();
    loader.stop();
    printf("%d matrices, %d experts\nok\n", n_dense_arrived, n_experts_arrived);
    return 0;
}
