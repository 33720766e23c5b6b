// in_batch_softmax_loss by tiles of queries and strips of items. Compiled once for each instruction set level.

#include "in_batch_softmax_loss/gradients.h"
#include "in_batch_softmax_loss/kernels.h"
#include "in_batch_softmax_loss/logits.h"
#include "in_batch_softmax_loss/softmax.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using in_batch_softmax_loss::Kernels;
using in_batch_softmax_loss::Plan;

template <class T>
struct Scratch {
    typedef typename Operand<T>::Value Value;

    LogitScratch<T> operands;
    float* logits;    // (items, stride): a tile times the whole part, or a strip of it
    float* of_query;  // (tile,)
    GradientScratch<T> gradients;

    Scratch(Arena& arena, const Call& call)
        : operands(arena, call.plan.tile, call.plan.widest, call.batch.dim),
          logits(arena.allocate<float>(
              (call.plan.keeps ? call.plan.widest : minimum(call.plan.widest, strip<Value>)) * call.plan.stride
          )),
          of_query(arena.allocate<float>(call.plan.tile)),
          gradients(arena, call) {}
};

Span tile_of(const Call& call, int64_t index) {
    const int64_t first = index * call.plan.tile;
    return {first, minimum(first + call.plan.tile, call.batch.num_queries)};
}

// Tiles that keep logits use two slots for their statistics, because other parts may still read those of the previous
// tile. Without such tiles, there are statistics for all queries.
int64_t statistics_length(const Call& call) {
    return call.plan.keeps ? call.plan.tile : round_up(call.batch.num_queries, lanes);
}

Softmax statistics_of(const Call& call, int64_t slot, int64_t part) {
    const int64_t length = statistics_length(call);
    float* most = call.statistics + (slot * call.plan.parts + part) * 2 * length;
    return {most, most + length};
}

int64_t statistics_floats(const Call& call) {
    return (call.plan.keeps ? 2 : 1) * call.plan.parts * 2 * statistics_length(call);
}

int64_t partial_distance(const Call& call) { return call.plan.block * round_up(call.batch.dim, lanes); }

float* partial_of(const Call& call, int64_t slot, int64_t part) {
    if (!call.results.need_queries) return nullptr;
    return call.partial + (slot * call.plan.parts + part) * partial_distance(call);
}

int64_t partial_floats(const Call& call) {
    return (call.plan.keeps ? 2 : 1) * call.plan.parts * (call.results.need_queries ? partial_distance(call) : 0);
}

// Compute the lse and the losses of `count` queries from `first` on, a vector at a time, from all parts' statistics.
void write_losses(const Results& results, const Combined& all, int64_t first, int64_t count) {
    for (int lane = 0; lane < count && lane < lanes; ++lane) {
        const float lse = all.lse(lane);
        results.lse[first + lane] = lse;
        results.losses[first + lane] = lse - results.losses[first + lane];
    }
}

template <class T>
void begin_tile(const Call& call, const Part& part, const Scratch<T>& scratch, int64_t index) {
    typedef typename Operand<T>::Value Value;
    const Span queries = tile_of(call, index);
    const int64_t stride = call.plan.stride, columns = round_up(queries.size(), lanes);
    const Softmax softmax = statistics_of(call, index % 2, part.index);
    softmax.begin(columns);
    pack_columns<T>(call.batch, queries, scratch.operands);
    for_strips<Value>(part.items, [&](Span items) {
        float* logits = scratch.logits + (items.first - part.items.first) * stride;
        compute_logits<T>(call.batch, scratch.operands, items, queries, logits, stride, call.results.losses);
        softmax.update_max(logits, items.size(), stride, columns);
    });
    softmax.add<true>(scratch.logits, part.items.size(), stride, columns);
}

// The targets of a strip's and a tile's gradients, and whether they are written for the first time.
struct Sums {
    bool begins_queries, begins_items;
    float *queries, *items;
    int64_t item_stride;
};

template <class T>
void add_gradients(
    const Call& call, const Scratch<T>& scratch, Span items, Span queries, float* dlogits, const Sums& sums
) {
    const Batch& batch = call.batch;
    const GradientScratch<T>& gradients = scratch.gradients;
    const int64_t stride = call.plan.stride;
    subtract_targets(batch, items, queries, call.results.scale, dlogits, stride);
    if (call.results.need_queries) {
        auto* packed = !batch.pack_items ? nullptr : batch.packed ? packed_strip<T>(batch, items) : gradients.items;
        add_to_queries<T>(batch, gradients, items, queries, dlogits, stride, sums.begins_queries, packed, sums.queries);
    }
    if (call.results.need_items) {
        add_to_items<T>(
            batch, gradients, items, queries, dlogits, stride, sums.begins_items, sums.items, sums.item_stride
        );
    }
}

