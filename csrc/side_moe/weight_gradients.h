// A tile's contribution to the weights' gradients: narrow^T wide. `narrow` (rows, columns) holds gradients of hidden
// states and logits, or gated activations. `wide` (rows, D) is the tile of x or of the output's gradient.
//
// The sums are stored panel by panel, so that a tile adds to them in one sequential pass.
#pragma once

#include "side_moe/tiles.h"

namespace xsmoe::XSMOE_ISA {
namespace {

template <class Value>
struct WeightScratch {
    typedef typename Words<Value>::Word Word;

    int64_t inner;
    Word* panel_words;  // one panel of wide, as right operand
    Value* transposed;  // narrow^T, if its rows cannot be read as they are: pairs are adjacent rows of the tile

    WeightScratch(Arena& arena, int64_t max_columns)
        : inner(round_up(tile_rows<Value>, Words<Value>::inner)),
          panel_words(arena.allocate<Word>(packed_words<Value>(inner, panel))),
          transposed(Words<Value>::values == 1 ? nullptr : arena.allocate<Value>(max_columns * inner)) {}
};

// Copy `width` columns of the tile into a dense panel.
XSMOE_INLINE void copy_panel(const Lhs<float>& wide, int64_t rows, int64_t column, int64_t width, float* to) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = wide.at + row * wide.stride + column;
        for (int i = 0; i < width; i += lanes) store(to + row * panel + i, load(from + i));
    }
}

XSMOE_INLINE void copy_panel(const Lhs<BFloat16>& wide, int64_t rows, int64_t column, int64_t width, Pair* to) {
    pack<BFloat16>(wide.at + column, rows, width, wide.stride, 1, to);
}

// Add narrow^T wide to rows of sums. Column c of narrow is added to row `place(c)`, or dropped if that is negative. If
// this tile `begins`, the rows are overwritten instead. `sums` has `sum_rows` rows in each panel.
template <class Value, class Place>
void add_weight_gradients(
    const Lhs<Value>& narrow, int64_t columns, const Lhs<Value>& wide, int64_t dim, int64_t rows,
    const WeightScratch<Value>& scratch, bool begins, float* sums, int64_t sum_rows, const Place& place
) {
    constexpr bool transposed = Words<Value>::values == 1;
    const int64_t inner = round_up(rows, Words<Value>::inner);
    Lhs<Value> left = narrow;
    if constexpr (!transposed) {
        for (int64_t column = 0; column < columns; ++column) {
            Value* to = scratch.transposed + column * inner;
            for (int64_t row = 0; row < rows; ++row) to[row] = narrow.at[row * narrow.stride + column];
            for (int64_t row = rows; row < inner; ++row) to[row] = Value{};
        }
        left = {scratch.transposed, inner};
    }
    const Segment<Value> segment = {0, scratch.panel_words, packed_inner<Value>(rows), 0};
    for (int64_t column = 0; column < dim; column += panel) {
        const int64_t width = minimum(panel, round_up(dim - column, lanes));
        copy_panel(wide, rows, column, width, scratch.panel_words);
        float* at = sums + column / panel * sum_rows * panel;
        product<transposed>(
            columns, width, left, Rhs<Value>{&segment, 1, panel},
            [&](int64_t row, int count, int64_t, int, const float* block) {
                for (int r = 0; r < count; ++r, block += panel) {
                    const int64_t to = place(row + r);
                    if (to < 0) continue;
                    for (int i = 0; i < panel; i += lanes) {
                        float* sum = at + to * panel + i;
                        const Vec here = i < width ? load(block + i) : Vec{};
                        store(sum, begins ? here : load(sum) + here);
                    }
                }
            }
        );
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
