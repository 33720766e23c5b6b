// packed_attention, one head of one sequence after the other: the shares of a tile of queries in all keys up to them
// are computed where they stay in cache, and computed again in backward. Nothing is padded, and no memory grows with
// the square of a length. Compiled once for each tier.

#include "cpu/arena.h"
#include "cpu/left_rows.h"
#include "cpu/transpose.h"
#include "packed_attention/kernels.h"
#include "packed_attention/shares.h"

namespace xsmoe::XSMOE_TIER {
namespace {

using packed_attention::Attention;
using packed_attention::Backward;
using packed_attention::Forward;
using packed_attention::Heads;
using packed_attention::Kernels;

XSMOE_INLINE int64_t pitch_of(const Attention& call) { return round_up(call.dim, lanes); }

// One head of one sequence.
struct Unit {
    int64_t head, first, rows;  // which head; its first row among all rows, and how many there are
    const uint8_t* keep;

    Unit(const Attention& call, int64_t unit)
        : head(unit % call.heads),
          first(call.offsets[unit / call.heads]),
          rows(call.offsets[unit / call.heads + 1] - first),
          keep(call.keep == nullptr ? nullptr : call.keep + unit * call.places * call.places) {}

    template <class T>
    const T* in(const Heads& tensor) const {
        return static_cast<const T*>(tensor.at) + first * tensor.row_stride + head * tensor.head_stride;
    }

    // Where row `row` of a dense result begins.
    template <class T>
    T* out(const Attention& call, void* result, int64_t row) const {
        return static_cast<T*>(result) + ((first + row) * call.heads + head) * call.dim;
    }
};

// Some rows as columns of a tile, with zeros up to a whole vector of them.
template <class T>
void transpose_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, float* to) {
    if (rows % lanes != 0) {
        for (int64_t column = 0; column < dim; ++column) store(to + column * tile + rows / lanes * lanes, Vec{});
    }
    for (int64_t row = 0; row < rows; row += 4) {
        const T* source = from + row * stride;
        const int64_t height = least(rows - row, 4);
        int64_t column = 0;
        for (; column + 4 <= dim; column += 4) {
            Quad quads[4] = {};
            if (height == 4) {
                for (int i = 0; i < 4; ++i) quads[i] = load_quad(source + i * stride + column);
            } else {
                for (int i = 0; i < height; ++i) quads[i] = load_quad(source + i * stride + column);
            }
            transpose(quads);
            for (int i = 0; i < 4; ++i) std::memcpy(to + (column + i) * tile + row, &quads[i], sizeof(Quad));
        }
        for (; column < dim; ++column) {
            for (int i = 0; i < height; ++i) to[column * tile + row + i] = to_float(source[i * stride + column]);
        }
    }
}

// The scores of a tile's queries, or the gradients of their shares: dot products of all keys' or values' rows with
// those that were turned into columns.
XSMOE_INLINE void dot_products(
    const Attention& call, const Left<float>& left, int64_t keys, int64_t queries, const float* columns, float* to
) {
    const Segment<float> segment = {0, columns, call.dim, panel};
    product<false>(
        keys, round_up(queries, lanes), left, Right<float>{&segment, 1, tile},
        [&](int64_t row, int rows, int64_t column, int width, const float* sums) {
            for (int i = 0; i < rows; ++i) {
                for (int at = 0; at < width; at += lanes) {
                    store(to + (row + i) * tile + column + at, load(sums + i * panel + at));
                }
            }
        }
    );
}

// Sums of `count` rows of a tensor, weighed by a tile or, `transposed`, by its columns, as rows of a result.
template <bool transposed, class T>
XSMOE_INLINE void weighted_sums(
    const Attention& call, const Unit& unit, const float* weights, const Left<float>& rows, int64_t count,
    int64_t first_result, int64_t results, void* to
) {
    const Segment<float> segment = {0, rows.at, count, panel};
    product<transposed>(
        results, pitch_of(call), Left<float>{weights, tile}, Right<float>{&segment, 1, rows.stride},
        [&](int64_t row, int block, int64_t column, int width, const float* sums) {
            for (int i = 0; i < block; ++i) {
                T* into = unit.out<T>(call, to, first_result + row + i);
                for (int64_t at = 0; at < width && column + at < call.dim; at += lanes) {
                    store(into + column + at, load(sums + i * panel + at), call.dim - column - at);
                }
            }
        }
    );
}

// What a tile's queries add to the gradients of all keys, or values, up to them: (keys, pitch).
XSMOE_INLINE void add_weighted_sums(
    const Attention& call, const float* weights, const Left<float>& rows, int64_t count, int64_t results, float* to
) {
    const int64_t pitch = pitch_of(call);
    const Segment<float> segment = {0, rows.at, count, panel};
    product<false>(
        results, pitch, Left<float>{weights, tile}, Right<float>{&segment, 1, rows.stride},
        [&](int64_t row, int block, int64_t column, int width, const float* sums) {
            for (int i = 0; i < block; ++i) {
                float* into = to + (row + i) * pitch + column;
                for (int at = 0; at < width; at += lanes)
                    store(into + at, load(into + at) + load(sums + i * panel + at));
            }
        }
    );
}

// Some queries' rows of the mask as columns of a tile.
XSMOE_INLINE void transpose_kept(
    const Attention& call, const Unit& unit, int64_t first, int64_t queries, uint8_t* kept
) {
    for (int64_t query = 0; query < queries; ++query) {
        const uint8_t* keep = unit.keep + (first + query) * call.places;
        for (int64_t key = 0; key < first + queries; ++key) kept[key * tile + query] = keep[key];
    }
}

template <class T>
struct ForwardScratch {
    LeftRows<T, float> k, v;
    float *queries, *shares;  // (dim, tile), (longest, tile)
    uint8_t* kept;            // (longest, tile)

