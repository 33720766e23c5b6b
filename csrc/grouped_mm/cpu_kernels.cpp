// grouped_mm: rows of a group times its weight, and the weight's gradient. Compiled once for each tier.

#include "cpu/left_rows.h"
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

    LeftRows<T> left;
    int64_t tile, strip;
    Word* right;

    ProductScratch(Arena& arena, const Product& call, int64_t rows)
        : left(call.inner, Words<Value>::inner),
          tile(round_up(rows, height)),
          strip(most_words / (packed_inner<Value>(call.inner) + 1) / panel * panel) {
        strip = least(round_up(call.columns, panel), strip < panel ? panel : strip);
        right = arena.take<Word>(packed_words<Value>(call.inner, strip));
        if (left.in_place) return;
        const int64_t affordable = most_words * Words<Value>::values / (left.padded + 1) / height * height;
        tile = least(tile, affordable < height ? height : affordable);
        left.take(arena, tile);
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
        const Left<Value> left = scratch.left.of(x, call.x_stride, height);
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
constexpr Kernels table = {
    .panel = panel,
    .block_rows = Words<typename Held<T>::Value>::block_rows,
    .few_rows = few_rows,
    .product_bytes = bytes_of<ProductScratch<T>, const Product&, int64_t>,
    .product = multiply<T>,
    .gradient_bytes = bytes_of<GradientScratch<T>, int64_t, int64_t>,
    .gradient = gradient<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_TIER

namespace xsmoe::grouped_mm::XSMOE_TIER {

extern const Kernels for_float = xsmoe::XSMOE_TIER::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_TIER::table<BFloat16>;

}  // namespace xsmoe::grouped_mm::XSMOE_TIER
