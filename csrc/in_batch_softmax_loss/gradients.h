// The contribution of a strip to the gradients of its items and of a tile of queries.
//
// The gradient of a query's logits (dlogits) is its softmax, less 1 at its target, times the scale of its loss. dlogits
// has a row for each item.
#pragma once

#include "in_batch_softmax_loss/logits.h"

namespace xsmoe::XSMOE_ISA {
namespace {

// Whether rows of tensors can be read in place as right operands, and can hold the sums of gradients.
template <class T>
XSMOE_INLINE bool whole_vectors(int64_t dim) {
    return sizeof(T) == sizeof(float) && dim % lanes == 0;
}

template <class T>
struct GradientScratch {
    typedef typename Operand<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    static constexpr bool paired = Words<Value>::values == 2;

    int64_t dim_stride, inner;
    Word* queries;    // a tile's, as right operand, unless they are read in place
    Word* items;      // a strip's, as right operand, unless they are read in place or packed
    float* sums;      // (strip, dim_stride): the items' gradients, unless other memory holds them
    Value* by_item;   // (strip, inner): dlogits, for pairs only
    Value* by_query;  // (tile, strip): dlogits, for pairs only

    GradientScratch(Arena& arena, const Call& call)
        : dim_stride(round_up(call.batch.dim, lanes)), inner(round_up(call.plan.tile, Words<Value>::inner)) {
        const int64_t dim = call.batch.dim, tile = call.plan.tile, items = minimum(call.plan.widest, strip<Value>);
        const bool need_items = call.results.need_items, need_queries = call.results.need_queries;
        queries = arena.allocate<Word>(need_items && !whole_vectors<T>(dim) ? packed_words<Value>(tile, dim) : 0);
        const bool packs = need_queries && call.batch.pack_items && call.batch.packed == nullptr;
        this->items = arena.allocate<Word>(packs ? packed_words<Value>(items, dim) : 0);
        sums = arena.allocate<float>(need_items && call.results.item_sums == nullptr ? items * dim_stride : 0);
        by_item = arena.allocate<Value>(need_items && paired ? items * inner : 0);
        by_query = arena.allocate<Value>(need_queries && paired ? tile * strip<Value> : 0);
    }
};

template <class T>
void pack_rows(const Batch& batch, Span queries, const GradientScratch<T>& scratch) {
    typedef typename Operand<T>::Value Value;
    if (whole_vectors<T>(batch.dim)) return;
    const T* from = query_rows<T>(batch, queries.first);
    pack<Value>(from, queries.size(), batch.dim, batch.query_stride, 1, scratch.queries);
}

// Subtract the scale from dlogits at the targets.
XSMOE_INLINE void subtract_targets(
    const Batch& batch, Span items, Span queries, float scale, float* dlogits, int64_t stride
) {
    for (int64_t query = queries.first; query < queries.last; ++query) {
        const int64_t target = batch.targets[query];
        if (target < items.first || target >= items.last) continue;
        dlogits[(target - items.first) * stride + query - queries.first] -= scale;
    }
}

// Add the blocks of a product to sums, or store them if `begins`.
XSMOE_INLINE void add_block(
    int64_t row, int count, int64_t column, int width, const float* block, bool begins, float* sums, int64_t stride
) {
    for (int r = 0; r < count; ++r, block += panel) {
        float* to = sums + (row + r) * stride + column;
        for (int i = 0; i < width; i += lanes) store(to + i, begins ? load(block + i) : load(to + i) + load(block + i));
    }
}

// The dlogits of an item that no query may draw are 0, but 0 times NaN is NaN. So this sets its numbers that are not
// finite to 0. It hides no error: if a query may draw the item, its dlogits are NaN themselves.
XSMOE_INLINE void drop_not_finite(float* words, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) {
        const Vec value = load(words + i);
        store(words + i, value - value == 0.0f ? value : Vec{});
    }
}

XSMOE_INLINE void drop_not_finite(Pair* words, int64_t count) {
    constexpr uint32_t low = 0x7f80, high = low << 16;  // the exponent bits
    for (int64_t i = 0; i < count; ++i) {
        uint32_t& bits = words[i].bits;
        if ((bits & low) == low) bits &= 0xffff0000;
        if ((bits & high) == high) bits &= 0xffff;
    }
}

// Pack a strip as right operand for the queries' gradients.
template <class T>
void pack_strip(const Batch& batch, Span items, typename Words<typename Operand<T>::Value>::Word* to) {
    typedef typename Operand<T>::Value Value;
    if (batch.dim == 0) return;
    pack<Value>(item_rows<T>(batch, items.first), items.size(), batch.dim, batch.item_stride, 1, to);
    drop_not_finite(to, packed_words<Value>(items.size(), batch.dim));
}

// Return the address of a strip within all packed items.
template <class T>
typename Words<typename Operand<T>::Value>::Word* packed_strip(const Batch& batch, Span items) {
    typedef Words<typename Operand<T>::Value> All;
    return static_cast<typename All::Word*>(batch.packed) + items.first / All::values * round_up(batch.dim, panel);
}

// Add dlogits times the items to the queries' gradients. `packed` are the packed items, null if they are read in place.
template <class T>
void add_to_queries(
    const Batch& batch, const GradientScratch<T>& scratch, Span items, Span queries, const float* dlogits,
    int64_t stride, bool begins, const typename Words<typename Operand<T>::Value>::Word* packed, float* sums
) {
    typedef typename Operand<T>::Value Value;
    const auto add = [&](int64_t row, int count, int64_t column, int width, const float* block) {
        add_block(row, count, column, width, block, begins, sums, scratch.dim_stride);
    };
    const int64_t words = packed_inner<Value>(items.size());
    Segment<Value> segment = {0, packed, words, words * panel};
    Rhs<Value> right = {&segment, 1, panel};
    if constexpr (GradientScratch<T>::paired) {
        const int64_t inner = words * Words<Value>::values;
        for (int64_t query = 0; query < queries.size(); ++query) {
            Value* to = scratch.by_query + query * inner;
            for (int64_t item = 0; item < items.size(); ++item) assign(to[item], dlogits[item * stride + query]);
            for (int64_t item = items.size(); item < inner; ++item) to[item] = Value{};
        }
        product<false>(queries.size(), scratch.dim_stride, Lhs<Value>{scratch.by_query, inner}, right, add);
    } else {
        if constexpr (sizeof(T) == sizeof(float)) {
            if (packed == nullptr) {
                segment = {0, item_rows<T>(batch, items.first), items.size(), panel};
                right.stride = batch.item_stride;
            }
        }
        product<true>(queries.size(), scratch.dim_stride, Lhs<Value>{dlogits, stride}, right, add);
    }
}

// Add the transposed dlogits times the queries to the items' gradients.
template <class T>
void add_to_items(
    const Batch& batch, const GradientScratch<T>& scratch, Span items, Span queries, const float* dlogits,
    int64_t stride, bool begins, float* sums, int64_t sum_stride
) {
    typedef typename Operand<T>::Value Value;
    const int64_t words = packed_inner<Value>(queries.size());
    Segment<Value> segment = {0, scratch.queries, words, words * panel};
    Rhs<Value> right = {&segment, 1, panel};
    Lhs<Value> left;
    if constexpr (GradientScratch<T>::paired) {
        const int64_t inner = words * Words<Value>::values;
        for (int64_t item = 0; item < items.size(); ++item) {
            Value* to = scratch.by_item + item * inner;
            for (int64_t i = 0; i < inner; i += lanes) {
                store(to + i, i < queries.size() ? load(dlogits + item * stride + i, queries.size() - i) : Vec{});
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
        left = {dlogits, stride};
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

// Compute the gradients of queries `rows`, from all parts' partial sums. Those of the first part start at `partial`,
// those of the next part `distance` further.
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

// Store the gradients of items whose sums are complete.
template <class T>
void store_items(const float* sums, int64_t stride, int64_t count, int64_t dim, T* to) {
    for (int64_t row = 0; row < count; ++row, sums += stride, to += dim) {
        for (int64_t i = 0; i < dim; i += lanes) store(to + i, load(sums + i), dim - i);
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
