// A cell of a weight's gradient, x^T grad, by tiles of rows. The sums of many tiles stay in cache.
#pragma once

#include "cpu/arena.h"
#include "cpu/pack.h"
#include "cpu/transpose.h"
#include "grouped_mm/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using grouped_mm::Cell;
using grouped_mm::Gradient;

constexpr int64_t tile_rows = 256;  // a multiple of the rows that every product reads together

template <class T>
struct GradientScratch {
    typedef typename Operand<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    Value* left;  // the cell's columns of x
    Word* right;  // the cell's columns of grad, panel by panel
    float* sums;  // (panels, height, panel)

    GradientScratch(Arena& arena, int64_t height, int64_t width)
        : left(arena.allocate<Value>(round_up(height, Words<Value>::block_rows) * (tile_rows + 2))),
          right(arena.allocate<Word>(tile_rows / Words<Value>::values * round_up(width, panel))),
          sums(arena.allocate<float>(round_up(width, panel) * height)) {}
};

// Columns of x as left operands of products over its rows: either rows of as many floats as a block has rows, block by
// block, or the transposed columns. Here and below, x and grad are read row by row, in memory order.
XSMOE_INLINE int64_t left_distance(int64_t rows) { return (rows + 2) * Words<float>::block_rows; }

template <class T>
XSMOE_INLINE void left_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, float* to) {
    constexpr int64_t height = Words<float>::block_rows;
    static_assert(round_up(height, lanes) <= 2 * height, "a row's surplus fits after its block");
    const int64_t distance = left_distance(rows);
    for (int64_t row = 0; row < rows; ++row, x += stride, to += height) {
        float* block = to;
        int64_t column = 0;
        // The next row overwrites the surplus of a row.
        for (; column + round_up(height, lanes) <= columns; column += height, block += distance) {
            for (int i = 0; i < height; i += lanes) store(block + i, load(x + column + i));
        }
        for (; column < columns; column += height, block += distance) {
            const int64_t available = columns - column;
            for (int i = 0; i < height; ++i) block[i] = i < available ? to_float(x[column + i]) : 0;
        }
    }
}

XSMOE_INLINE Lhs<float> left_block(const float* left, int64_t rows, int64_t column) {
    return {left + column / Words<float>::block_rows * left_distance(rows), Words<float>::block_rows};
}

#ifdef __AVX512BF16__

// Return four columns of two rows, as pairs.
XSMOE_INLINE Quad pairs_of(const BFloat16* first, const BFloat16* second) {
    HalfQuad low, high;
    std::memcpy(&low, first, sizeof(low));
    std::memcpy(&high, second, sizeof(high));
    return __builtin_convertvector(low, Quad) | (__builtin_convertvector(high, Quad) << 16);
}

XSMOE_INLINE void left_columns(const BFloat16* x, int64_t stride, int64_t rows, int64_t columns, BFloat16* to) {
    const int64_t padded = round_up(rows, Words<BFloat16>::inner);
    int64_t whole = 0;
    for (; whole + 8 <= rows; whole += 8) {
        const BFloat16* from = x + whole * stride;
        int64_t column = 0;
        for (; column + 4 <= columns; column += 4, from += 4) {
            Quad pairs[4];
            for (int i = 0; i < 4; ++i) pairs[i] = pairs_of(from + 2 * i * stride, from + (2 * i + 1) * stride);
            transpose(pairs);
            for (int i = 0; i < 4; ++i) std::memcpy(to + (column + i) * padded + whole, &pairs[i], sizeof(Quad));
        }
        for (; column < columns; ++column, ++from) {
            for (int row = 0; row < 8; ++row) to[column * padded + whole + row] = from[row * stride];
        }
    }
    for (int64_t column = 0; column < columns; ++column) {
        for (int64_t row = whole; row < rows; ++row) to[column * padded + row] = x[row * stride + column];
        for (int64_t row = rows; row < padded; ++row) to[column * padded + row] = BFloat16{};
    }
}

XSMOE_INLINE Lhs<BFloat16> left_block(const BFloat16* left, int64_t rows, int64_t column) {
    const int64_t padded = round_up(rows, Words<BFloat16>::inner);
    return {left + column * padded, padded};
}

