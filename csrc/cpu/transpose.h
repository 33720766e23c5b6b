// The transpose of four rows of four 32-bit words.
#pragma once

#include "cpu/vec.h"

namespace xsmoe::XSMOE_ISA {
namespace {

typedef uint32_t Quad __attribute__((vector_size(16)));
typedef uint16_t HalfQuad __attribute__((vector_size(8)));

// Load four numbers as floats.
XSMOE_INLINE Quad load_quad(const float* from) { return load_as<Quad>(from); }

XSMOE_INLINE Quad load_quad(const BFloat16* from) {
    return __builtin_convertvector(load_as<HalfQuad>(from), Quad) << 16;
}

XSMOE_INLINE void transpose(Quad (&rows)[4]) {
    const Quad a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
    const Quad b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
    const Quad c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
    const Quad d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    rows[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    rows[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    rows[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