template <class T>
void end_tile(const Call& call, const Part& part, const Scratch<T>& scratch, int64_t index) {
    typedef typename Operand<T>::Value Value;
    const Span queries = tile_of(call, index);
    const int64_t stride = call.plan.stride, columns = round_up(queries.size(), lanes), parts = call.plan.parts;
    const Softmax own = statistics_of(call, index % 2, part.index), first = statistics_of(call, index % 2, 0);
    for (int64_t column = 0; column < columns; column += lanes) {
        const Combined all(first, 2 * statistics_length(call), parts, column);
        const Vec exponential = exp_negative(load(own.most + column) - shift_of(all.most));
        store(scratch.of_query + column, exponential * call.results.scale / all.sum);
        // One part stores the result for all parts.
        if (column / lanes % parts == part.index) {
            write_losses(call.results, all, queries.first + column, queries.size() - column);
        }
    }
    if (call.results.need_items) pack_rows<T>(call.batch, queries, scratch.gradients);
    for_strips<Value>(part.items, [&](Span items) {
        float* dlogits = scratch.logits + (items.first - part.items.first) * stride;
        multiply_columns(dlogits, items.size(), stride, columns, scratch.of_query);
        const int64_t sum_stride = call.results.sum_stride;
        add_gradients<T>(
            call, scratch, items, queries, dlogits,
            {
                .begins_queries = items.first == part.items.first,
                .begins_items = index == 0,
                .queries = partial_of(call, index % 2, part.index),
                .items = call.results.need_items ? call.results.item_sums + items.first * sum_stride : nullptr,
                .item_stride = sum_stride,
            }
        );
    });
}

template <class T>
void write_gradients_from(const Call& call, const float* partial, int64_t first, Span rows) {
    const int64_t dim = call.batch.dim;
    store_queries<T>(
        partial, partial_distance(call), call.plan.parts, round_up(dim, lanes), rows, dim,
        static_cast<T*>(call.results.queries) + first * dim
    );
}

template <class T>
void step(const Call& call, const Part& part, int64_t index) {
    Arena arena(part.scratch);
    const Scratch<T> scratch(arena, call);
    const MatrixUnit unit;
    const int64_t tiles = (call.batch.num_queries + call.plan.tile - 1) / call.plan.tile, parts = call.plan.parts;
    if (index >= 2 && call.results.need_queries) {
        const Span queries = tile_of(call, index - 2);
        const int64_t rows = queries.size();
        const Span own = {rows * part.index / parts, rows * (part.index + 1) / parts};
        write_gradients_from<T>(call, partial_of(call, index % 2, 0), queries.first, own);
    }
    if (index >= 1 && index <= tiles) end_tile<T>(call, part, scratch, index - 1);
    if (index < tiles) begin_tile<T>(call, part, scratch, index);
}

template <class T>
void summarize(const Call& call, const Part& part) {
    typedef typename Operand<T>::Value Value;
    Arena arena(part.scratch);
    const Scratch<T> scratch(arena, call);
    const MatrixUnit unit;
    const Softmax all = statistics_of(call, 0, part.index);
    all.begin(statistics_length(call));
    for (int64_t index = 0; index * call.plan.tile < call.batch.num_queries; ++index) {
        const Span queries = tile_of(call, index);
        const Softmax softmax = {all.most + queries.first, all.sum + queries.first};
        pack_columns<T>(call.batch, queries, scratch.operands);
        for_strips<Value>(part.items, [&](Span items) {
            compute_logits<T>(
                call.batch, scratch.operands, items, queries, scratch.logits, call.plan.stride, call.results.losses
            );
            softmax.add(
                scratch.logits, items.size(), call.plan.stride, round_up(queries.size(), lanes), scratch.of_query
            );
        });
    }
}

void combine(const Call& call, Span queries) {
    for (int64_t first = queries.first; first < queries.last; first += lanes) {
        const Combined all(statistics_of(call, 0, 0), 2 * statistics_length(call), call.plan.parts, first);
        write_losses(call.results, all, first, queries.last - first);
    }
}

