// Products of few rows: packing the weight would take longer than multiplying by it in place.
#pragma once

#include "cpu/pack.h"
#include "cpu/transpose.h"
#include "grouped_mm/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

template <class T>
struct Rows {
    const T* x;
    int64_t x_stride;
    T* y;
    int64_t y_stride;
};

// Columns of the weight are contiguous: each row of the weight, times a number of x, is added to a row of y.
template <class T, int count>
void add_rows(const Rows<T>& rows, const T* weight, int64_t stride, int64_t inner, int64_t columns) {
    for (int64_t column = 0; column < columns; column += panel) {
        const int64_t available = columns - column;
        Vec totals[count][2] = {};
        const T* from = weight + column;
        for (int64_t first = 0; first < inner; first += words_per_sum) {
            const int64_t last = minimum(first + words_per_sum, inner);
            Vec sums[count][2] = {};
            const auto step = [&](int64_t k, Vec left, Vec right) {
#pragma GCC unroll 8
                for (int row = 0; row < count; ++row) {
                    const Vec value = splat(to_float(rows.x[row * rows.x_stride + k]));
                    sums[row][0] += value * left;
                    sums[row][1] += value * right;
                }
            };
            if (available >= panel) {
                for (int64_t k = first; k < last; ++k, from += stride) {
                    prefetch_panel(from + prefetch_distance * stride);
                    step(k, load(from), load(from + lanes));
                }
            } else {
                for (int64_t k = first; k < last; ++k, from += stride) {
                    step(k, load(from, available), available > lanes ? load(from + lanes, available - lanes) : Vec{});
                }
            }
            for (int row = 0; row < count; ++row) {
                totals[row][0] += sums[row][0];
                totals[row][1] += sums[row][1];
            }
        }
        for (int row = 0; row < count; ++row) {
            T* to = rows.y + row * rows.y_stride + column;
            store(to, totals[row][0], available);
            if (available > lanes) store(to + lanes, totals[row][1], available - lanes);
        }
    }
}

typedef float FloatQuad __attribute__((vector_size(16)));

XSMOE_INLINE FloatQuad fold(Vec value) {
    FloatQuad parts[lanes / 4];
    std::memcpy(parts, &value, sizeof(value));
    for (int width = lanes / 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    }
    return parts[0];
}

// Return the sum of the lanes of each of four vectors.
XSMOE_INLINE FloatQuad sums_of(const Vec (&vectors)[4]) {
    Quad rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i] = bit_cast<Quad>(fold(vectors[i]));
    transpose(rows);
    return (bit_cast<FloatQuad>(rows[0]) + bit_cast<FloatQuad>(rows[2])) +
           (bit_cast<FloatQuad>(rows[1]) + bit_cast<FloatQuad>(rows[3]));
}

// Rows of the weight are contiguous within a column: each number of y is a dot product, four columns at a time.
template <class T, int count>
void dot_columns(const Rows<T>& rows, const T* weight, int64_t stride, int64_t inner, int64_t columns) {
    for (int64_t column = 0; column < columns; column += 4) {
        const int64_t width = minimum(columns - column, 4);
        const T* from[4];
        for (int i = 0; i < 4; ++i) from[i] = weight + (column + (i < width ? i : 0)) * stride;
        Vec sums[count][4] = {};
        const auto step = [&](int64_t k, int64_t available) {
            Vec columns_of[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) columns_of[i] = load(from[i] + k, available);
#pragma GCC unroll 8
            for (int row = 0; row < count; ++row) {
                const Vec value = load(rows.x + row * rows.x_stride + k, available);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) sums[row][i] += value * columns_of[i];
            }
        };
        int64_t k = 0;
        for (; k + lanes <= inner; k += lanes) step(k, lanes);
        if (k < inner) step(k, inner - k);
        for (int row = 0; row < count; ++row) {
            const FloatQuad totals = sums_of(sums[row]);
            for (int i = 0; i < width; ++i) assign(rows.y[row * rows.y_stride + column + i], totals[i]);
        }
    }
}

template <class T, int count>
void multiply_rows(const grouped_mm::Product& call, const T* weight, const T* x, int64_t rows, T* y) {
    if constexpr (count > 0) {
        if (rows < count) return multiply_rows<T, count - 1>(call, weight, x, rows, y);
        const Rows<T> at = {x, call.x_stride, y, call.columns};
        if (call.inner_stride == 1) {
            dot_columns<T, count>(at, weight, call.column_stride, call.inner, call.columns);
        } else {
            add_rows<T, count>(at, weight, call.inner_stride, call.inner, call.columns);
        }
    }
}

// The largest number of rows for which this is faster than packing the weight.
constexpr int64_t few_rows = 8;

template <class T>
void multiply_few(const grouped_mm::Product& call, const T* weight, const T* x, int64_t rows, T* y) {
    const int64_t together = call.inner_stride == 1 || lanes < 16 ? 4 : 8;  // the sums stay in registers
    for (int64_t row = 0; row < rows; row += together) {
        const int64_t count = minimum(rows - row, together);
        multiply_rows<T, 8>(call, weight, x + row * call.x_stride, count, y + row * call.columns);
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
