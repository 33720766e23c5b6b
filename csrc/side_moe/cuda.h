// What CUDA kernels do for side_moe beside Triton's matrix products: gates, counters, and the gradients of logits.
// Each launch takes up to `most_levels` levels, whose operands differ in everything but their dtype.
#pragma once

#include <cstdint>

#include "cuda/number_type.h"

namespace xsmoe::side_moe {

using xsmoe::cuda::Number;

constexpr int most_levels = 8;

// gates (rows, gated) = softmax(x router^T), of which router is contiguous.
struct GateLevel {
    const void* x;
    int64_t x_stride;
    const void* router;
    float* gates;
    int64_t rows, dim;
    int gated;
    // Whether rows can be read 16 bytes at a time; set by the launch.
    bool whole;
};

// norm and mass (gated,): the sums over rows of row_weight * gate * sqrt(sum of squares), and of row_weight * gate.
struct CountLevel {
    // (rows, gated) numbers, or one row of them for all.
    const float* gates;
    // Sums of squares over blocks of columns, (gated, column_blocks, rows); where one row of gates serves all,
    // (gated, column_blocks), and for the first gate backbone_squares (rows,) instead.
    const float* squares;
    const float* backbone_squares;
    // Null where every row counts once.
    const float* row_weight;
    int64_t rows, column_blocks;
    int gated;
    // Scratch, (count_slices(rows), 2, gated): what each slice of rows adds to norm and to mass.
    float* parts;
    float* norm;
    float* mass;
};

// grad_logits (rows, padded_logits(gated)), zeros behind `gated`, and grad_backbone (rows, dim) = gate_0 grad; null
// where not wanted.
struct LogitLevel {
    const void* x;
    const void* backbone;
    const void* grad;
    int64_t x_stride, backbone_stride, grad_stride;
    // (rows, gated).
    const float* gates;
    // (rows, (gated - 1) * chunks): what each expert's gate takes, beside grad . x, in parts to be added up.
    const float* dots;
    // What stands for grad . backbone where x is one row for all rows of the backbone; null elsewhere.
    const float* backbone_dot;
    float* grad_logits;
    void* grad_backbone;
    int64_t rows, dim;
    int gated, chunks;
    // Whether rows can be read and written 16 bytes at a time; set by the launch.
    bool whole;
};

// Into how many slices of rows the counters' sums are cut, whatever runs them.
int64_t count_slices(int64_t rows);

// Numbers from one row of logits' gradients to the next: what Triton's kernels read 16 bytes at a time.
constexpr int64_t padded_logits(int64_t gated) { return (gated + 15) / 16 * 16; }

void launch_gate(Number number, const GateLevel* levels, int count, void* stream);

void launch_count(const CountLevel* levels, int count, void* stream);

// With `wide_grad`, grad is float32 whatever `number` is.
void launch_logit_gradient(Number number, bool wide_grad, const LogitLevel* levels, int count, void* stream);

}  // namespace xsmoe::side_moe