template <class T>
void differentiate(const Call& call, const Part& part, Span block) {
    typedef typename Operand<T>::Value Value;
    Arena arena(part.scratch);
    const Scratch<T> scratch(arena, call);
    const MatrixUnit unit;
    const Results& results = call.results;
    const int64_t dim = call.batch.dim, stride = call.plan.stride, dim_stride = scratch.gradients.dim_stride;
    float* query_sums = partial_of(call, 0, part.index);
    for_strips<Value>(part.items, [&](Span items) {
        const bool elsewhere = results.item_sums != nullptr;
        const int64_t sum_stride = elsewhere ? results.sum_stride : dim_stride;
        if (results.need_queries && call.batch.pack_items) pack_strip<T>(call.batch, items, scratch.gradients.items);
        float* sums = elsewhere ? results.item_sums + items.first * sum_stride : scratch.gradients.sums;
        for (int64_t first = block.first; first < block.last; first += call.plan.tile) {
            const Span queries = {first, minimum(first + call.plan.tile, block.last)};
            const int64_t columns = round_up(queries.size(), lanes);
            for (int64_t i = 0; i < columns; i += lanes) {
                const int64_t query = first + i;
                store(scratch.of_query + i, load(results.lse + query, queries.last - query));
            }
            pack_columns<T>(call.batch, queries, scratch.operands);
            if (results.need_items) pack_rows<T>(call.batch, queries, scratch.gradients);
            compute_logits<T>(call.batch, scratch.operands, items, queries, scratch.logits, stride, nullptr);
            softmax_gradient_columns(scratch.logits, items.size(), stride, columns, scratch.of_query, results.scale);
            add_gradients<T>(
                call, scratch, items, queries, scratch.logits,
                {
                    .begins_queries = items.first == part.items.first,
                    .begins_items = first == 0,
                    .queries = query_sums + (results.need_queries ? first - block.first : 0) * dim_stride,
                    .items = sums,
                    .item_stride = sum_stride,
                }
            );
        }
        if (!results.need_items || elsewhere) return;
        store_items<T>(sums, sum_stride, items.size(), dim, static_cast<T*>(results.items) + items.first * dim);
    });
}

template <class T>
void write_gradients(const Call& call, Span block, Span queries) {
    write_gradients_from<T>(call, partial_of(call, 0, 0), block.first, queries);
}

template <class T>
void store_sums(const Call& call, Span items) {
    const int64_t dim = call.batch.dim, stride = call.results.sum_stride;
    store_items<T>(
        call.results.item_sums + items.first * stride, stride, items.size(), dim,
        static_cast<T*>(call.results.items) + items.first * dim
    );
}

template <class T>
bool usable_in_place(const Batch& batch, Span items) {
    if (!whole_vectors<T>(batch.dim)) return false;
    for (int64_t item = items.first; item < items.last; ++item) {
        const T* row = item_rows<T>(batch, item);
        Vec zero = {};
        for (int64_t i = 0; i < batch.dim; i += lanes) {
            const Vec value = load(row + i);
            zero += value - value;
        }
        if (sum(zero) != 0) return false;
    }
    return true;
}

template <class T>
int64_t packed_bytes(const Batch& batch) {
    typedef typename Operand<T>::Value Value;
    return packed_words<Value>(batch.num_items, batch.dim) * int64_t{sizeof(typename Words<Value>::Word)};
}

template <class T>
void pack_items(const Batch& batch, Span part) {
    for_strips<typename Operand<T>::Value>(part, [&](Span items) {
        pack_strip<T>(batch, items, packed_strip<T>(batch, items));
    });
}

template <class T>
void scale(const void* from, float factor, int64_t first, int64_t last, void* to) {
    const T* source = static_cast<const T*>(from);
    T* target = static_cast<T*>(to);
    for (int64_t i = first; i < last; i += lanes) store(target + i, load(source + i, last - i) * factor, last - i);
}

template <class T>
constexpr Kernels table = {
    .granularity = Words<typename Operand<T>::Value>::values == 2 ? 32 : Words<float>::block_rows,
    .usable_in_place = usable_in_place<T>,
    .packed_bytes = packed_bytes<T>,
    .pack = pack_items<T>,
    .sums_in_place = [](int64_t dim) { return whole_vectors<T>(dim); },
    .sum_stride = [](int64_t dim) { return round_up(dim, lanes); },
    .statistics_floats = statistics_floats,
    .partial_floats = partial_floats,
    .scratch_bytes = bytes_of<Scratch<T>, const Call&>,
    .step = step<T>,
    .summarize = summarize<T>,
    .combine = combine,
    .differentiate = differentiate<T>,
    .write_gradients = write_gradients<T>,
    .store_sums = store_sums<T>,
    .scale = scale<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

namespace xsmoe::in_batch_softmax_loss::XSMOE_ISA {

extern const Kernels for_float = xsmoe::XSMOE_ISA::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_ISA::table<BFloat16>;

}  // namespace xsmoe::in_batch_softmax_loss::XSMOE_ISA
