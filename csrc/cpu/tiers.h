// The kernels of the tier in use.
//
// An operator's cpu_kernels.cpp defines in each tier's namespace, inside the operator's own, the tables `for_float` and
// `for_bfloat16` of its type `Kernels`. XSMOE_KERNELS_FOR, in the operator's namespace, declares them and defines
// `const Kernels& kernels_for(ScalarType)`.
#pragma once

#include <stdexcept>

#include "cpu/features.h"
#include "cpu/tensors.h"

#define XSMOE_DECLARE_TABLES(tier)                \
    namespace tier {                              \
    extern const Kernels for_float, for_bfloat16; \
    }

#define XSMOE_TABLE_OF(name) \
    case Tier::name:         \
        return narrow ? name::for_bfloat16 : name::for_float;

#define XSMOE_KERNELS_FOR                                                   \
    XSMOE_TIERS(XSMOE_DECLARE_TABLES)                                       \
    namespace {                                                             \
    const Kernels& kernels_for(ScalarType dtype) {                          \
        const bool narrow = dtype == ScalarType::BFloat16;                  \
        switch (tier()) {                                                   \
            XSMOE_TIERS(XSMOE_TABLE_OF)                                     \
            default:                                                        \
                throw std::logic_error("the tier in use was not compiled"); \
        }                                                                   \
    }                                                                       \
    }
