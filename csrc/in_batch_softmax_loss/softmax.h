// Rows of logits through the softmax, a strip at a time.
#pragma once

#include "in_batch_softmax_loss/logits.h"

namespace xsmoe::XSMOE_TIER {
namespace {

// The largest logit so far and the sum of exp(logit - most), of each row of a tile.
struct Softmax {
    float *most, *sum;

    Softmax(Arena& arena, int64_t rows) : most(arena.take<float>(rows)), sum(arena.take<float>(rows)) {}

    void begin(int64_t rows) const {
        for (int64_t row = 0; row < rows; ++row) {
            most[row] = -infinity;
            sum[row] = 0;
        }
    }

    // What logits are lessened by: rows without a candidate so far have none.
    float shift(int64_t row) const { return most[row] == -infinity ? 0 : most[row]; }

    float lse(int64_t row) const { return most[row] == infinity ? infinity : shift(row) + __builtin_logf(sum[row]); }
};

XSMOE_INLINE float largest(const float* logits, int64_t width, float most) {
    Vec even = splat(most), odd = even;
    int64_t i = 0;
    for (; i + panel <= width; i += panel) {
        even = maximum(load(logits + i), even);
        odd = maximum(load(logits + i + lanes), odd);
    }
    if (i < width) even = maximum(load(logits + i), even);
    even = maximum(odd, even);
    for (int lane = 0; lane < lanes; ++lane) most = even[lane] > most ? even[lane] : most;
    return most;
}

// Turns logits into exp(logit - shift) where they lie, if they are `kept`; the sum of these.
template <bool kept>
XSMOE_INLINE float exponentiate(float* logits, int64_t width, float shift) {
    Vec sums[2] = {};
    int64_t i = 0;
    for (; i + panel <= width; i += panel) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const Vec grown = exp_negative(load(logits + i + v * lanes) - shift);
            sums[v] += grown;
            if (kept) store(logits + i + v * lanes, grown);
        }
    }
    if (i < width) {
        const Vec grown = exp_negative(load(logits + i) - shift);
        sums[0] += grown;
        if (kept) store(logits + i, grown);
    }
    return sum(sums[0] + sums[1]);
}

}  // namespace
}  // namespace xsmoe::XSMOE_TIER
