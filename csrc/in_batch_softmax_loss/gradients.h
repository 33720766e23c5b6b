// What a tile of shares adds to the gradients of its queries and of a strip of items.
//
// The shares of a query are its softmax, less 1 at its target. They come as exponentials that one factor for each query
// turns into shares. Where products read floats, that factor goes into the smaller tiles, those of the queries and of
// their gradients; pairs of bfloat16 have to be rounded once more anyhow, and take it with them.
#pragma once

#include "in_batch_softmax_loss/logits.h"

namespace xsmoe::XSMOE_TIER {
namespace {

template <class T>
struct GradientScratch {
    typedef typename Held<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    static constexpr bool paired = Words<Value>::values == 2;

    int64_t dim_stride, inner;
    float* factors;     // (tile,)
    float* sums;        // (tile, dim_stride): the queries' gradients so far
    Word* queries;      // the tile's queries as right factor
    float* scaled;      // (tile, dim): before they are packed
    Value* shares;      // (tile, strip), pairs only
    Value* transposed;  // (strip, inner), pairs only

    GradientScratch(Arena& arena, int64_t tile, int64_t dim, bool need_queries, bool need_items)
        : dim_stride(round_up(dim, panel)),
          inner(round_up(tile, Words<Value>::inner)),
          factors(arena.take<float>(tile)),
          sums(arena.take<float>(need_queries ? tile * dim_stride : 0)),
          queries(arena.take<Word>(need_items ? packed_words<Value>(tile, dim) : 0)),
          scaled(arena.take<float>(need_items && !paired ? tile * dim : 0)),
          shares(arena.take<Value>(need_queries && paired ? tile * strip : 0)),
          transposed(arena.take<Value>(need_items && paired ? strip * inner : 0)) {}
};

template <class T>
void pack_queries(const Batch& batch, const GradientScratch<T>& scratch, int64_t first, int64_t rows) {
    typedef typename Held<T>::Value Value;
    const T* from = static_cast<const T*>(batch.queries) + first * batch.query_stride;
    if constexpr (GradientScratch<T>::paired) {
        pack<Value>(from, rows, batch.dim, batch.query_stride, 1, scratch.queries);
    } else {
        for (int64_t row = 0; row < rows; ++row, from += batch.query_stride) {
            float* to = scratch.scaled + row * batch.dim;
            for (int64_t i = 0; i < batch.dim; i += lanes) {
                store(to + i, load(from + i, batch.dim - i) * scratch.factors[row], batch.dim - i);
            }
        }
        pack<Value>(scratch.scaled, rows, batch.dim, batch.dim, 1, scratch.queries);
    }
}

// The shares of a tile as left factors.
template <class Value>
struct Shares {
    Left<Value> rows, columns;
};

template <class T>
Shares<typename Held<T>::Value> as_factors(
    const GradientScratch<T>& scratch, Strip items, int64_t rows, float* grown, bool need_queries, bool need_items
) {
    typedef typename Held<T>::Value Value;
    if constexpr (!GradientScratch<T>::paired) {
        return {{grown, logit_stride}, {grown, logit_stride}};
    } else {
        constexpr int64_t multiple = Words<Value>::inner;
        const int64_t padded = round_up(items.width, multiple), inner = round_up(rows, multiple);
        for (int64_t row = 0; row < rows; ++row) {
            float* at = grown + row * logit_stride;
            for (int64_t i = items.width; i < padded; ++i) at[i] = 0;
            const Vec factor = splat(scratch.factors[row]);
            for (int64_t i = 0; i < padded; i += lanes) {
                const Vec share = load(at + i) * factor;
                if (need_queries) store(scratch.shares + row * strip + i, share);
                if (need_items) store(at + i, share);
            }
        }
        if (need_items) {
            for (int64_t column = 0; column < items.width; ++column) {
                Value* to = scratch.transposed + column * inner;
                for (int64_t row = 0; row < rows; ++row) assign(to[row], grown[row * logit_stride + column]);
                for (int64_t row = rows; row < inner; ++row) to[row] = Value{};
            }
        }
        return {{scratch.shares, strip}, {scratch.transposed, inner}};
    }
}

// Adds the shares times the items to the queries' gradients, or begins them.
template <class Value>
void add_to_queries(
    const Batch& batch, const Left<Value>& shares, Strip items, int64_t rows, bool begins, float* sums, int64_t stride
) {
    typedef typename Words<Value>::Word Word;
    const int64_t words = packed_inner<Value>(items.width);
    const Word* packed =
        static_cast<const Word*>(batch.rows) + items.begin / Words<Value>::values * round_up(batch.dim, panel);
    const Segment<Value> segment = {0, packed, words, words * panel};
    product<false>(
        rows, round_up(batch.dim, lanes), shares, Right<Value>{&segment, 1, panel},
        [&](int64_t row, int count, int64_t column, int width, const float* block) {
            for (int r = 0; r < count; ++r, block += panel) {
                float* to = sums + (row + r) * stride + column;
                for (int i = 0; i < width; i += lanes) {
                    store(to + i, begins ? load(block + i) : load(to + i) + load(block + i));
                }
            }
        }
    );
}

// Adds the transposed shares times the queries to the gradients of a strip of items, or begins them.
template <class T>
void add_to_items(
    const Batch& batch, const Left<typename Held<T>::Value>& shares, const GradientScratch<T>& scratch, Strip items,
    int64_t rows, bool begins, float* sums
) {
    typedef typename Held<T>::Value Value;
    const int64_t words = packed_inner<Value>(rows), stride = scratch.dim_stride;
    const Segment<Value> segment = {0, scratch.queries, words, words * panel};
    float* strip_sums = sums + items.begin * stride;
    product<!GradientScratch<T>::paired>(
        items.width, round_up(batch.dim, lanes), shares, Right<Value>{&segment, 1, panel},
        [&](int64_t row, int count, int64_t column) {
            if (begins) return;
            for (int64_t at = row; at < row + count; ++at) prefetch_panel(strip_sums + at * stride + column);
        },
        [&](int64_t row, int count, int64_t column, int width, const float* block) {
            for (int r = 0; r < count; ++r, block += panel) {
                float* to = strip_sums + (row + r) * stride + column;
                for (int i = 0; i < width; i += lanes) {
                    store(to + i, begins ? load(block + i) : load(to + i) + load(block + i));
                }
            }
        }
    );
}

template <class T>
void store_queries(const GradientScratch<T>& scratch, int64_t rows, int64_t dim, T* to) {
    for (int64_t row = 0; row < rows; ++row, to += dim) {
        const Vec factor = splat(GradientScratch<T>::paired ? 1.0f : scratch.factors[row]);
        const float* from = scratch.sums + row * scratch.dim_stride;
        for (int64_t i = 0; i < dim; i += lanes) store(to + i, load(from + i) * factor, dim - i);
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_TIER
