// A guard that makes the device of an operator's tensors current, and torch's current stream on it.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "shared/tensors.h"

namespace xsmoe::cuda {

// A cudaStream_t, for sources that do not include CUDA's headers.
using StreamHandle = void*;

// Return torch's current stream on a device.
StreamHandle current_stream(int index);

class OnDevice {
public:
    explicit OnDevice(const Tensor& tensor) {
        if (!tensor.is_cuda()) return;
        index_ = tensor.get_device_index();
        guard_.emplace(tensor.get_device_index());
    }

    StreamHandle stream() const { return current_stream(index_); }

private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    int index_ = -1;
};

}  // namespace xsmoe::cuda
