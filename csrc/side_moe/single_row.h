// One row of x for all rows of the backbone: the work that remains for every row.
#pragma once

#include "side_moe/tiles.h"

namespace xsmoe::XSMOE_ISA {
namespace {

template <class T>
void broadcast(
    const float* mixture, float gate, const void* backbone, int64_t stride, const float* row_weight, int64_t dim,
    int64_t first, int64_t last, void* y, double* norm, double* weight
) {
    for (int64_t row = first; row < last; ++row) {
        const T* from = static_cast<const T*>(backbone) + row * stride;
        T* to = static_cast<T*>(y) + row * dim;
        Vec squares = {};
        for (int64_t column = 0; column < dim; column += lanes) {
            const Vec h = load(from + column, dim - column);
            squares += h * h;
            store(to + column, load(mixture + column, dim - column) + gate * h, dim - column);
        }
        const double counted = row_weight == nullptr ? 1.0 : double{row_weight[row]};
        *norm += counted * gate * __builtin_sqrtf(sum(squares));
        *weight += counted;
    }
}

template <class T>
void collect(
    const void* grad, int64_t grad_stride, const void* backbone, int64_t backbone_stride, float gate, int64_t dim,
    int64_t first, int64_t last, float* sums, double* dot, void* dbackbone
) {
    // Partial sums of 64 rows bound the rounding error of float32.
    float* few = sums + round_up(dim, lanes);
    if (dim > 0) std::memset(sums, 0, 2 * round_up(dim, lanes) * sizeof(float));
    for (int64_t block = first; block < last; block += 64) {
        const int64_t end = minimum(block + 64, last);
        for (int64_t row = block; row < end; ++row) {
            const T* from = static_cast<const T*>(grad) + row * grad_stride;
            const T* other = static_cast<const T*>(backbone) + row * backbone_stride;
            Vec dots = {};
            for (int64_t column = 0; column < dim; column += lanes) {
                const Vec go = load(from + column, dim - column);
                dots += go * load(other + column, dim - column);
                store(few + column, load(few + column) + go);
                if (dbackbone != nullptr)
                    store(static_cast<T*>(dbackbone) + row * dim + column, gate * go, dim - column);
            }
            *dot += sum(dots);
        }
        for (int64_t column = 0; column < dim; column += lanes) {
            store(sums + column, load(sums + column) + load(few + column));
            store(few + column, Vec{});
        }
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
