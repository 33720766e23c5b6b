// What the kernels of packed_attention are given, and the table through which each tier offers them.
#pragma once

#include <cstdint>

namespace xsmoe::packed_attention {

// A tensor (M, H, d) whose last dimension is dense; strides count numbers.
struct Heads {
    const void* at;
    int64_t row_stride, head_stride;
};

// What forward and backward share. One head of one sequence is a unit: unit b * heads + h.
struct Attention {
    int64_t heads, dim;
    Heads q, k, v;
    const int64_t* offsets;  // rows offsets[b] to offsets[b + 1] are sequence b
    int64_t longest;         // rows of the longest sequence
    const uint8_t* keep;     // (B, H, places, places), or null: which weights dropout has left
    int64_t places;
    float grown;  // by what it multiplies them
};

struct Forward : Attention {
    void* y;  // (M, H, d)
};

struct Backward : Attention {
    Heads grad;
    void *dq, *dk, *dv;  // (M, H, d), or null where nobody wants one
};

struct Kernels {
    // Units [first, last). `scratch` has as many bytes as the function of that name says.
    int64_t (*forward_bytes)(const Forward&);
    void (*forward)(const Forward&, int64_t first, int64_t last, void* scratch);
    int64_t (*backward_bytes)(const Backward&);
    void (*backward)(const Backward&, int64_t first, int64_t last, void* scratch);
};

}  // namespace xsmoe::packed_attention
