// Packing of the right operand (rhs) into the layout that products read fastest.
#pragma once

#include "cpu/product.h"

namespace xsmoe::XSMOE_ISA {
namespace {

// Return the words of a packed matrix of `inner` rows and `columns` columns.
template <class Value>
XSMOE_INLINE int64_t packed_inner(int64_t inner) {
    return round_up(inner, Words<Value>::inner) / Words<Value>::values;
}

template <class Value>
XSMOE_INLINE int64_t packed_words(int64_t inner, int64_t columns) {
    return packed_inner<Value>(inner) * round_up(columns, panel);
}

// Return a word with `count` values, `stride` apart, and zeros after them.
template <class T>
XSMOE_INLINE float word_of(const T* from, int64_t, int64_t, float) {
    return to_float(*from);
}

XSMOE_INLINE Pair word_of(const BFloat16* from, int64_t stride, int64_t count, Pair) {
    return {from[0].bits | (count > 1 ? uint32_t{from[stride].bits} << 16 : 0)};
}

#if defined(__AVX512F__) && !defined(__clang__)
// Transpose a square of `lanes` x `lanes` words. Its rows are `stride` bytes apart; its columns become rows of a panel.
XSMOE_INLINE void transpose_square(const char* from, int64_t stride, void* to) {
    typedef int32_t Lanes __attribute__((vector_size(4 * lanes)));
    Vec rows[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) std::memcpy(&rows[i], from + i * stride, sizeof(Vec));
#pragma GCC unroll 4
    for (int width = 1; width < lanes; width *= 2) {
        Lanes low, high;
        for (int lane = 0; lane < lanes; ++lane) {
            low[lane] = lane & width ? lanes + lane - width : lane;
            high[lane] = lane & width ? lanes + lane : lane + width;
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if (i & width) continue;
            const Vec a = rows[i], b = rows[i + width];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + width] = __builtin_shuffle(a, b, high);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store(static_cast<float*>(to) + i * panel, rows[i]);
}
#define XSMOE_TRANSPOSES
#endif

// Pack the (inner, columns) matrix whose element (k, n) is at from[k * inner_stride + n * column_stride] into panels of
// columns. The last panel is padded with zeros.
template <class Value, class T>
void pack(
    const T* from, int64_t inner, int64_t columns, int64_t inner_stride, int64_t column_stride,
    typename Words<Value>::Word* to
) {
    typedef typename Words<Value>::Word Word;
    constexpr int values = Words<Value>::values;
    constexpr int64_t together = 16;  // words along the inner dimension: a cache line
    const int64_t filled = (inner + values - 1) / values;
    const int64_t words = packed_inner<Value>(inner);
    for (int64_t column = 0; column < columns; column += panel, to += words * panel) {
        const int64_t width = minimum(columns - column, panel);
        const T* source = from + column * column_stride;
        if (width < panel) std::memset(to, 0, words * panel * sizeof(Word));
        for (int64_t first = 0; first < filled; first += together) {
            const int64_t last = minimum(first + together, filled);
            if (column_stride == 1) {
                for (int64_t k = first; k < last; ++k) {
                    const T* row = source + k * values * inner_stride;
                    const int64_t count = inner - k * values;
                    for (int64_t n = 0; n < width; ++n)
                        to[k * panel + n] = word_of(row + n, inner_stride, count, Word{});
                }
            } else {
                int64_t n = 0;
#ifdef XSMOE_TRANSPOSES
                if (inner_stride == 1 && sizeof(T) * values == sizeof(Word) && first + together <= inner / values) {
                    const int64_t bytes = column_stride * int64_t{sizeof(T)};
                    for (; n + together <= width; n += together) {
                        const T* square = source + n * column_stride + first * values;
                        transpose_square(reinterpret_cast<const char*>(square), bytes, to + first * panel + n);
                    }
                }
#endif
                for (; n < width; ++n) {
                    const T* row = source + n * column_stride;
                    for (int64_t k = first; k < last; ++k) {
                        to[k * panel + n] =
                            word_of(row + k * values * inner_stride, inner_stride, inner - k * values, Word{});
                    }
                }
            }
        }
        std::memset(to + filled * panel, 0, (words - filled) * panel * sizeof(Word));
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
