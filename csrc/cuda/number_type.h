// The types of numbers that kernels for GPUs take.
#pragma once

namespace xsmoe::cuda {

enum class Number { float32, bfloat16, float16 };

}  // namespace xsmoe::cuda
