// Scores of queries against items, a tile at a time: as many items as stay in the second-level cache when packed, times
// each block of queries.
//
// Every score of a query comes out of the same instructions, whichever column its item stands in: a sum over the inner
// dimension in one order. So equal items have equal scores, to the bit.
#pragma once

#include "cpu/left_rows.h"
#include "cpu/pack.h"
#include "cpu/scoring.h"

namespace xsmoe::XSMOE_TIER {
namespace {

template <class T>
struct ScoreTiles {
    typedef typename Held<T>::Value Value;
    typedef typename Words<Value>::Word Word;

    static constexpr int64_t height = Words<Value>::block_rows;
    static constexpr int64_t most_words = int64_t{1} << 15;  // of a packed tile, unless one panel has more
    static_assert(height <= panel, "a panel holds one item for each query of a block");

    // Items of a tile, a whole number of panels.
    static int64_t width_of(int64_t dim) {
        const int64_t affordable = most_words / (packed_inner<Value>(dim) + 1) / panel * panel;
        return affordable < panel ? panel : least(affordable, 512);
    }

    int64_t width, words;
    LeftRows<T> rows;
    Word* packed;
    float* scores;  // of a block of queries, `width` apart
    T* gathered;    // one item for each query of a block

    ScoreTiles(Arena& arena, const Scoring& call, int64_t queries)
        : width(width_of(call.dim)),
          words(packed_inner<Value>(call.dim)),
          rows(call.dim, Words<Value>::inner),
          packed(arena.take<Word>(packed_words<Value>(call.dim, width))),
          scores(arena.take<float>(height * width)),
          gathered(arena.take<T>(height * call.dim)) {
        rows.take(arena, queries);
    }

    // The cell's queries, ready to be multiplied.
    Left<Value> queries_of(const Scoring& call, const Cell& cell) const {
        const T* from = static_cast<const T*>(call.queries) + cell.first_query * call.query_stride;
        return rows.of(from, call.query_stride, cell.last_query - cell.first_query);
    }

    // Hands `use(query, item, count, scores)` the scores of each of the cell's queries, counted from its first, and of
    // so many items from `item` on; a query meets items in ascending order. Vectors may be read up to the next panel.
    template <class Use>
    XSMOE_INLINE void each(const Scoring& call, const Cell& cell, const Left<Value>& left, const Use& use) const {
        const int64_t queries = cell.last_query - cell.first_query;
        for (int64_t item = cell.first_item; item < cell.last_item; item += width) {
            const int64_t count = least(width, cell.last_item - item);
            const T* from = static_cast<const T*>(call.items) + item * call.item_stride;
            pack<Value>(from, call.dim, count, call.dim_stride, call.item_stride, packed);
            for (int64_t query = 0; query < queries; query += height) {
                const int64_t block = least(height, queries - query);
                multiply(left, query, block, count);
                for (int64_t row = 0; row < block; ++row) use(query + row, item, count, scores + row * width);
            }
        }
    }

    // The score of one item for each of the cell's queries, as `each` computes it.
    void own(const Scoring& call, const Cell& cell, const Left<Value>& left, const int64_t* targets, float* result)
        const {
        const int64_t queries = cell.last_query - cell.first_query;
        for (int64_t query = 0; query < queries; query += height) {
            const int64_t block = least(height, queries - query);
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
    // Whole panels alone, so that one function computes all scores of a block.
    void multiply(const Left<Value>& left, int64_t query, int64_t block, int64_t count) const {
        const Segment<Value> segment = {0, packed, words, words * panel};
        product<false>(
            block, round_up(count, panel), Left<Value>{left.at + query * left.stride, left.stride},
            Right<Value>{&segment, 1, panel},
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
}  // namespace xsmoe::XSMOE_TIER