    ForwardScratch(Arena& arena, const Attention& call)
        : k(call.dim, lanes),
          v(call.dim, lanes),
          queries(arena.take<float>(call.dim * tile)),
          shares(arena.take<float>(call.longest * tile)),
          kept(arena.take<uint8_t>(call.keep == nullptr ? 0 : call.longest * tile)) {
        k.take(arena, call.longest);
        v.take(arena, call.longest);
    }

    Dropout dropout(const Attention& call, const Unit& unit, int64_t first, int64_t queries) const {
        if (unit.keep == nullptr) return {nullptr, 1.0f};
        transpose_kept(call, unit, first, queries, kept);
        return {kept, call.grown};
    }
};

template <class T>
void forward(const Forward& call, int64_t first_unit, int64_t last_unit, void* memory) {
    Arena arena(memory);
    const ForwardScratch<T> scratch(arena, call);
    const float scale = scale_of(call.dim);
    for (int64_t place = first_unit; place < last_unit; ++place) {
        const Unit unit(call, place);
        const T* q = unit.in<T>(call.q);
        const Left<float> k = scratch.k.of(unit.in<T>(call.k), call.k.row_stride, unit.rows);
        const Left<float> v = scratch.v.of(unit.in<T>(call.v), call.v.row_stride, unit.rows);
        for (int64_t first = 0; first < unit.rows; first += tile) {
            const int64_t count = least(unit.rows - first, tile), keys = first + count;
            transpose_rows(q + first * call.q.row_stride, call.q.row_stride, count, call.dim, scratch.queries);
            dot_products(call, k, keys, count, scratch.queries, scratch.shares);
            const Dropout dropout = scratch.dropout(call, unit, first, count);
            for (int64_t query = 0; query < count; query += lanes) {
                softmax({first + query, keys}, scale, scratch.shares + query);
                if (unit.keep == nullptr) continue;
                for (int64_t key = 0; key < keys; ++key) {
                    float* share = scratch.shares + key * tile + query;
                    store(share, dropout.of(key, query, load(share)));
                }
            }
            weighted_sums<true, T>(call, unit, scratch.shares, v, keys, first, count, call.y);
        }
    }
}

template <class T>
struct BackwardScratch : ForwardScratch<T> {
    LeftRows<T, float> q, grad;
    float *upstream, *grads;         // (dim, tile), (longest, tile)
    float *key_grads, *value_grads;  // (longest, pitch), of a sequence of several tiles

