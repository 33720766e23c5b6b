// Matrix products of operands that fit in cache: a tile of rows (lhs) times packed weights (rhs).
//
// A product loops over blocks of rows and panels of columns. The sums of a block stay in registers (or in AMX tiles)
// over the whole inner dimension. Then the caller's epilogue gets them in a buffer in the first-level cache.
//
// Operands consist of 32-bit words along the inner dimension: a float, or a pair of bfloat16. If the processor cannot
// multiply bfloat16, the tiles and the packed weights of a bfloat16 call hold floats.
#pragma once

#include "cpu/vec.h"

#ifdef __AMX_BF16__
#include "cpu/amx.h"
#endif

namespace xsmoe {

// Two bfloat16 numbers that are neighbors along the inner dimension, the first in the lower half.
struct Pair {
    uint32_t bits;
};

}  // namespace xsmoe

namespace xsmoe::XSMOE_ISA {
namespace {

// The columns of a block.
constexpr int panel = 2 * lanes;

// The word of a product's operands of type Value.
template <class Value>
struct Words;

template <>
struct Words<float> {
    typedef float Word;
    static constexpr int values = 1;  // in a word
    static constexpr int inner = 1;   // inner dimensions are padded with zeros to a multiple of this
    static constexpr int block_rows = lanes == 16 ? 14 : 6;
};

template <>
struct Words<BFloat16> {
    typedef Pair Word;
    static constexpr int values = 2;
    static constexpr int inner = 32;
#ifdef __AMX_BF16__
    static constexpr int block_rows = 32;
#else
    static constexpr int block_rows = 14;
#endif
};

// The type of the values in tiles and packed weights, for tensors of type T.
template <class T>
struct Operand {
    typedef float Value;
};

#ifdef __AVX512BF16__
template <>
struct Operand<BFloat16> {
    typedef BFloat16 Value;
};
#endif

// The left operand (lhs): rows of values. If a product is `transposed`, its lhs is the transpose of the rows (floats
// only).
template <class Value>
struct Lhs {
    const Value* at;
    int64_t stride;
};

// A segment of the inner dimension: its start in the rows of the lhs, and `words` rows of the rhs, whose panels of
// columns are `panels` words apart.
template <class Value>
struct Segment {
    int64_t left;
    const typename Words<Value>::Word* right;
    int64_t words;
    int64_t panels;
};

// The number of words in one sum. Longer inner dimensions are sums of partial sums, which bounds the rounding error of
// float32.
constexpr int64_t words_per_sum = 256;

// The right operand (rhs): its segments, whose rows are `stride` words apart. One sum covers `chain` words, except on
// AMX tiles, which add all words in order.
template <class Value>
struct Rhs {
    const Segment<Value>* segments;
    int64_t count;
    int64_t stride;
    int64_t chain = words_per_sum;
};

// Prefetch a panel's columns of a row.
template <class T>
XSMOE_INLINE void prefetch_panel(const T* from) {
    constexpr int bytes = panel * int{sizeof(T)};
    const char* at = reinterpret_cast<const char*>(from);
#pragma GCC unroll 2
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// The number of rows of the rhs to prefetch: the weights come from beyond the second-level cache.
constexpr int64_t prefetch_distance = 16;

// Return sum + the products of a word of the lhs and a vector of words of the rhs.
XSMOE_INLINE Vec multiply_add(float left, Vec right, Vec sum) { return sum + splat(left) * right; }

#ifdef __AVX512BF16__
XSMOE_INLINE Vec multiply_add(Pair left, Vec right, Vec sum) {
    const __m512bh pairs = bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(left.bits)));
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), pairs, bit_cast<__m512bh>(right)));
}
#endif

