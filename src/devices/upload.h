// Fills tensors on devices with their weights: from host memory where their bytes lie there as they are in the file,
// else from the file, the next range being read while one is on its way.
#pragma once

#include "devices/locked_staging.h"
#include "weights/store.h"

#include <string>
#include <vector>

namespace superllama {

// A tensor that already has its place on a device.
struct device_upload_tensor {
    ggml_tensor * tensor;
    weight_source source;
    std::vector<const uint8_t *> held; // its equal shares in host memory; none: in the file
    bool held_locked;                  // page-locked, so that a device reads them well
};

ggml_backend_dev_t device_with(const ggml_tensor * t); // that has its memory

// Host memory that an upload takes at most, where it has none that is page-locked.
size_t device_upload_staging();

// `ahead`: read in a thread of its own. `locked`: by way of which to go to a device; null: there is none for it. False
// with the reason in `error`; the tensors are then not to be used.
bool device_upload(const weight_store & store, const std::vector<device_upload_tensor> & tensors, bool ahead,
                   const std::function<locked_staging *(ggml_backend_dev_t)> & locked, std::string * error);

} // namespace superllama