    BackwardScratch(Arena& arena, const Backward& call)
        : ForwardScratch<T>(arena, call),
          q(call.dim, lanes),
          grad(call.dim, lanes),
          upstream(arena.take<float>(call.dim * tile)),
          grads(arena.take<float>(call.longest * tile)),
          key_grads(arena.take<float>(call.longest > tile ? call.longest * pitch_of(call) : 0)),
          value_grads(arena.take<float>(call.longest > tile ? call.longest * pitch_of(call) : 0)) {
        q.take(arena, least(call.longest, tile));
        grad.take(arena, least(call.longest, tile));
    }
};

template <class T>
void write(const Attention& call, const Unit& unit, const float* sums, void* result) {
    if (result == nullptr) return;
    for (int64_t row = 0; row < unit.rows; ++row) {
        T* to = unit.out<T>(call, result, row);
        for (int64_t column = 0; column < call.dim; column += lanes) {
            store(to + column, load(sums + row * pitch_of(call) + column), call.dim - column);
        }
    }
}

template <class T>
void backward(const Backward& call, int64_t first_unit, int64_t last_unit, void* memory) {
    Arena arena(memory);
    const BackwardScratch<T> scratch(arena, call);
    const float scale = scale_of(call.dim);
    for (int64_t place = first_unit; place < last_unit; ++place) {
        const Unit unit(call, place);
        const Left<float> k = scratch.k.of(unit.in<T>(call.k), call.k.row_stride, unit.rows);
        const Left<float> v = scratch.v.of(unit.in<T>(call.v), call.v.row_stride, unit.rows);
        const bool tiled = unit.rows > tile;
        if (tiled) {
            const size_t bytes = static_cast<size_t>(unit.rows * pitch_of(call)) * sizeof(float);
            std::memset(scratch.key_grads, 0, bytes);
            std::memset(scratch.value_grads, 0, bytes);
        }
        for (int64_t first = 0; first < unit.rows; first += tile) {
            const int64_t count = least(unit.rows - first, tile), keys = first + count;
            const int64_t q_stride = call.q.row_stride, grad_stride = call.grad.row_stride;
            const T *q_rows = unit.in<T>(call.q) + first * q_stride,
                    *rows = unit.in<T>(call.grad) + first * grad_stride;
            transpose_rows(q_rows, q_stride, count, call.dim, scratch.queries);
            transpose_rows(rows, grad_stride, count, call.dim, scratch.upstream);
            dot_products(call, k, keys, count, scratch.queries, scratch.shares);
            dot_products(call, v, keys, count, scratch.upstream, scratch.grads);
            const Dropout dropout = scratch.dropout(call, unit, first, count);
            for (int64_t query = 0; query < count; query += lanes) {
                const Queries queries = {first + query, keys};
                softmax(queries, scale, scratch.shares + query);
                softmax_gradient(queries, dropout, query, scale, scratch.shares + query, scratch.grads + query);
            }
            if (call.dq != nullptr) {
                weighted_sums<true, T>(call, unit, scratch.grads, k, keys, first, count, call.dq);
            }
            if (call.dk != nullptr) {
                const Left<float> q = scratch.q.of(q_rows, q_stride, count);
                if (tiled) {
                    add_weighted_sums(call, scratch.grads, q, count, keys, scratch.key_grads);
                } else {
                    weighted_sums<false, T>(call, unit, scratch.grads, q, count, 0, keys, call.dk);
                }
            }
            if (call.dv != nullptr) {
                const Left<float> grad = scratch.grad.of(rows, grad_stride, count);
                if (tiled) {
                    add_weighted_sums(call, scratch.shares, grad, count, keys, scratch.value_grads);
                } else {
                    weighted_sums<false, T>(call, unit, scratch.shares, grad, count, 0, keys, call.dv);
                }
            }
        }
        if (tiled) {
            write<T>(call, unit, scratch.key_grads, call.dk);
            write<T>(call, unit, scratch.value_grads, call.dv);
        }
    }
}

template <class T>
constexpr Kernels table = {
    .forward_bytes = bytes_of<ForwardScratch<T>, const Forward&>,
    .forward = forward<T>,
    .backward_bytes = bytes_of<BackwardScratch<T>, const Backward&>,
    .backward = backward<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_TIER

namespace xsmoe::packed_attention::XSMOE_TIER {

extern const Kernels for_float = xsmoe::XSMOE_TIER::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_TIER::table<BFloat16>;

}  // namespace xsmoe::packed_attention::XSMOE_TIER
