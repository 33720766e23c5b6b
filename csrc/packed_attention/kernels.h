// The arguments of packed_attention's kernels, and the table of kernels of an instruction set level.
#pragma once

#include <cstdint>

namespace xsmoe::packed_attention {

// A tensor (M, H, d) whose last dimension is contiguous. Strides are in numbers.
struct Heads {
    const void* at;
    int64_t row_stride, head_stride;
};

// The arguments that forward and backward share. One head of one sequence is a unit: unit b * heads + h.
struct Attention {
    int64_t heads, dim;
    Heads q, k, v;
    const int64_t* offsets;  // sequence b has the rows offsets[b] to offsets[b + 1]
    int64_t longest;         // rows of the longest sequence
    const uint8_t* keep;     // (B, H, places, places), or null: the probabilities that dropout keeps
    int64_t places;
    float keep_scale;  // the factor of kept probabilities
};

struct Forward : Attention {
    void* y;  // (M, H, d)
};

struct Backward : Attention {
    Heads grad;
    void *dq, *dk, *dv;  // (M, H, d), or null if not needed
};

struct Kernels {
    // Process units [first, last). `scratch` has the bytes that forward_bytes returns.
    int64_t (*forward_bytes)(const Forward&);
    void (*forward)(const Forward&, int64_t first, int64_t last, void* scratch);
    int64_t (*backward_bytes)(const Backward&);
    void (*backward)(const Backward&, int64_t first, int64_t last, void* scratch);
};

}  // namespace xsmoe::packed_attention
