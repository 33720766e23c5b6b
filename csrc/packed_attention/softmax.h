// Attention probabilities of a tile of queries: their causal softmax, its gradient, and dropout. A lane holds a query,
// and a row holds a key, so that all queries are computed by the same instructions.
#pragma once

#include "cpu/vec.h"

namespace xsmoe::XSMOE_ISA {
namespace {

// The queries of a tile: whole panels of a product on all instruction set levels. It is also the row stride of a tile.
constexpr int64_t tile = 32;

XSMOE_INLINE float scale_of(int64_t dim) { return 1.0f / __builtin_sqrtf(static_cast<float>(dim)); }

// The number of terms in one sum. Longer sums are sums of partial sums, which bounds the rounding error of float32.
constexpr int64_t terms_per_sum = 64;

// A vector of queries. Lane i holds query `first` + i, which attends to the keys up to its own position.
struct Queries {
    int64_t first, keys;

    // Return `value` in the lanes that attend to a key, and 0 in the others.
    XSMOE_INLINE Vec attended(int64_t key, Vec value) const {
        if (key <= first) return value;
        IntVec lane;
        for (int i = 0; i < lanes; ++i) lane[i] = i;
        return lane >= static_cast<int32_t>(minimum(key - first, lanes)) ? value : Vec{};
    }

    template <class Term>
    XSMOE_INLINE Vec sum(const Term& term) const {
        Vec total = {};
        for (int64_t from = 0; from < keys; from += terms_per_sum) {
            Vec part = {};
            for (int64_t key = from; key < minimum(from + terms_per_sum, keys); ++key) part += term(key);
            total += part;
        }
        return total;
    }
};

// Replace scores by the softmax of `scale` times the scores of attended keys. The other probabilities are 0.
XSMOE_INLINE void softmax(const Queries& queries, float scale, float* scores) {
    // All queries attend to the first key.
    Vec most = load(scores);
    for (int64_t key = 1; key < queries.keys; ++key) {
        const Vec score = load(scores + key * tile), larger = maximum(score, most);
        if (key <= queries.first) {
            most = larger;
        } else {
            IntVec lane;
            for (int i = 0; i < lanes; ++i) lane[i] = i;
            most = lane >= static_cast<int32_t>(minimum(key - queries.first, lanes)) ? larger : most;
        }
    }
    const Vec sums = queries.sum([&](int64_t key) {
        const Vec exponential = queries.attended(key, exp_negative((load(scores + key * tile) - most) * scale));
        store(scores + key * tile, exponential);
        return exponential;
    });
    const Vec shrink = 1.0f / sums;
    for (int64_t key = 0; key < queries.keys; ++key) {
        float* at = scores + key * tile;
        store(at, queries.attended(key, load(at) * shrink));
    }
}

// The dropout mask of a tile.
struct Dropout {
    const uint8_t* kept;  // (keys, tile), or null: no dropout
    float keep_scale;

    XSMOE_INLINE Vec of(int64_t key, int64_t query, Vec value) const {
        if (kept == nullptr) return value;
        typedef uint8_t Bytes __attribute__((vector_size(lanes)));
        const IntVec keep = __builtin_convertvector(load_as<Bytes>(kept + key * tile + query), IntVec);
        return keep != 0 ? value * keep_scale : Vec{};
    }
};

// Replace the gradients of probabilities after dropout by those of scores, and apply dropout to the probabilities.
XSMOE_INLINE void softmax_gradient(
    const Queries& queries, const Dropout& dropout, int64_t query, float scale, float* probabilities, float* grads
) {
    const Vec common = queries.sum([&](int64_t key) {
        float* at = grads + key * tile;
        const Vec grad = queries.attended(key, dropout.of(key, query, load(at)));
        store(at, grad);
        return grad * load(probabilities + key * tile);
    });
    for (int64_t key = 0; key < queries.keys; ++key) {
        float *probability = probabilities + key * tile, *grad = grads + key * tile;
        const Vec value = load(probability);
        store(grad, queries.attended(key, value * (load(grad) - common) * scale));
        store(probability, dropout.of(key, query, value));
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
