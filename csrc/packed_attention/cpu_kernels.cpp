// packed_attention, one head of one sequence after the other. The attention probabilities of a tile of queries are
// computed in cache, and recomputed in backward. Nothing is padded, and no memory grows with the square of a length.
// Compiled once for each instruction set level.

#include "cpu/arena.h"
#include "cpu/lhs_rows.h"
#include "cpu/transpose.h"
#include "packed_attention/kernels.h"
#include "packed_attention/softmax.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using packed_attention::Attention;
using packed_attention::Backward;
using packed_attention::Forward;
using packed_attention::Heads;
using packed_attention::Kernels;

XSMOE_INLINE int64_t pitch_of(const Attention& call) { return round_up(call.dim, lanes); }

// One head of one sequence.
struct Unit {
    int64_t head, first, rows;  // index of the head, its first row among all rows, and its number of rows
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

    // Return the address of row `row` in a dense result.
    template <class T>
    T* out(const Attention& call, void* result, int64_t row) const {
        return static_cast<T*>(result) + ((first + row) * call.heads + head) * call.dim;
    }
};

// Copy rows into the columns of a tile, padded with zeros to a whole vector.
template <class T>
void transpose_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, float* to) {
    if (rows % lanes != 0) {
        for (int64_t column = 0; column < dim; ++column) store(to + column * tile + rows / lanes * lanes, Vec{});
    }
    for (int64_t row = 0; row < rows; row += 4) {
        const T* source = from + row * stride;
        const int64_t height = minimum(rows - row, 4);
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

// Compute the scores of a tile's queries, or the gradients of their probabilities: dot products of all rows of keys or
// values with the tile's columns.
XSMOE_INLINE void dot_products(
    const Attention& call, const Lhs<float>& left, int64_t keys, int64_t queries, const float* columns, float* to
) {
    const Segment<float> segment = {0, columns, call.dim, panel};
    product<false>(
        keys, round_up(queries, lanes), left, Rhs<float>{&segment, 1, tile},
        [&](int64_t row, int rows, int64_t column, int width, const float* sums) {
            for (int i = 0; i < rows; ++i) {
                for (int at = 0; at < width; at += lanes) {
                    store(to + (row + i) * tile + column + at, load(sums + i * panel + at));
                }
            }
        }
    );
}

// Compute sums of `count` rows of a tensor, weighted by a tile or, if `transposed`, by its columns, as rows of a
// result.
template <bool transposed, class T>
XSMOE_INLINE void weighted_sums(
    const Attention& call, const Unit& unit, const float* weights, const Lhs<float>& rows, int64_t count,
    int64_t first_result, int64_t results, void* to
) {
    const Segment<float> segment = {0, rows.at, count, panel};
    product<transposed>(
        results, pitch_of(call), Lhs<float>{weights, tile}, Rhs<float>{&segment, 1, rows.stride},
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

// Add a tile's contribution to the gradients of all keys, or values, up to its queries: (keys, pitch).
XSMOE_INLINE void add_weighted_sums(
    const Attention& call, const float* weights, const Lhs<float>& rows, int64_t count, int64_t results, float* to
) {
    const int64_t pitch = pitch_of(call);
    const Segment<float> segment = {0, rows.at, count, panel};
    product<false>(
        results, pitch, Lhs<float>{weights, tile}, Rhs<float>{&segment, 1, rows.stride},
        [&](int64_t row, int block, int64_t column, int width, const float* sums) {
            for (int i = 0; i < block; ++i) {
                float* into = to + (row + i) * pitch + column;
                for (int at = 0; at < width; at += lanes)
                    store(into + at, load(into + at) + load(sums + i * panel + at));
            }
        }
    );
}

// Copy some queries' rows of the mask into the columns of a tile.
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
    LhsRows<T, float> k, v;
    float *queries, *probabilities;  // (dim, tile), (longest, tile)
    uint8_t* kept;                   // (longest, tile)

    ForwardScratch(Arena& arena, const Attention& call)
        : k(call.dim, lanes),
          v(call.dim, lanes),
          queries(arena.allocate<float>(call.dim * tile)),
          probabilities(arena.allocate<float>(call.longest * tile)),
          kept(arena.allocate<uint8_t>(call.keep == nullptr ? 0 : call.longest * tile)) {
        k.allocate(arena, call.longest);
        v.allocate(arena, call.longest);
    }

    Dropout dropout(const Attention& call, const Unit& unit, int64_t first, int64_t queries) const {
        if (unit.keep == nullptr) return {nullptr, 1.0f};
        transpose_kept(call, unit, first, queries, kept);
        return {kept, call.keep_scale};
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
        const Lhs<float> k = scratch.k.of(unit.in<T>(call.k), call.k.row_stride, unit.rows);
        const Lhs<float> v = scratch.v.of(unit.in<T>(call.v), call.v.row_stride, unit.rows);
        for (int64_t first = 0; first < unit.rows; first += tile) {
            const int64_t count = minimum(unit.rows - first, tile), keys = first + count;
            transpose_rows(q + first * call.q.row_stride, call.q.row_stride, count, call.dim, scratch.queries);
            dot_products(call, k, keys, count, scratch.queries, scratch.probabilities);
            const Dropout dropout = scratch.dropout(call, unit, first, count);
            for (int64_t query = 0; query < count; query += lanes) {
                softmax({first + query, keys}, scale, scratch.probabilities + query);
                if (unit.keep == nullptr) continue;
                for (int64_t key = 0; key < keys; ++key) {
                    float* probability = scratch.probabilities + key * tile + query;
                    store(probability, dropout.of(key, query, load(probability)));
                }
            }
            weighted_sums<true, T>(call, unit, scratch.probabilities, v, keys, first, count, call.y);
        }
    }
}

template <class T>
struct BackwardScratch : ForwardScratch<T> {
    LhsRows<T, float> q, grad;
    float *upstream, *grads;         // (dim, tile), (longest, tile)
    float *key_grads, *value_grads;  // (longest, pitch), if a sequence has several tiles

    BackwardScratch(Arena& arena, const Backward& call)
        : ForwardScratch<T>(arena, call),
          q(call.dim, lanes),
          grad(call.dim, lanes),
          upstream(arena.allocate<float>(call.dim * tile)),
          grads(arena.allocate<float>(call.longest * tile)),
          key_grads(arena.allocate<float>(call.longest > tile ? call.longest * pitch_of(call) : 0)),
          value_grads(arena.allocate<float>(call.longest > tile ? call.longest * pitch_of(call) : 0)) {
        q.allocate(arena, minimum(call.longest, tile));
        grad.allocate(arena, minimum(call.longest, tile));
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
        const Lhs<float> k = scratch.k.of(unit.in<T>(call.k), call.k.row_stride, unit.rows);
        const Lhs<float> v = scratch.v.of(unit.in<T>(call.v), call.v.row_stride, unit.rows);
        const bool tiled = unit.rows > tile;
        if (tiled) {
            const size_t bytes = static_cast<size_t>(unit.rows * pitch_of(call)) * sizeof(float);
            std::memset(scratch.key_grads, 0, bytes);
            std::memset(scratch.value_grads, 0, bytes);
        }
        for (int64_t first = 0; first < unit.rows; first += tile) {
            const int64_t count = minimum(unit.rows - first, tile), keys = first + count;
            const int64_t q_stride = call.q.row_stride, grad_stride = call.grad.row_stride;
            const T *q_rows = unit.in<T>(call.q) + first * q_stride,
                    *rows = unit.in<T>(call.grad) + first * grad_stride;
            transpose_rows(q_rows, q_stride, count, call.dim, scratch.queries);
            transpose_rows(rows, grad_stride, count, call.dim, scratch.upstream);
            dot_products(call, k, keys, count, scratch.queries, scratch.probabilities);
            dot_products(call, v, keys, count, scratch.upstream, scratch.grads);
            const Dropout dropout = scratch.dropout(call, unit, first, count);
            for (int64_t query = 0; query < count; query += lanes) {
                const Queries queries = {first + query, keys};
                softmax(queries, scale, scratch.probabilities + query);
                softmax_gradient(queries, dropout, query, scale, scratch.probabilities + query, scratch.grads + query);
            }
            if (call.dq != nullptr) {
                weighted_sums<true, T>(call, unit, scratch.grads, k, keys, first, count, call.dq);
            }
            if (call.dk != nullptr) {
                const Lhs<float> q = scratch.q.of(q_rows, q_stride, count);
                if (tiled) {
                    add_weighted_sums(call, scratch.grads, q, count, keys, scratch.key_grads);
                } else {
                    weighted_sums<false, T>(call, unit, scratch.grads, q, count, 0, keys, call.dk);
                }
            }
            if (call.dv != nullptr) {
                const Lhs<float> grad = scratch.grad.of(rows, grad_stride, count);
                if (tiled) {
                    add_weighted_sums(call, scratch.probabilities, grad, count, keys, scratch.value_grads);
                } else {
                    weighted_sums<false, T>(call, unit, scratch.probabilities, grad, count, 0, keys, call.dv);
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
}  // namespace xsmoe::XSMOE_ISA

namespace xsmoe::packed_attention::XSMOE_ISA {

extern const Kernels for_float = xsmoe::XSMOE_ISA::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_ISA::table<BFloat16>;

}  // namespace xsmoe::packed_attention::XSMOE_ISA
