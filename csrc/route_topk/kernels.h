// The arguments of route_topk's kernels, and the table of kernels of an instruction set level.
#pragma once

#include <cstdint>

namespace xsmoe::route_topk {

// A matrix whose element (row, column) is at[row * row_stride + column * column_stride].
struct Matrix {
    const void* at;
    int64_t row_stride, column_stride;
};

struct Forward {
    int64_t experts, chosen;
    bool renormalize;
    Matrix logits;
    void* gates;      // (rows, chosen)
    int64_t* places;  // (rows, chosen), the chosen experts
};

struct Backward {
    int64_t experts, chosen;
    bool renormalize;
    Matrix grad, logits;
    const int64_t* places;
    void* dlogits;  // (rows, experts)
};

struct Kernels {
    int64_t lanes;  // rows that are routed together

    // Route rows [first, last). `scratch` has the bytes that forward_bytes returns. Adds to `counts` (experts,) how
    // often each expert was chosen.
    int64_t (*forward_bytes)(const Forward&);
    void (*forward)(const Forward&, int64_t first, int64_t last, void* scratch, int64_t* counts);
    int64_t (*backward_bytes)(const Backward&);
    void (*backward)(const Backward&, int64_t first, int64_t last, void* scratch);
};

}  // namespace xsmoe::route_topk
