// The device that an operator's tensors lie on: current while an OnDevice lives, with torch's current stream.
#pragma once

#include <cstdint>

#include "shared/tensors.h"

namespace xsmoe::cuda {

// A cudaStream_t, for sources that do not see CUDA.
using StreamHandle = void*;

// Makes a device current and returns the one that was; nothing where there is none.
int enter_device(int index);
void leave_device(int index, int before);

// torch's current stream on a device.
StreamHandle current_stream(int index);

class OnDevice {
public:
    explicit OnDevice(const Tensor& tensor)
        : index_(tensor.is_cuda() ? static_cast<int>(tensor.get_device_index()) : -1), before_(enter_device(index_)) {}
    ~OnDevice() { leave_device(index_, before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    StreamHandle stream() const { return current_stream(index_); }

private:
    int index_, before_;
};

}  // namespace xsmoe::cuda