// Store the panel's columns of two rows, as pairs. `second` is null if there is only one row.
XSMOE_INLINE void store_pairs(const BFloat16* first, const BFloat16* second, int64_t width, Pair* to) {
    for (int i = 0; i < panel; i += lanes, width -= lanes) {
        BitVec low = {}, high = {};
        if (width > 0) {
            low = bit_cast<BitVec>(load(first + i, width)) >> 16;
            if (second != nullptr) high = bit_cast<BitVec>(load(second + i, width));
        }
        const BitVec pairs = low | high;
        std::memcpy(to + i, &pairs, sizeof(pairs));
    }
}

XSMOE_INLINE void right_columns(const BFloat16* grad, int64_t stride, int64_t rows, int64_t width, Pair* to) {
    const int64_t words = packed_inner<BFloat16>(rows);
    for (int64_t word = 0; word < words; ++word, to += panel, grad += 2 * stride) {
        const BFloat16* second = 2 * word + 1 < rows ? grad + stride : nullptr;
        for (int64_t column = 0; column < width; column += panel) {
            Pair* at = to + column * words;
            if (2 * word >= rows) {
                std::memset(at, 0, panel * sizeof(Pair));
            } else {
                store_pairs(grad + column, second == nullptr ? nullptr : second + column, width - column, at);
            }
        }
    }
}

#endif

template <class T>
XSMOE_INLINE void right_columns(const T* grad, int64_t stride, int64_t rows, int64_t width, float* to) {
    for (int64_t row = 0; row < rows; ++row, to += panel, grad += stride) {
        float* at = to;
        int64_t column = 0;
        for (; column + panel <= width; column += panel, at += panel * rows) {
            store(at, load(grad + column));
            store(at + lanes, load(grad + column + lanes));
        }
        if (column < width) {
            const int64_t available = width - column;
            store(at, load(grad + column, available));
            store(at + lanes, available > lanes ? load(grad + column + lanes, available - lanes) : Vec{});
        }
    }
}

template <class T>
void gradient(const Gradient& call, Cell cell, int64_t first, int64_t last, void* memory, void* to) {
    typedef typename Operand<T>::Value Value;
    typedef typename Words<Value>::Word Word;
    constexpr bool transposed = Words<Value>::values == 1;
    constexpr int64_t height = Words<Value>::block_rows;
    Arena arena(memory);
    const GradientScratch<T> scratch(arena, cell.height, cell.width);
    const MatrixUnit unit;
    const int64_t tiles = (last - first + tile_rows - 1) / tile_rows;
    const int64_t tile = round_up((last - first + tiles - 1) / tiles, Words<Value>::inner);
    for (int64_t row = first; row < last; row += tile) {
        const bool begins = row == first, ends = row + tile >= last;
        const int64_t rows = ends ? last - row : tile;
        const T* x = static_cast<const T*>(call.x) + row * call.x_stride + cell.inner;
        const T* grad = static_cast<const T*>(call.grad) + row * call.grad_stride + cell.column;
        left_columns(x, call.x_stride, rows, cell.height, scratch.left);
        // The product prefetches rows of grad if they are read in place. A copy would wait for them.
        const bool in_place = sizeof(T) == sizeof(float) && cell.width % lanes == 0;
        if (!in_place) right_columns(grad, call.grad_stride, rows, cell.width, scratch.right);
        const int64_t words = packed_inner<Value>(rows);
        for (int64_t column = 0; column < cell.width; column += panel) {
            const int64_t available = cell.width - column;
            const Word* right =
                in_place ? reinterpret_cast<const Word*>(grad + column) : scratch.right + column * words;
            const Segment<Value> segment = {0, right, words, 0};
            const int64_t stride = in_place ? call.grad_stride : panel;
            for (int64_t top = 0; top < cell.height; top += height) {
                float* sums = scratch.sums + column * cell.height + top * panel;
                T* out = static_cast<T*>(to) + (cell.inner + top) * call.columns + cell.column + column;
                product<transposed>(
                    minimum(cell.height - top, height), minimum(round_up(available, lanes), panel),
                    left_block(scratch.left, rows, top), Rhs<Value>{&segment, 1, stride},
                    [&](int64_t, int count, int64_t, int width, const float* block) {
                        for (int r = 0; r < count; ++r, block += panel) {
                            for (int i = 0; i < width; i += lanes) {
                                float* sum = sums + r * panel + i;
                                const Vec here = begins ? load(block + i) : load(sum) + load(block + i);
                                if (ends) {
                                    store(out + r * call.columns + i, here, available - i);
                                } else {
                                    store(sum, here);
                                }
                            }
                        }
                    }
                );
            }
        }
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
