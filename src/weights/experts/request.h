// What a device that holds some of a layer's experts wants of the others, for one ubatch.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ggml-backend.h"

struct ggml_tensor;

namespace superllama {

struct expert_request {
    const ggml_tensor * weights;  // one of the layer's tensors of experts
    std::vector<int32_t> chosen;  // by its tokens, one after the other
    std::vector<int32_t> missing; // of these, each once: they are to be sent
    std::vector<int32_t> leaving; // have the places of the missing
    std::vector<int32_t> staying; // are missing too, and the host computes with them
    std::vector<int32_t> guessed; // of the chosen, those that were sent before they were chosen

    // To the device: `matrix` finds an expert's share of a tensor in host memory, which stays there until all were
    // sent.
    using matrix_of = std::function<const uint8_t *(const ggml_tensor * weights)>;
    std::function<void(int32_t expert, const matrix_of & matrix)> send;
    // From the device, of one that leaves: before any is sent.
    std::function<void(int32_t expert, const ggml_tensor * weights, uint8_t * to)> fetch;
    // With those that stay, which are in host memory, or are waited for by the kernels that ask for them.
    std::function<bool(std::string * error)> compute;
    // What was sent is there.
    std::function<void()> finish;
    // Of the next layer that the device holds some of, those that it will probably choose and does not hold. Takes
    // time. Null: there is no such layer.
    std::function<std::vector<int32_t>()> guess;
    const ggml_tensor * next_weights = nullptr; // one of that layer's tensors
};

// What a layer that a device holds some of will probably choose, while the device computes what chooses it.
struct guessed_experts {
    const ggml_tensor * weights;  // one of the layer's tensors of experts
    std::vector<int32_t> experts; // that the device lacks, the most probable first

    // Takes a slot for it, of an expert that the host has. False: there is none.
    using is_on_host = std::function<bool(int32_t expert)>;
    std::function<bool(int32_t expert, const is_on_host & on_host)> find_slot;
    std::function<void(int32_t expert, const expert_request::matrix_of & matrix)> send; // begins to
    std::function<void()> finish; // once nothing is to be sent any more: waits until it is there
};

// Experts that devices hold, for a large batch of which a device computes only this product.
struct experts_on_device {
    std::function<bool(const ggml_tensor * weights, int32_t expert)> has;
    std::function<void(ggml_backend_t backend, const ggml_tensor * weights, int32_t expert, ggml_tensor * to)> copy;
    // All that the batch chose are at `from`: those that it chose most often may stay there. With `may_leave` others
    // may go for them: the host has these too.
    std::function<void(const ggml_tensor * weights, const ggml_tensor * from, const std::vector<int32_t> & most_chosen,
                       bool may_leave)>
        keep;
};

} // namespace superllama