// The sums of `Rows` rows and `Vecs` vectors of columns over one segment.
template <int Rows, int Vecs, bool transposed, class Value>
XSMOE_INLINE void accumulate(
    const Value* left, int64_t left_stride, const typename Words<Value>::Word* right, int64_t right_stride,
    int64_t words, Vec (&sums)[Rows][Vecs]
) {
    typedef typename Words<Value>::Word Word;
    static_assert(!transposed || Words<Value>::values == 1, "pairs are stored along rows");
    // The address of row 3q + r is base[q] + r * stride, so that few registers hold addresses.
    const char* base[(Rows + 2) / 3];
    const int64_t stride_bytes = left_stride * int64_t{sizeof(Value)};
    const int64_t row_bytes = transposed ? int64_t{sizeof(Word)} : stride_bytes;
    const int64_t step = transposed ? stride_bytes : int64_t{sizeof(Word)};
#pragma GCC unroll 8
    for (int q = 0; q < (Rows + 2) / 3; ++q) base[q] = reinterpret_cast<const char*>(left) + 3 * q * row_bytes;
    for (int64_t k = 0; k < words; ++k) {
        Vec columns[Vecs];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) {
            std::memcpy(&columns[v], right + v * lanes, sizeof(Vec));
            __builtin_prefetch(right + prefetch_distance * right_stride + v * lanes);
        }
        right += right_stride;
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) {
            Word word;
            std::memcpy(&word, base[row / 3] + (row % 3) * row_bytes + k * step, sizeof(word));
#pragma GCC unroll 2
            for (int v = 0; v < Vecs; ++v) sums[row][v] = multiply_add(word, columns[v], sums[row][v]);
        }
    }
}

template <int Rows, int Vecs>
XSMOE_INLINE void clear(Vec (&sums)[Rows][Vecs]) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) sums[row][v] = Vec{};
    }
}

// Store the sums in the block, or add them to it.
template <int Rows, int Vecs>
XSMOE_INLINE void write_sums(const Vec (&sums)[Rows][Vecs], bool add, float* block) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) {
            float* at = block + row * panel + v * lanes;
            store(at, add ? load(at) + sums[row][v] : sums[row][v]);
        }
    }
}

template <int Rows, int Vecs, bool transposed, class Value>
__attribute__((noinline)) void vector_block(
    const Lhs<Value>& left, const Rhs<Value>& right, int64_t index, float* block
) {
    Vec sums[Rows][Vecs];
    clear(sums);
    int64_t summed = 0;
    bool added = false;
    for (int64_t s = 0; s < right.count; ++s) {
        const Segment<Value> segment = right.segments[s];
        const typename Words<Value>::Word* words = segment.right + index * segment.panels;
        for (int64_t first = 0; first < segment.words; first += right.chain) {
            if (summed >= right.chain) {
                write_sums(sums, added, block);
                clear(sums);
                added = true;
                summed = 0;
            }
            const int64_t count = minimum(segment.words - first, right.chain);
            const int64_t step = transposed ? left.stride : int64_t{Words<Value>::values};
            accumulate<Rows, Vecs, transposed>(
                left.at + segment.left + first * step, left.stride, words + first * right.stride, right.stride, count,
                sums
            );
            summed += count;
        }
    }
    write_sums(sums, added, block);
}

template <int Rows, bool transposed, class Value>
XSMOE_INLINE void vector_blocks(
    int rows, int vecs, const Lhs<Value>& left, const Rhs<Value>& right, int64_t index, float* block
) {
    if constexpr (Rows > 0) {
        if (rows < Rows) return vector_blocks<Rows - 1, transposed>(rows, vecs, left, right, index, block);
        if (vecs == 2) return vector_block<Rows, 2, transposed>(left, right, index, block);
        vector_block<Rows, 1, transposed>(left, right, index, block);
    }
}

#ifdef __AMX_BF16__

// Tiles 0 and 1 hold the sums of the block's first 16 rows, 2 and 3 those of the other rows. Tiles 4 and 5 hold rows of
// the lhs, 6 and 7 words of the rhs.
struct BlockShapes {
    TileShapes of[33];

    constexpr BlockShapes() {
        for (int rows = 0; rows <= 32; ++rows) {
            const int first = rows < 16 ? rows : 16;
            for (int tile = 0; tile < 8; ++tile) {
                const bool second = tile == 2 || tile == 3 || tile == 5;
                const int tile_rows = tile >= 6 ? 16 : second ? rows - first : first;
                of[rows].rows[tile] = static_cast<uint8_t>(tile_rows);
                of[rows].row_bytes[tile] = tile_rows > 0 ? 64 : 0;
            }
        }
    }
};

constexpr BlockShapes block_shapes;

