// grouped_mm: the rows of a group times its weight, and the weight's gradient. Compiled once for each instruction set
// level.

#include "cpu/lhs_rows.h"
#include "cpu/pack.h"
#include "grouped_mm/few_rows.h"
#include "grouped_mm/kernels.h"
#include "grouped_mm/weight_gradients.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using grouped_mm::Kernels;
using grouped_mm::Product;

// The operands of a thread: a tile of rows, and as much of the weight as fits in cache. The weight is packed just
// before it is used.
template <class T>
struct ProductScratch {
    typedef typename Operand<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    static constexpr int64_t height = Words<Value>::block_rows;
    // Words of packed weight, and numbers of copied x: each a quarter of a second-level cache.
    static constexpr int64_t max_words = int64_t{1} << 17;

    LhsRows<T> left;
    int64_t tile, strip;
    Word* right;

    ProductScratch(Arena& arena, const Product& call, int64_t rows)
        : left(call.inner, Words<Value>::inner),
          tile(round_up(rows, height)),
          strip(max_words / (packed_inner<Value>(call.inner) + 1) / panel * panel) {
        strip = minimum(round_up(call.columns, panel), strip < panel ? panel : strip);
        right = arena.allocate<Word>(packed_words<Value>(call.inner, strip));
        if (left.in_place) return;
        const int64_t affordable = max_words * Words<Value>::values / (left.padded + 1) / height * height;
        tile = minimum(tile, affordable < height ? height : affordable);
        left.allocate(arena, tile);
    }
};

template <class T>
void multiply_packed(const Product& call, const T* weight, const T* x, int64_t rows, T* y, void* memory) {
    typedef typename Operand<T>::Value Value;
    Arena arena(memory);
    const ProductScratch<T> scratch(arena, call, rows);
    const int64_t words = packed_inner<Value>(call.inner);
    const Segment<Value> segment = {0, scratch.right, words, words * panel};
    const MatrixUnit unit;
    const int64_t tiles = (rows + scratch.tile - 1) / scratch.tile;
    const int64_t tile = round_up((rows + tiles - 1) / tiles, Words<Value>::block_rows);
    for (int64_t row = 0; row < rows; row += tile, x += tile * call.x_stride, y += tile * call.columns) {
        const int64_t height = minimum(tile, rows - row);
        const Lhs<Value> left = scratch.left.of(x, call.x_stride, height);
        for (int64_t begin = 0; begin < call.columns; begin += scratch.strip) {
            const int64_t width = minimum(scratch.strip, call.columns - begin);
            if (row == 0 || width < call.columns) {
                pack<Value>(
                    weight + begin * call.column_stride, call.inner, width, call.inner_stride, call.column_stride,
                    scratch.right
                );
            }
            product<false>(
                height, round_up(width, lanes), left, Rhs<Value>{&segment, 1, panel},
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
    .block_rows = Words<typename Operand<T>::Value>::block_rows,
    .few_rows = few_rows,
    .product_bytes = bytes_of<ProductScratch<T>, const Product&, int64_t>,
    .product = multiply<T>,
    .gradient_bytes = bytes_of<GradientScratch<T>, int64_t, int64_t>,
    .gradient = gradient<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

namespace xsmoe::grouped_mm::XSMOE_ISA {

extern const Kernels for_float = xsmoe::XSMOE_ISA::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_ISA::table<BFloat16>;

}  // namespace xsmoe::grouped_mm::XSMOE_ISA
