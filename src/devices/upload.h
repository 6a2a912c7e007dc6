// Fills tensors on devices with their weights: from host memory where their bytes lie there as they are in the file,
// else from the file, the next range being read while one is on its way.
#pragma once

#include "weights/store.h"

#include <string>
#include <vector>

namespace superllama {

// A tensor that already has its place on a device.
struct device_upload_tensor {
    ggml_tensor * tensor;
    weight_source source;
    std::vector<const uint8_t *> held; // its equal shares in host memory; none: in the file
};

// Host memory that an upload takes at most.
size_t device_upload_staging();

// `ahead`: read in a thread of its own. False with the reason in `error`; the tensors are then not to be used.
bool device_upload(const weight_store & store, const std::vector<device_upload_tensor> & tensors, bool ahead,
                   std::string * error);

} // namespace superllama
