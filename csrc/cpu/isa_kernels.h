// The kernels of the instruction set level in use.
//
// The cpu_kernels.cpp of an operator defines the tables `for_float` and `for_bfloat16` of its type `Kernels`, in each
// level's namespace inside the operator's namespace. XSMOE_KERNELS_FOR, in the operator's namespace, declares the
// tables and defines `const Kernels& kernels_for(ScalarType)`.
#pragma once

#include <stdexcept>

#include "cpu/features.h"
#include "cpu/tensors.h"

#define XSMOE_DECLARE_TABLES(level)               \
    namespace level {                             \
    extern const Kernels for_float, for_bfloat16; \
    }

#define XSMOE_TABLE_OF(name) \
    case IsaLevel::name:     \
        return narrow ? name::for_bfloat16 : name::for_float;

#define XSMOE_KERNELS_FOR                                              \
    XSMOE_ISA_LEVELS(XSMOE_DECLARE_TABLES)                             \
    namespace {                                                        \
    const Kernels& kernels_for(ScalarType dtype) {                     \
        const bool narrow = dtype == ScalarType::BFloat16;             \
        switch (isa_level()) {                                         \
            XSMOE_ISA_LEVELS(XSMOE_TABLE_OF)                           \
            default:                                                   \
                throw std::logic_error("this level was not compiled"); \
        }                                                              \
    }                                                                  \
    }
