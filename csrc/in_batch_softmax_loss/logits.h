// A tile of logits: some queries against a strip of items.
#pragma once

#include "cpu/left_rows.h"
#include "cpu/pack.h"
#include "in_batch_softmax_loss/kernels.h"

namespace xsmoe::XSMOE_TIER {
namespace {

using in_batch_softmax_loss::Batch;
using in_batch_softmax_loss::strip;
using in_batch_softmax_loss::strips_of;

constexpr float infinity = __builtin_inff();

// Distance of rows of logits: a cache line more than a strip, so that a column's numbers do not share a cache set.
constexpr int64_t logit_stride = strip + 16;

struct Strip {
    int64_t begin, width;

    Strip(const Batch& batch, int64_t index) : begin(index * strip), width(least(strip, batch.num_items - begin)) {}

    int64_t padded() const { return round_up(width, lanes); }
};

// The logits of targets, whose counts do not matter.
template <class T>
void own_logits(const Batch& batch, int64_t first, int64_t rows, float* own) {
    const T* query = static_cast<const T*>(batch.queries) + first * batch.query_stride;
    const T* items = static_cast<const T*>(batch.items);
    for (int64_t row = 0; row < rows; ++row, query += batch.query_stride) {
        const int64_t target = batch.targets[first + row];
        const float score = dot(query, items + target * batch.item_stride, batch.dim);
        own[row] = batch.logq == nullptr ? score : score - batch.logq[target];
    }
}

// Queries [first, first + rows) against the items of a strip; -inf is no candidate.
template <class Value>
void compute_logits(
    const Batch& batch, const Left<Value>& queries, Strip items, int64_t first, int64_t rows, const float* own,
    float* logits
) {
    typedef typename Words<Value>::Word Word;
    const int64_t words = packed_inner<Value>(batch.dim);
    const Segment<Value> segment = {
        0, static_cast<const Word*>(batch.columns) + items.begin * words, words, words * panel
    };
    const float* bias = batch.bias + items.begin;
    const uint32_t* drawn = batch.drawn == nullptr ? nullptr : batch.drawn + items.begin;
    product<false>(
        rows, items.padded(), queries, Right<Value>{&segment, 1, panel},
        [&](int64_t row, int count, int64_t column, int width, const float* sums) {
            for (int i = 0; i < width; i += lanes) {
                const Vec shift = load(bias + column + i);
                BitVec may = ~BitVec{};
                if (drawn != nullptr) std::memcpy(&may, drawn + column + i, sizeof(may));
                float* to = logits + row * logit_stride + column + i;
                for (int r = 0; r < count; ++r) {
                    const Vec logit = load(sums + r * panel + i) + shift;
                    store(to + r * logit_stride, may != 0 ? logit : splat(-infinity));
                }
            }
        }
    );
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t query = first + row;
        const int64_t* rejected = batch.rejected + (batch.users == nullptr ? query : batch.users[query]) * batch.width;
        float* at = logits + row * logit_stride;
        for (int64_t i = 0; i < batch.width; ++i) {
            const int64_t column = rejected[i] - items.begin;
            if (column >= 0 && column < items.width) at[column] = -infinity;
        }
        const int64_t target = batch.targets[query] - items.begin;
        if (target >= 0 && target < items.width) at[target] = own[row];
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_TIER
