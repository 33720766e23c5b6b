// The dtypes of the CUDA kernels.
#pragma once

namespace xsmoe::cuda {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace xsmoe::cuda
