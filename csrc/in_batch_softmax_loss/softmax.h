// The softmax of logits. A row holds the logits of an item, so that the lanes of a vector belong to different queries.
#pragma once

#include "in_batch_softmax_loss/logits.h"

namespace xsmoe::XSMOE_ISA {
namespace {

template <int count>
struct Columns {
    static constexpr int vecs = count;
};

// Call body(Columns<n>, column) for groups of n vectors of columns.
template <class Body>
XSMOE_INLINE void for_columns(int64_t columns, const Body& body) {
    int64_t column = 0;
    for (; column + 4 * lanes <= columns; column += 4 * lanes) body(Columns<4>{}, column);
    for (; column < columns; column += lanes) body(Columns<1>{}, column);
}

// The number of exponentials in one float32 sum. Sums of these sums bound the rounding error.
constexpr int64_t terms_per_sum = 64;

// Return the number to subtract from logits: 0 for queries that have no candidate so far.
XSMOE_INLINE Vec shift_of(Vec most) { return most == -infinity ? Vec{} : most; }

// The largest logit so far and the sum of exp(logit - most), for each query of a tile.
struct Softmax {
    float *most, *sum;

    void begin(int64_t columns) const {
        for (int64_t i = 0; i < columns; i += lanes) {
            store(most + i, splat(-infinity));
            store(sum + i, Vec{});
        }
    }

    void update_max(const float* logits, int64_t items, int64_t stride, int64_t columns) const {
        for_columns(columns, [&](auto group, int64_t column) {
            constexpr int vecs = decltype(group)::vecs;
            Vec largest[vecs];
            for (int v = 0; v < vecs; ++v) largest[v] = load(most + column + v * lanes);
            for (int64_t item = 0; item < items; ++item) {
#pragma GCC unroll 4
                for (int v = 0; v < vecs; ++v) {
                    largest[v] = maximum(load(logits + item * stride + column + v * lanes), largest[v]);
                }
            }
            for (int v = 0; v < vecs; ++v) store(most + column + v * lanes, largest[v]);
        });
    }

    // Add exp(logit - most) to the sums. If `kept`, the exponentials replace the logits.
    template <bool kept>
    void add(float* logits, int64_t items, int64_t stride, int64_t columns) const {
        for (int64_t first = 0; first < items; first += terms_per_sum) {
            const int64_t last = minimum(first + terms_per_sum, items);
            for_columns(columns, [&](auto group, int64_t column) {
                constexpr int vecs = decltype(group)::vecs;
                Vec shift[vecs], sums[vecs] = {};
                for (int v = 0; v < vecs; ++v) shift[v] = shift_of(load(most + column + v * lanes));
                for (int64_t item = first; item < last; ++item) {
                    float* at = logits + item * stride + column;
#pragma GCC unroll 4
                    for (int v = 0; v < vecs; ++v) {
                        const Vec exponential = exp_negative(load(at + v * lanes) - shift[v]);
                        sums[v] += exponential;
                        if (kept) store(at + v * lanes, exponential);
                    }
                }
                for (int v = 0; v < vecs; ++v) {
                    float* total = sum + column + v * lanes;
                    store(total, load(total) + sums[v]);
                }
            });
        }
    }

    // Add a strip of logits that are not kept.
    void add(float* logits, int64_t items, int64_t stride, int64_t columns, float* before) const {
        std::memcpy(before, most, columns * sizeof(float));
        update_max(logits, items, stride, columns);
        for (int64_t i = 0; i < columns; i += lanes) {
            const Vec old = load(before + i), shift = shift_of(load(most + i));
            store(sum + i, old < shift ? load(sum + i) * exp_negative(old - shift) : load(sum + i));
        }
        add<false>(logits, items, stride, columns);
    }
};

// The combined statistics of all parts.
struct Combined {
    Vec most, sum;

    Combined(const Softmax& first, int64_t distance, int64_t parts, int64_t column)
        : most(load(first.most + column)), sum{} {
        for (int64_t part = 1; part < parts; ++part) {
            most = maximum(load(first.most + part * distance + column), most);
        }
        const Vec shift = shift_of(most);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t at = part * distance + column;
            sum += load(first.sum + at) * exp_negative(load(first.most + at) - shift);
        }
    }

    float lse(int lane) const {
        return most[lane] == infinity ? infinity : shift_of(most)[lane] + __builtin_logf(sum[lane]);
    }
};

// Multiply exponentials by a factor for each query, which gives dlogits.
XSMOE_INLINE void multiply_columns(
    float* logits, int64_t items, int64_t stride, int64_t columns, const float* factors
) {
    for (int64_t item = 0; item < items; ++item) {
        float* at = logits + item * stride;
        for (int64_t i = 0; i < columns; i += lanes) store(at + i, load(at + i) * load(factors + i));
    }
}

// Replace logits by dlogits: exp(logit - lse) times a factor.
XSMOE_INLINE void softmax_gradient_columns(
    float* logits, int64_t items, int64_t stride, int64_t columns, const float* lse, float factor
) {
    for (int64_t item = 0; item < items; ++item) {
        float* at = logits + item * stride;
        for (int64_t i = 0; i < columns; i += lanes) {
            store(at + i, exp_negative(load(at + i) - load(lse + i)) * factor);
        }
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
