// Tiles of rows, and the functions that forward and backward share.
#pragma once

#include "cpu/lhs_rows.h"
#include "cpu/pack.h"
#include "side_moe/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using side_moe::Sizes;

template <class Value>
using Word = typename Words<Value>::Word;

// Return the columns of a tile that is a left operand, or that is added up in vectors.
template <class Value>
constexpr int64_t column_multiple = Words<Value>::inner > lanes ? Words<Value>::inner : lanes;

// The rows of a tile: enough that the weights are read seldom, few enough that the tile stays in cache.
template <class Value>
constexpr int64_t tile_rows = (139 / Words<Value>::block_rows + 1) / 2 * 2 * Words<Value>::block_rows;

// Divide rows into tiles of nearly equal height. All tiles but the last consist of whole blocks.
template <class Value>
int64_t tile_height(int64_t rows) {
    const int64_t tiles = (rows + tile_rows<Value> - 1) / tile_rows<Value>;
    return tiles == 0 ? 0 : round_up((rows + tiles - 1) / tiles, Words<Value>::block_rows);
}

template <class Value>
XSMOE_INLINE Segment<Value> packed_segment(const void* packed, int64_t inner, int64_t left = 0) {
    const int64_t words = packed_inner<Value>(inner);
    return {left, static_cast<const Word<Value>*>(packed), words, words * panel};
}

// Call body(i, count) for each vector of a block's row of `width` columns, of which the first `available` exist in the
// tensor. `count` is the number of valid lanes.
template <class Body>
XSMOE_INLINE void each_vector(int width, int64_t available, const Body& body) {
    if (width == panel && available >= panel) {
        body(0, int64_t{lanes});
        body(lanes, int64_t{lanes});
    } else {
        for (int i = 0; i < width; i += lanes) body(i, available - i);
    }
}

// Compute the sum of each row's gates without the first, which is the backbone's.
void sum_expert_gates(const float* gates, int64_t rows, int64_t experts, int64_t stride, float* to) {
    for (int64_t row = 0; row < rows; ++row) {
        float total = 0;
        for (int64_t e = 1; e <= experts; ++e) total += gates[row * stride + e];
        to[row] = total;
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
