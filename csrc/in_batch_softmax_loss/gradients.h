// What a strip of shares adds to the gradients of its items and of a tile of queries.
//
// The shares of a query are its softmax, less 1 at its target, times the scale of its loss. They lie in rows, one for
// each item.
#pragma once

#include "in_batch_softmax_loss/logits.h"

namespace xsmoe::XSMOE_TIER {
namespace {

// Whether rows of tensors serve as right factors and as sums where they lie.
template <class T>
XSMOE_INLINE bool whole_vectors(int64_t dim) {
    return sizeof(T) == sizeof(float) && dim % lanes == 0;
}

template <class T>
struct GradientScratch {
    typedef typename Held<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    static constexpr bool paired = Words<Value>::values == 2;

    int64_t dim_stride, inner;
    Word* queries;    // a tile's, as right factor, unless they serve as they lie
    Word* items;      // a strip's, as right factor, where they do not serve as they lie and are not packed
    float* sums;      // (strip, dim_stride): the items' gradients, where no others hold them
    Value* by_item;   // (strip, inner): shares, pairs only
    Value* by_query;  // (tile, strip): shares, pairs only

    GradientScratch(Arena& arena, const Call& call)
        : dim_stride(round_up(call.batch.dim, lanes)), inner(round_up(call.plan.tile, Words<Value>::inner)) {
        const int64_t dim = call.batch.dim, tile = call.plan.tile, items = least(call.plan.widest, strip<Value>);
        const bool need_items = call.results.need_items, need_queries = call.results.need_queries;
        queries = arena.take<Word>(need_items && !whole_vectors<T>(dim) ? packed_words<Value>(tile, dim) : 0);
        const bool packs = need_queries && call.batch.packs && call.batch.packed == nullptr;
        this->items = arena.take<Word>(packs ? packed_words<Value>(items, dim) : 0);
        sums = arena.take<float>(need_items && call.results.item_sums == nullptr ? items * dim_stride : 0);
        by_item = arena.take<Value>(need_items && paired ? items * inner : 0);
        by_query = arena.take<Value>(need_queries && paired ? tile * strip<Value> : 0);
    }
};

template <class T>
void pack_rows(const Batch& batch, Span queries, const GradientScratch<T>& scratch) {
    typedef typename Held<T>::Value Value;
    if (whole_vectors<T>(batch.dim)) return;
    const T* from = query_rows<T>(batch, queries.first);
    pack<Value>(from, queries.size(), batch.dim, batch.query_stride, 1, scratch.queries);
}

// Takes 1 from the shares of the targets.
XSMOE_INLINE void less_targets(
    const Batch& batch, Span items, Span queries, float scale, float* shares, int64_t stride
) {
    for (int64_t query = queries.first; query < queries.last; ++query) {
        const int64_t target = batch.targets[query];
        if (target < items.first || target >= items.last) continue;
        shares[(target - items.first) * stride + query - queries.first] -= scale;
    }
}

// Adds the blocks of a product to sums, or begins them.
XSMOE_INLINE void add_block(
    int64_t row, int count, int64_t column, int width, const float* block, bool begins, float* sums, int64_t stride
) {
    for (int r = 0; r < count; ++r, block += panel) {
        float* to = sums + (row + r) * stride + column;
        for (int i = 0; i < width; i += lanes) store(to + i, begins ? load(block + i) : load(to + i) + load(block + i));
    }
}

// An item that no query may draw has shares of 0, and 0 times its NaN would still be NaN. Nothing is hidden: the shares
// of a query that may draw it are NaN themselves.
XSMOE_INLINE void drop_not_finite(float* words, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) {
        const Vec value = load(words + i);
        store(words + i, value - value == 0.0f ? value : Vec{});
    }
}

XSMOE_INLINE void drop_not_finite(Pair* words, int64_t count) {
    constexpr uint32_t low = 0x7f80, high = low << 16;  // exponents
    for (int64_t i = 0; i < count; ++i) {
        uint32_t& bits = words[i].bits;
        if ((bits & low) == low) bits &= 0xffff0000;
        if ((bits & high) == high) bits &= 0xffff;
    }
}

// Packs a strip as right factor of the queries' gradients.
template <class T>
void pack_strip(const Batch& batch, Span items, typename Words<typename Held<T>::Value>::Word* to) {
    typedef typename Held<T>::Value Value;
    if (batch.dim == 0) return;
    pack<Value>(item_rows<T>(batch, items.first), items.size(), batch.dim, batch.item_stride, 1, to);
    drop_not_finite(to, packed_words<Value>(items.size(), batch.dim));
}

// Where a strip lies among all items that are packed.
template <class T>
typename Words<typename Held<T>::Value>::Word* packed_strip(const Batch& batch, Span items) {
    typedef Words<typename Held<T>::Value> All;
    return static_cast<typename All::Word*>(batch.packed) + items.first / All::values * round_up(batch.dim, panel);
}

// Adds the shares times the items to the queries' gradients. `packed` are the items, null where they serve as they lie.
template <class T>
void add_to_queries(
    const Batch& batch, const GradientScratch<T>& scratch, Span items, Span queries, const float* shares,
    int64_t stride, bool begins, const typename Words<typename Held<T>::Value>::Word* packed, float* sums
) {
    typedef typename Held<T>::Value Value;
    const auto add = [&](int64_t row, int count, int64_t column, int width, const float* block) {
        add_block(row, count, column, width, block, begins, sums, scratch.dim_stride);
    };
    const int64_t words = packed_inner<Value>(items.size());
    Segment<Value> segment = {0, packed, words, words * panel};
    Right<Value> right = {&segment, 1, panel};
    if constexpr (GradientScratch<T>::paired) {
        const int64_t inner = words * Words<Value>::values;
        for (int64_t query = 0; query < queries.size(); ++query) {
            Value* to = scratch.by_query + query * inner;
            for (int64_t item = 0; item < items.size(); ++item) assign(to[item], shares[item * stride + query]);
            for (int64_t item = items.size(); item < inner; ++item) to[item] = Value{};
        }
        product<false>(queries.size(), scratch.dim_stride, Left<Value>{scratch.by_query, inner}, right, add);
    } else {
        if constexpr (sizeof(T) == sizeof(float)) {
            if (packed == nullptr) {
                segment = {0, item_rows<T>(batch, items.first), items.size(), panel};
                right.stride = batch.item_stride;
            }
        }
        product<true>(queries.size(), scratch.dim_stride, Left<Value>{shares, stride}, right, add);
    }
}

// Adds the transposed shares times the queries to the items' gradients.
template <class T>
void add_to_items(
    const Batch& batch, const GradientScratch<T>& scratch, Span items, Span queries, const float* shares,
    int64_t stride, bool begins, float* sums, int64_t sum_stride
) {
    typedef typename Held<T>::Value Value;
    const int64_t words = packed_inner<Value>(queries.size());
    Segment<Value> segment = {0, scratch.queries, words, words * panel};
    Right<Value> right = {&segment, 1, panel};
    Left<Value> left;
    if constexpr (GradientScratch<T>::paired) {
        const int64_t inner = words * Words<Value>::values;
        for (int64_t item = 0; item < items.size(); ++item) {
            Value* to = scratch.by_item + item * inner;
            for (int64_t i = 0; i < inner; i += lanes) {
                store(to + i, i < queries.size() ? load(shares + item * stride + i, queries.size() - i) : Vec{});
            }
        }
        left = {scratch.by_item, inner};
    } else {
        if constexpr (sizeof(T) == sizeof(float)) {
            if (whole_vectors<T>(batch.dim)) {
                segment = {0, query_rows<T>(batch, queries.first), queries.size(), panel};
                right.stride = batch.query_stride;
            }
        }
        left = {shares, stride};
    }
    product<false>(
        items.size(), scratch.dim_stride, left, right,
        [&](int64_t row, int count, int64_t column) {
            if (begins) return;
            for (int64_t at = row; at < row + count; ++at) prefetch_panel(sums + at * sum_stride + column);
        },
        [&](int64_t row, int count, int64_t column, int width, const float* block) {
            add_block(row, count, column, width, block, begins, sums, sum_stride);
        }
    );
}

// The gradients of queries `rows` of the ones whose partial sums begin at `partial`, with those of the next part
// `distance` further.
template <class T>
void store_queries(
    const float* partial, int64_t distance, int64_t parts, int64_t stride, Span rows, int64_t dim, T* to
) {
    for (int64_t row = rows.first; row < rows.last; ++row) {
        for (int64_t i = 0; i < dim; i += lanes) {
            const float* from = partial + row * stride + i;
            Vec total = load(from);
            for (int64_t part = 1; part < parts; ++part) total += load(from + part * distance);
            store(to + row * dim + i, total, dim - i);
        }
    }
}

// The gradients of items, whose sums are done.
template <class T>
void store_items(const float* sums, int64_t stride, int64_t count, int64_t dim, T* to) {
    for (int64_t row = 0; row < count; ++row, sums += stride, to += dim) {
        for (int64_t i = 0; i < dim; i += lanes) store(to + i, load(sums + i), dim - i);
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_TIER
