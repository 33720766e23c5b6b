// in_batch_softmax_loss by tiles of queries, which meet the items strip by strip. Compiled once for each tier.

#include "in_batch_softmax_loss/gradients.h"
#include "in_batch_softmax_loss/kernels.h"
#include "in_batch_softmax_loss/logits.h"
#include "in_batch_softmax_loss/softmax.h"

namespace xsmoe::XSMOE_TIER {
namespace {

using in_batch_softmax_loss::Kernels;
using in_batch_softmax_loss::Results;

template <class T>
constexpr int64_t tile_height = Words<typename Held<T>::Value>::block_rows;

// Floats of logits that a tile keeps, half of a second-level cache, and rows of the highest tile.
constexpr int64_t most_logits = int64_t{1} << 18;
constexpr int64_t most_rows = 140;

// How many queries a tile has, and whether it keeps their logits of all items. Then loss and gradients come from one
// product for the logits; where the items are too many, the gradients compute them again.
template <class T>
struct Plan {
    bool keeps;
    int64_t tile;

    Plan(const Batch& batch, const Results& results) {
        constexpr int64_t height = tile_height<T>;
        const int64_t affordable = most_logits / (strips_of(batch.num_items) * logit_stride);
        keeps = !results.lse_known && (results.need_queries || results.need_items) && affordable >= 28;
        const int64_t rows = keeps ? least(affordable, most_rows) : most_rows;
        tile = rows < height ? height : rows / height * height;
    }
};

template <class T>
struct Scratch {
    typedef typename Held<T>::Value Value;

    Plan<T> plan;
    LeftRows<T> queries;
    float* logits;  // (strips that are kept, tile, logit_stride)
    float* own;     // (tile,)
    Softmax softmax;
    GradientScratch<T> gradients;

    Scratch(Arena& arena, const Batch& batch, const Results& results)
        : plan(batch, results),
          queries(batch.dim, Words<Value>::inner),
          logits(arena.take<float>((plan.keeps ? strips_of(batch.num_items) : 1) * plan.tile * logit_stride)),
          own(arena.take<float>(plan.tile)),
          softmax(arena, plan.tile),
          gradients(arena, plan.tile, batch.dim, results.need_queries, results.need_items) {
        queries.take(arena, plan.tile);
    }
};

template <class T>
void run_tile(
    const Batch& batch, const Results& results, const Scratch<T>& scratch, int64_t first, int64_t rows, bool begins,
    float* item_sums
) {
    typedef typename Held<T>::Value Value;
    const int64_t strips = strips_of(batch.num_items);
    const Softmax& softmax = scratch.softmax;
    const Left<Value> queries =
        scratch.queries.of(static_cast<const T*>(batch.queries) + first * batch.query_stride, batch.query_stride, rows);
    const auto compute = [&](int64_t index, float* to) {
        compute_logits<Value>(batch, queries, Strip(batch, index), first, rows, scratch.own, to);
    };
    const auto kept = [&](int64_t index) {
        return scratch.logits + (scratch.plan.keeps ? index * scratch.plan.tile * logit_stride : 0);
    };
    own_logits<T>(batch, first, rows, scratch.own);

    if (!results.lse_known) {
        softmax.begin(rows);
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t width = Strip(batch, s).padded();
            compute(s, kept(s));
            for (int64_t row = 0; row < rows; ++row) {
                float* at = kept(s) + row * logit_stride;
                const float before = softmax.most[row];
                softmax.most[row] = largest(at, width, before);
                if (scratch.plan.keeps) continue;
                const float shift = softmax.shift(row);
                if (before < shift) softmax.sum[row] *= exp_negative(splat(before - shift))[0];
                softmax.sum[row] += exponentiate<false>(at, width, shift);
            }
        }
        for (int64_t s = 0; scratch.plan.keeps && s < strips; ++s) {
            const int64_t width = Strip(batch, s).padded();
            for (int64_t row = 0; row < rows; ++row) {
                softmax.sum[row] += exponentiate<true>(kept(s) + row * logit_stride, width, softmax.shift(row));
            }
        }
        for (int64_t row = 0; row < rows; ++row) {
            results.lse[first + row] = softmax.lse(row);
            results.losses[first + row] = results.lse[first + row] - scratch.own[row];
        }
    }
    if (!results.need_queries && !results.need_items) return;

