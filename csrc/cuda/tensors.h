// Tensor arguments of the CUDA operators.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/dtype.h"
#include "shared/tensors.h"

namespace xsmoe::cuda {

// Return the dtype of a tensor. An error names the argument as `name`.
inline Dtype dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Dtype::float32;
        case ScalarType::BFloat16:
            return Dtype::bfloat16;
        case ScalarType::Half:
            return Dtype::float16;
        default:
            throw std::invalid_argument(
                std::string(name) + " must be float32, bfloat16 or float16 for CUDA kernels, not " +
                torch::headeronly::toString(tensor.scalar_type()) + "; convert it"
            );
    }
}

}  // namespace xsmoe::cuda
