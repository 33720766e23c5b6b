// Attention shares of a tile of queries: their causal softmax, its gradient, and dropout. A query is a lane, and keys
// are rows: so all queries rank, exponentiate and sum by the same instructions.
#pragma once

#include "cpu/vec.h"

namespace xsmoe::XSMOE_TIER {
namespace {

// Queries of a tile: whole panels of a product on all tiers. Rows of a tile are so many numbers apart.
constexpr int64_t tile = 32;

XSMOE_INLINE float scale_of(int64_t dim) { return 1.0f / __builtin_sqrtf(static_cast<float>(dim)); }

// Terms summed in one go: longer sums are sums of such sums, which keeps float32's rounding in bounds.
constexpr int64_t summed = 64;

// A vector of queries and the keys up to them: query `first` + i, in lane i, knows the keys up to its own place.
struct Queries {
    int64_t first, keys;

    // The lanes that know a key; the others get zero.
    XSMOE_INLINE Vec known(int64_t key, Vec value) const {
        if (key <= first) return value;
        IntVec lane;
        for (int i = 0; i < lanes; ++i) lane[i] = i;
        return lane >= static_cast<int32_t>(least(key - first, lanes)) ? value : Vec{};
    }

    template <class Term>
    XSMOE_INLINE Vec sum(const Term& term) const {
        Vec total = {};
        for (int64_t from = 0; from < keys; from += summed) {
            Vec part = {};
            for (int64_t key = from; key < least(from + summed, keys); ++key) part += term(key);
            total += part;
        }
        return total;
    }
};

// Turns scores into the softmax of `scale` times those of known keys, and into zeros elsewhere.
XSMOE_INLINE void softmax(const Queries& queries, float scale, float* scores) {
    // All queries know the first key.
    Vec most = load(scores);
    for (int64_t key = 1; key < queries.keys; ++key) {
        const Vec score = load(scores + key * tile), larger = maximum(score, most);
        if (key <= queries.first) {
            most = larger;
        } else {
            IntVec lane;
            for (int i = 0; i < lanes; ++i) lane[i] = i;
            most = lane >= static_cast<int32_t>(least(key - queries.first, lanes)) ? larger : most;
        }
    }
    const Vec sums = queries.sum([&](int64_t key) {
        const Vec grown = queries.known(key, exp_negative((load(scores + key * tile) - most) * scale));
        store(scores + key * tile, grown);
        return grown;
    });
    const Vec shrink = 1.0f / sums;
    for (int64_t key = 0; key < queries.keys; ++key) {
        float* at = scores + key * tile;
        store(at, queries.known(key, load(at) * shrink));
    }
}

// What dropout leaves of a tile.
struct Dropout {
    const uint8_t* kept;  // (keys, tile), or null: nothing is dropped
    float grown;

    XSMOE_INLINE Vec of(int64_t key, int64_t query, Vec value) const {
        if (kept == nullptr) return value;
        typedef uint8_t Bytes __attribute__((vector_size(lanes)));
        const IntVec keep = __builtin_convertvector(load_as<Bytes>(kept + key * tile + query), IntVec);
        return keep != 0 ? value * grown : Vec{};
    }
};

// Turns the gradients of shares that dropout has treated into those of scores, and lets dropout treat the shares.
XSMOE_INLINE void softmax_gradient(
    const Queries& queries, const Dropout& dropout, int64_t query, float scale, float* shares, float* grads
) {
    const Vec common = queries.sum([&](int64_t key) {
        float* at = grads + key * tile;
        const Vec grad = queries.known(key, dropout.of(key, query, load(at)));
        store(at, grad);
        return grad * load(shares + key * tile);
    });
    for (int64_t key = 0; key < queries.keys; ++key) {
        float *share = shares + key * tile, *grad = grads + key * tile;
        const Vec value = load(share);
        store(grad, queries.known(key, value * (load(grad) - common) * scale));
        store(share, dropout.of(key, query, value));
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_TIER
