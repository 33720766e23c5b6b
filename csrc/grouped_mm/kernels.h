// The arguments of grouped_mm's kernels, and the table of kernels of an instruction set level.
#pragma once

#include <cstdint>

namespace xsmoe::grouped_mm {

// y = x times weight: x (rows, inner) with rows `x_stride` apart, weight (inner, columns) with any strides, contiguous
// y (rows, columns).
struct Product {
    int64_t inner, columns;
    const void* x;
    int64_t x_stride;
    int64_t inner_stride, column_stride;
    void* y;
};

// x^T grad over the rows [first, last) of both: x (rows, inner) and grad (rows, columns).
struct Gradient {
    int64_t columns;
    const void* x;
    int64_t x_stride;
    const void* grad;
    int64_t grad_stride;
};

// A cell of a weight's gradient: rows [inner, inner + height) and columns [column, column + width).
struct Cell {
    int64_t inner, height, column, width;
};

struct Kernels {
    int64_t panel;       // columns of a panel
    int64_t block_rows;  // rows of a product's block
    int64_t few_rows;    // groups of at most this many rows are faster without packing their weight

    // Multiply rows [first, last) by one weight. `few`: the group has few rows. `scratch` has the bytes that
    // product_bytes returns.
    int64_t (*product_bytes)(const Product&, int64_t max_rows);
    void (*product)(const Product&, const void* weight, int64_t first, int64_t last, bool few, void* scratch);

    // Write one cell of a gradient (inner, columns) to `to`. The results do not depend on the division into cells.
    int64_t (*gradient_bytes)(int64_t height, int64_t width);
    void (*gradient)(const Gradient&, Cell cell, int64_t first, int64_t last, void* scratch, void* to);
};

}  // namespace xsmoe::grouped_mm
