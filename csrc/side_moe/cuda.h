// The work of side_moe that CUDA kernels do next to Triton's matrix products: gates, counters, and the gradients of
// logits. A launch computes up to `max_levels` levels. Their operands may differ in everything but the dtype.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace xsmoe::side_moe {

using xsmoe::cuda::Dtype;

constexpr int max_levels = 8;

// gates (rows, gated) = softmax(x router^T). The router is contiguous.
struct GateLevel {
    const void* x;
    int64_t x_stride;
    const void* router;
    float* gates;
    int64_t rows, dim;
    int gated;
    // Whether rows can be read 16 bytes at a time. The launch sets it.
    bool whole;
};

// norm and mass (gated,): the sums over rows of row_weight * gate * sqrt(sum of squares), and of row_weight * gate.
struct CountLevel {
    // (rows, gated) numbers, or one row of them for all rows.
    const float* gates;
    // Sums of squares over blocks of columns, (gated, column_blocks, rows). If one row of gates serves all rows:
    // (gated, column_blocks), and backbone_squares (rows,) for the first gate.
    const float* squares;
    const float* backbone_squares;
    // Null if every row has the weight 1.
    const float* row_weight;
    int64_t rows, column_blocks;
    int gated;
    // Scratch, (count_slices(rows), 2, gated): each slice's contribution to norm and to mass.
    float* parts;
    float* norm;
    float* mass;
};

// grad_logits (rows, padded_logits(gated)), with zeros after `gated`, and grad_backbone (rows, dim) = gate_0 grad.
// Either is null if it is not needed.
struct LogitLevel {
    const void* x;
    const void* backbone;
    const void* grad;
    int64_t x_stride, backbone_stride, grad_stride;
    // (rows, gated).
    const float* gates;
    // (rows, (gated - 1) * chunks): the terms of each expert's gate gradient other than grad . x, as partial sums.
    const float* dots;
    // grad . backbone, if x is one row for all rows of the backbone; otherwise null.
    const float* backbone_dot;
    float* grad_logits;
    void* grad_backbone;
    int64_t rows, dim;
    int gated, chunks;
    // Whether rows can be read and written 16 bytes at a time. The launch sets it.
    bool whole;
};

// Return the number of slices of rows for the counters' sums. It does not depend on the device.
int64_t count_slices(int64_t rows);

// Return the row stride of the logits' gradients: Triton's kernels read 16 bytes at a time.
constexpr int64_t padded_logits(int64_t gated) { return (gated + 15) / 16 * 16; }

void launch_gate(Dtype dtype, const GateLevel* levels, int count, void* stream);

void launch_count(const CountLevel* levels, int count, void* stream);

// If `wide_grad`, grad is float32; otherwise it has the given dtype.
void launch_logit_gradient(Dtype dtype, bool wide_grad, const LogitLevel* levels, int count, void* stream);

}  // namespace xsmoe::side_moe