[[maybe_unused]] __attribute__((noinline)) void matrix_block(
    int rows, int vecs, const Lhs<BFloat16>& left, const Rhs<BFloat16>& right, int64_t index, float* block
) {
    // The compiler does not see which memory the tile instructions read.
    __asm__ volatile("" ::: "memory");
    if (rows != 32) XSMOE_TILE_CONFIGURE(&block_shapes.of[rows]);
    const int64_t left_bytes = left.stride * int64_t{sizeof(BFloat16)};
    const int64_t right_bytes = right.stride * int64_t{sizeof(Pair)};
    XSMOE_TILE_ZERO(0);
    if (vecs == 2) XSMOE_TILE_ZERO(1);
    if (rows > 16) {
        XSMOE_TILE_ZERO(2);
        if (vecs == 2) XSMOE_TILE_ZERO(3);
    }
    for (int64_t s = 0; s < right.count; ++s) {
        const Segment<BFloat16> segment = right.segments[s];
        const BFloat16* l = left.at + segment.left;
        const Pair* r = segment.right + index * segment.panels;
        for (int64_t k = 0; k < segment.words; k += 16, l += 32, r += 16 * right.stride) {
            XSMOE_TILE_LOAD(4, l, left_bytes);
            XSMOE_TILE_LOAD(6, r, right_bytes);
            XSMOE_TILE_MULTIPLY(0, 4, 6);
            if (vecs == 2) {
                XSMOE_TILE_LOAD(7, r + 16, right_bytes);
                XSMOE_TILE_MULTIPLY(1, 4, 7);
            }
            if (rows > 16) {
                XSMOE_TILE_LOAD(5, l + 16 * left.stride, left_bytes);
                XSMOE_TILE_MULTIPLY(2, 5, 6);
                if (vecs == 2) XSMOE_TILE_MULTIPLY(3, 5, 7);
            }
        }
    }
    XSMOE_TILE_STORE(0, block, panel * 4);
    if (vecs == 2) XSMOE_TILE_STORE(1, block + 16, panel * 4);
    if (rows > 16) {
        XSMOE_TILE_STORE(2, block + 16 * panel, panel * 4);
        if (vecs == 2) XSMOE_TILE_STORE(3, block + 16 * panel + 16, panel * 4);
    }
    if (rows != 32) XSMOE_TILE_CONFIGURE(&block_shapes.of[32]);
    __asm__ volatile("" ::: "memory");
}

#endif

// The tile configuration of a thread. A thread holds one while it multiplies.
struct MatrixUnit {
#ifdef __AMX_BF16__
    MatrixUnit() { XSMOE_TILE_CONFIGURE(&block_shapes.of[32]); }
    ~MatrixUnit() { XSMOE_TILE_RELEASE(); }
#else
    MatrixUnit() {}
#endif
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Compute left (rows, K) times right (K, columns), block by block. `epilogue(row, rows, column, columns, sums)` gets
// the sums of some rows and at most `panel` columns; the rows of sums are `panel` floats apart. `prologue(row, rows,
// column)` runs before a block is computed and may prefetch what the epilogue needs. `columns` is a multiple of
// `lanes`.
template <bool transposed, class Value, class Prologue, class Epilogue>
XSMOE_INLINE void product(
    int64_t rows, int64_t columns, const Lhs<Value>& left, const Rhs<Value>& right, const Prologue& prologue,
    const Epilogue& epilogue
) {
    constexpr int height = Words<Value>::block_rows;
    alignas(64) float block[height * panel];
    const auto compute = [&](int64_t row, int64_t column) {
        const int block_rows = static_cast<int>(minimum(rows - row, height));
        const int vecs = columns - column >= panel ? 2 : 1;
        const int64_t index = column / panel;
        const Lhs<Value> from = {left.at + (transposed ? row : row * left.stride), left.stride};
        prologue(row, block_rows, column);
#ifdef __AMX_BF16__
        if constexpr (sizeof(Value) == sizeof(BFloat16)) {
            matrix_block(block_rows, vecs, from, right, index, block);
        } else {
            vector_blocks<height, transposed>(block_rows, vecs, from, right, index, block);
        }
#else
        vector_blocks<height, transposed>(block_rows, vecs, from, right, index, block);
#endif
        epilogue(row, block_rows, column, vecs * lanes, static_cast<const float*>(block));
    };
    // The weights of all experts are larger than the tile, so each panel of weights is read once for the whole tile.
    if (right.count > 1) {
        for (int64_t column = 0; column < columns; column += panel) {
            for (int64_t row = 0; row < rows; row += height) compute(row, column);
        }
    } else {
        for (int64_t row = 0; row < rows; row += height) {
            for (int64_t column = 0; column < columns; column += panel) compute(row, column);
        }
    }
}

template <bool transposed, class Value, class Epilogue>
XSMOE_INLINE void product(
    int64_t rows, int64_t columns, const Lhs<Value>& left, const Rhs<Value>& right, const Epilogue& epilogue
) {
    product<transposed>(rows, columns, left, right, [](int64_t, int, int64_t) {}, epilogue);
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