    float* factors = scratch.gradients.factors;
    for (int64_t row = 0; row < rows; ++row) {
        factors[row] = scratch.plan.keeps ? results.scale / softmax.sum[row] : results.scale;
    }
    if (results.need_items) pack_queries<T>(batch, scratch.gradients, first, rows);
    for (int64_t s = 0; s < strips; ++s) {
        const Strip items(batch, s);
        float* grown = kept(s);
        if (!scratch.plan.keeps) compute(s, grown);
        for (int64_t row = 0; row < rows; ++row) {
            float* at = grown + row * logit_stride;
            if (!scratch.plan.keeps) exponentiate<true>(at, items.padded(), results.lse[first + row]);
            const int64_t target = batch.targets[first + row] - items.begin;
            if (target < 0 || target >= items.width) continue;
            at[target] -= scratch.plan.keeps ? softmax.sum[row] : 1;
        }
        const Shares<Value> shares =
            as_factors<T>(scratch.gradients, items, rows, grown, results.need_queries, results.need_items);
        if (results.need_queries) {
            add_to_queries<Value>(
                batch, shares.rows, items, rows, s == 0, scratch.gradients.sums, scratch.gradients.dim_stride
            );
        }
        if (results.need_items) {
            add_to_items<T>(batch, shares.columns, scratch.gradients, items, rows, begins, item_sums);
        }
    }
    if (results.need_queries) {
        store_queries<T>(scratch.gradients, rows, batch.dim, static_cast<T*>(results.queries) + first * batch.dim);
    }
}

template <class T>
void run(const Batch& batch, const Results& results, int64_t first, int64_t last, void* memory, float* item_sums) {
    Arena arena(memory);
    const Scratch<T> scratch(arena, batch, results);
    const MatrixUnit unit;
    const int64_t most = scratch.plan.tile, tiles = (last - first + most - 1) / most;
    const int64_t tile = tiles == 0 ? 0 : round_up((last - first + tiles - 1) / tiles, tile_height<T>);
    for (int64_t row = first; row < last; row += tile) {
        run_tile<T>(batch, results, scratch, row, least(tile, last - row), row == first, item_sums);
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

template <class T>
void pack_strip(const Batch& batch, int64_t index) {
    typedef typename Held<T>::Value Value;
    typedef typename Words<Value>::Word Word;
    if (batch.dim == 0) return;
    const Strip items(batch, index);
    const T* from = static_cast<const T*>(batch.items) + items.begin * batch.item_stride;
    Word* columns = static_cast<Word*>(batch.columns) + items.begin * packed_inner<Value>(batch.dim);
    pack<Value>(from, batch.dim, items.width, 1, batch.item_stride, columns);
    if (batch.rows == nullptr) return;
    Word* rows = static_cast<Word*>(batch.rows) + items.begin / Words<Value>::values * round_up(batch.dim, panel);
    pack<Value>(from, items.width, batch.dim, batch.item_stride, 1, rows);
    drop_not_finite(rows, packed_words<Value>(items.width, batch.dim));
}

template <class T>
int64_t columns_bytes(const Batch& batch) {
    typedef typename Held<T>::Value Value;
    return strips_of(batch.num_items) * packed_words<Value>(batch.dim, strip) *
           int64_t{sizeof(typename Words<Value>::Word)};
}

template <class T>
int64_t rows_bytes(const Batch& batch) {
    typedef typename Held<T>::Value Value;
    return strips_of(batch.num_items) * packed_words<Value>(strip, batch.dim) *
           int64_t{sizeof(typename Words<Value>::Word)};
}

int64_t sum_stride(int64_t dim) { return round_up(dim, panel); }

template <class T>
void add(const Batch& batch, const float* item_sums, int64_t parts, int64_t first, int64_t last, void* to) {
    const int64_t stride = sum_stride(batch.dim), distance = batch.num_items * stride;
    for (int64_t item = first; item < last; ++item) {
        const float* from = item_sums + item * stride;
        T* at = static_cast<T*>(to) + item * batch.dim;
        for (int64_t i = 0; i < batch.dim; i += lanes) {
            Vec total = load(from + i);
            for (int64_t part = 1; part < parts; ++part) total += load(from + part * distance + i);
            store(at + i, total, batch.dim - i);
        }
    }
}

template <class T>
void scale(const void* from, float factor, int64_t first, int64_t last, void* to) {
    const T* source = static_cast<const T*>(from);
    T* target = static_cast<T*>(to);
    for (int64_t i = first; i < last; i += lanes) store(target + i, load(source + i, last - i) * factor, last - i);
}

template <class T>
constexpr Kernels table = {
    .block_rows = tile_height<T>,
    .columns_bytes = columns_bytes<T>,
    .rows_bytes = rows_bytes<T>,
    .pack = pack_strip<T>,
    .sum_stride = sum_stride,
    .bytes = bytes_of<Scratch<T>, const Batch&, const Results&>,
    .run = run<T>,
    .add = add<T>,
    .scale = scale<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_TIER

namespace xsmoe::in_batch_softmax_loss::XSMOE_TIER {

extern const Kernels for_float = xsmoe::XSMOE_TIER::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_TIER::table<BFloat16>;

}  // namespace xsmoe::in_batch_softmax_loss::XSMOE_TIER
