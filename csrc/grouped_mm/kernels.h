// What the kernels of grouped_mm are given, and the table through which each tier offers them.
#pragma once

#include <cstdint>

namespace xsmoe::grouped_mm {

// y = x times weight: x (rows, inner) with rows `x_stride` apart, weight (inner, columns) with any strides, y (rows,
// columns) with rows next to each other.
struct Product {
    int64_t inner, columns;
    const void* x;
    int64_t x_stride;
    int64_t inner_stride, column_stride;
    void* y;
};

// x^T grad over the rows [first, last) of both, x (rows, inner) and grad (rows, columns).
struct Gradient {
    int64_t columns;
    const void* x;
    int64_t x_stride;
    const void* grad;
    int64_t grad_stride;
};

// A part of a weight's gradient: rows [inner, inner + height) and columns [column, column + width) of it.
struct Cell {
    int64_t inner, height, column, width;
};

struct Kernels {
    int64_t panel;       // columns of a panel
    int64_t block_rows;  // rows that a block of a product covers
    int64_t few_rows;    // groups of so few rows take less time where their weight is not packed

    // Rows [first, last) times one weight; `few`: of so small a group. `scratch` has as many bytes as the function of
    // that name says.
    int64_t (*product_bytes)(const Product&, int64_t most_rows);
    void (*product)(const Product&, const void* weight, int64_t first, int64_t last, bool few, void* scratch);

    // Writes one cell of a gradient (inner, columns) at `to`. The numbers do not depend on how it is cut into cells.
    int64_t (*gradient_bytes)(int64_t height, int64_t width);
    void (*gradient)(const Gradient&, Cell cell, int64_t first, int64_t last, void* scratch, void* to);
};

}  // namespace xsmoe::grouped_mm
