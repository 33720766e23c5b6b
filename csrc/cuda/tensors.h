// Tensors as operators of CUDA kernels take them.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/number_type.h"
#include "shared/tensors.h"

namespace xsmoe::cuda {

// The type of a tensor's numbers; `name` is the argument that an error blames.
inline Number number_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Number::float32;
        case ScalarType::BFloat16:
            return Number::bfloat16;
        case ScalarType::Half:
            return Number::float16;
        default:
            throw std::invalid_argument(
                std::string(name) + " must be float32, bfloat16 or float16 for CUDA kernels, not " +
                torch::headeronly::toString(tensor.scalar_type()) + "; convert it"
            );
    }
}

}  // namespace xsmoe::cuda
