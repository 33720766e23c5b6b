// Scores of queries against items, one tile at a time: as many items as fit in the second-level cache when they are
// packed, times each block of queries.
//
// Every score is computed by the same instructions, whichever column its item is in, and sums the inner dimension in
// the same order. So equal items have bitwise equal scores.
#pragma once

#include "cpu/lhs_rows.h"
#include "cpu/pack.h"
#include "cpu/scoring.h"

namespace xsmoe::XSMOE_ISA {
namespace {

template <class T>
struct ScoreTiles {
    typedef typename Operand<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    static constexpr int64_t height = Words<Value>::block_rows;
    static constexpr int64_t max_words = int64_t{1} << 15;  // of a packed tile, unless one panel has more
    static_assert(height <= panel, "a panel holds one item for each query of a block");

    // Return the items of a tile, a whole number of panels.
    static int64_t width_of(int64_t dim) {
        const int64_t affordable = max_words / (packed_inner<Value>(dim) + 1) / panel * panel;
        return affordable < panel ? panel : minimum(affordable, 512);
    }

    int64_t width, words;
    LhsRows<T> rows;
    Word* packed;
    float* scores;  // of a block of queries, `width` apart
    T* gathered;    // one item for each query of a block

    ScoreTiles(Arena& arena, const Scoring& call, int64_t queries)
        : width(width_of(call.dim)),
          words(packed_inner<Value>(call.dim)),
          rows(call.dim, Words<Value>::inner),
          packed(arena.allocate<Word>(packed_words<Value>(call.dim, width))),
          scores(arena.allocate<float>(height * width)),
          gathered(arena.allocate<T>(height * call.dim)) {
        rows.allocate(arena, queries);
    }

    // Return the cell's queries as the lhs of products.
    Lhs<Value> queries_of(const Scoring& call, const Cell& cell) const {
        const T* from = static_cast<const T*>(call.queries) + cell.first_query * call.query_stride;
        return rows.of(from, call.query_stride, cell.last_query - cell.first_query);
    }

    // Call `use(query, item, count, scores)` with the scores of each query of the cell (numbered from its first) and of
    // `count` items from `item` on. A query gets its items in ascending order. Vector loads may read up to the next
    // panel.
    template <class Use>
    XSMOE_INLINE void each(const Scoring& call, const Cell& cell, const Lhs<Value>& left, const Use& use) const {
        const int64_t queries = cell.last_query - cell.first_query;
        for (int64_t item = cell.first_item; item < cell.last_item; item += width) {
            const int64_t count = minimum(width, cell.last_item - item);
            const T* from = static_cast<const T*>(call.items) + item * call.item_stride;
            pack<Value>(from, call.dim, count, call.dim_stride, call.item_stride, packed);
            for (int64_t query = 0; query < queries; query += height) {
                const int64_t block = minimum(height, queries - query);
                multiply(left, query, block, count);
                for (int64_t row = 0; row < block; ++row) use(query + row, item, count, scores + row * width);
            }
        }
    }

    // Compute the score of one item for each query of the cell, with the same bits as in `each`.
    void own(const Scoring& call, const Cell& cell, const Lhs<Value>& left, const int64_t* targets, float* result)
        const {
        const int64_t queries = cell.last_query - cell.first_query;
        for (int64_t query = 0; query < queries; query += height) {
            const int64_t block = minimum(height, queries - query);
            for (int64_t row = 0; row < block; ++row) {
                const T* from = static_cast<const T*>(call.items) + targets[query + row] * call.item_stride;
                T* to = gathered + row * call.dim;
                for (int64_t k = 0; k < call.dim; ++k) to[k] = from[k * call.dim_stride];
            }
            pack<Value>(gathered, call.dim, block, int64_t{1}, call.dim, packed);
            multiply(left, query, block, panel);
            for (int64_t row = 0; row < block; ++row) result[query + row] = scores[row * width + row];
        }
    }

private:
    // Products of whole panels only, so that one function computes all scores of a block.
    void multiply(const Lhs<Value>& left, int64_t query, int64_t block, int64_t count) const {
        const Segment<Value> segment = {0, packed, words, words * panel};
        product<false>(
            block, round_up(count, panel), Lhs<Value>{left.at + query * left.stride, left.stride},
            Rhs<Value>{&segment, 1, panel},
            [&](int64_t, int filled, int64_t column, int, const float* from) {
                for (int row = 0; row < filled; ++row) {
                    float* to = scores + row * width + column;
#pragma GCC unroll 2
                    for (int i = 0; i < panel; i += lanes) store(to + i, load(from + row * panel + i));
                }
            }
        );
    }
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
