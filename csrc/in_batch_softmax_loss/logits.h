// A tile of logits: some items times some queries, a row for each item.
#pragma once

#include "cpu/lhs_rows.h"
#include "cpu/pack.h"
#include "in_batch_softmax_loss/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using in_batch_softmax_loss::Batch;
using in_batch_softmax_loss::Call;
using in_batch_softmax_loss::Part;
using in_batch_softmax_loss::Results;
using in_batch_softmax_loss::Span;

constexpr float infinity = __builtin_inff();

// The number of items whose logits are computed together: whole blocks of products, and whole words of the inner
// dimension of the gradients' products.
template <class Value>
constexpr int64_t strip = Words<Value>::values == 2 ? 512 : 504;

// Call body(items) for each strip of a part.
template <class Value, class Body>
XSMOE_INLINE void for_strips(Span items, const Body& body) {
    for (int64_t first = items.first; first < items.last; first += strip<Value>) {
        body(Span{first, minimum(first + strip<Value>, items.last)});
    }
}

template <class T>
struct LogitScratch {
    typedef typename Operand<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    LhsRows<T> items;
    Word* queries;  // a tile's, as right operand

    LogitScratch(Arena& arena, int64_t tile, int64_t max_items, int64_t dim)
        : items(dim, Words<Value>::inner), queries(arena.allocate<Word>(packed_words<Value>(dim, tile))) {
        items.allocate(arena, minimum(max_items, strip<Value>));
    }
};

template <class T>
const T* query_rows(const Batch& batch, int64_t first) {
    return static_cast<const T*>(batch.queries) + first * batch.query_stride;
}

template <class T>
const T* item_rows(const Batch& batch, int64_t first) {
    return static_cast<const T*>(batch.items) + first * batch.item_stride;
}

template <class T>
void pack_columns(const Batch& batch, Span queries, const LogitScratch<T>& scratch) {
    typedef typename Operand<T>::Value Value;
    const T* from = query_rows<T>(batch, queries.first);
    pack<Value>(from, batch.dim, queries.size(), 1, batch.query_stride, scratch.queries);
}

// Compute the logits of a strip's items and the packed queries; -inf marks an item that is no candidate. `own`, if not
// null, gets the logits of the targets among the items, to which counts do not apply.
template <class T>
void compute_logits(
    const Batch& batch, const LogitScratch<T>& scratch, Span items, Span queries, float* logits, int64_t stride,
    float* own
) {
    typedef typename Operand<T>::Value Value;
    const int64_t words = packed_inner<Value>(batch.dim);
    const Segment<Value> segment = {0, scratch.queries, words, words * panel};
    const Lhs<Value> left = scratch.items.of(item_rows<T>(batch, items.first), batch.item_stride, items.size());
    product<false>(
        items.size(), round_up(queries.size(), lanes), left, Rhs<Value>{&segment, 1, panel},
        [&](int64_t row, int count, int64_t column, int width, const float* sums) {
            for (int r = 0; r < count; ++r, sums += panel) {
                const int64_t item = items.first + row + r;
                const bool may = batch.drawn == nullptr || batch.drawn[item];
                const Vec bias = splat(batch.bias[item]);
                float* to = logits + (row + r) * stride + column;
                for (int i = 0; i < width; i += lanes) store(to + i, may ? load(sums + i) + bias : splat(-infinity));
            }
        }
    );
    for (int64_t query = queries.first; query < queries.last; ++query) {
        const int64_t* rejected = batch.rejected + (batch.users == nullptr ? query : batch.users[query]) * batch.width;
        float* at = logits + (query - queries.first);
        for (int64_t i = 0; i < batch.width; ++i) {
            const int64_t item = rejected[i];
            if (item >= items.first && item < items.last) at[(item - items.first) * stride] = -infinity;
        }
        const int64_t target = batch.targets[query];
        if (target < items.first || target >= items.last) continue;
        const float score = dot(query_rows<T>(batch, query), item_rows<T>(batch, target), batch.dim);
        const float logit = batch.logq == nullptr ? score : score - batch.logq[target];
        at[(target - items.first) * stride] = logit;
        if (own != nullptr) own[query] = logit;
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
