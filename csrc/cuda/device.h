// The device that an operator's tensors lie on: current while an OnDevice lives, with torch's current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "shared/tensors.h"

namespace xsmoe::cuda {

// A cudaStream_t, for sources that do not see CUDA.
using StreamHandle = void*;

// torch's current stream on a device.
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
