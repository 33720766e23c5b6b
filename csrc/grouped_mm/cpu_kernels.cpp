// grouped_mm: rows of a group times its weight, and the weight's gradient. Compiled once for each tier.

#include "cpu/arena.h"
#include "cpu/pack.h"
#include "grouped_mm/few_rows.h"
#include "grouped_mm/kernels.h"
#include "grouped_mm/weight_gradients.h"

namespace xsmoe::XSMOE_TIER {
namespace {

using grouped_mm::Kernels;
using grouped_mm::Product;

// What a thread multiplies with: a tile of rows, and as much of the weight as stays in cache, packed when its turn
// comes.
template <class T>
struct ProductScratch {
    typedef typename Held<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    static constexpr int64_t height = Words<Value>::block_rows;
    // Words of packed weight, and numbers of x that are copied: each a quarter of a second-level cache.
    static constexpr int64_t most_words = int64_t{1} << 17;

    int64_t inner, padded;
    bool in_place;  // products can read x where it lies
    int64_t tile, strip;
    Word* right;
    Value* left;

    ProductScratch(Arena& arena, const Product& call, int64_t rows)
        : inner(call.inner),
          padded(round_up(inner, Words<Value>::inner)),
          in_place(sizeof(T) == sizeof(Value) && inner == padded),
          tile(round_up(rows, height)),
          strip(most_words / (packed_inner<Value>(inner) + 1) / panel * panel) {
        strip = least(round_up(call.columns, panel), strip < panel ? panel : strip);
        right = arena.take<Word>(packed_words<Value>(inner, strip));
        left = nullptr;
        if (in_place) return;
        const int64_t affordable = most_words * Words<Value>::values / (padded + 1) / height * height;
        tile = least(tile, affordable < height ? height : affordable);
        left = arena.take<Value>(tile * padded + lanes);
    }

    Left<Value> left_rows(const T* from, int64_t stride, int64_t rows) const {
        if constexpr (sizeof(T) == sizeof(Value)) {
            if (in_place) return {reinterpret_cast<const Value*>(from), stride};
        }
        for (int64_t row = 0; row < rows; ++row) {
            const T* source = from + row * stride;
            Value* to = left + row * padded;
            for (int64_t column = 0; column < padded; column += lanes) {
                const Vec value = column < inner ? load(source + column, inner - column) : Vec{};
                store(to + column, value, padded - column);
            }
        }
        return {left, padded};
    }
};

template <class T>
void multiply_packed(const Product& call, const T* weight, const T* x, int64_t rows, T* y, void* memory) {
    typedef typename Held<T>::Value Value;
    Arena arena(memory);
    const ProductScratch<T> scratch(arena, call, rows);
    const int64_t words = packed_inner<Value>(call.inner);
    const Segment<Value> segment = {0, scratch.right, words, words * panel};
    const MatrixUnit unit;
    const int64_t tiles = (rows + scratch.tile - 1) / scratch.tile;
    const int64_t tile = round_up((rows + tiles - 1) / tiles, Words<Value>::block_rows);
    for (int64_t row = 0; row < rows; row += tile, x += tile * call.x_stride, y += tile * call.columns) {
        const int64_t height = least(tile, rows - row);
        const Left<Value> left = scratch.left_rows(x, call.x_stride, height);
        for (int64_t begin = 0; begin < call.columns; begin += scratch.strip) {
            const int64_t width = least(scratch.strip, call.columns - begin);
            if (row == 0 || width < call.columns) {
                pack<Value>(
                    weight + begin * call.column_stride, call.inner, width, call.inner_stride, call.column_stride,
                    scratch.right
                );
            }
            product<false>(
                height, round_up(width, lanes), left, Right<Value>{&segment, 1, panel},
                [&](int64_t top, int count, int64_t column, int columns, const float* block) {
                    for (int64_t r = top; r < top + count; ++r, block += panel) {
                        T* to = y + r * call.columns + begin + column;
                        for (int i = 0; i < columns; i += lanes) store(to + i, load(block + i), width - column - i);
                    }
                }
            );
        }
    }
}

template <class T>
void multiply(const Product& call, const void* weight, int64_t first, int64_t last, bool few, void* memory) {
    const T* from = static_cast<const T*>(weight);
    const T* x = static_cast<const T*>(call.x) + first * call.x_stride;
    T* y = static_cast<T*>(call.y) + first * call.columns;
    if (few && (call.inner_stride == 1 || call.column_stride == 1)) {
        multiply_few(call, from, x, last - first, y);
    } else {
        multiply_packed(call, from, x, last - first, y, memory);
    }
}

template <class T>
int64_t product_bytes(const Product& call, int64_t most_rows) {
    Arena arena(nullptr);
    const ProductScratch<T> scratch(arena, call, most_rows);
    return arena.used();
}

template <class T>
constexpr Kernels table = {
    panel,       Words<typename Held<T>::Value>::block_rows, few_rows, product_bytes<T>, multiply<T>, gradient_bytes<T>,
    gradient<T>,
};

}  // namespace

extern const Kernels grouped_mm_float = table<float>;
extern const Kernels grouped_mm_bfloat16 = table<BFloat16>;

}  // namespace xsmoe::XSMOE_TIER
