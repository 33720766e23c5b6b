// Number types of tensors.
#pragma once

#include <cstdint>

namespace xsmoe {

// A bfloat16 number: the upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

}  // namespace xsmoe
