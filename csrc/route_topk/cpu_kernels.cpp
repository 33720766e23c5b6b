// route_topk on as many rows at once as a vector has lanes. A lane holds a row, so that all rows are computed by the
// same instructions, and a result does not depend on the neighboring rows. Compiled once for each instruction set
// level.

#include "cpu/arena.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"
#include "route_topk/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using route_topk::Backward;
using route_topk::Forward;
using route_topk::Kernels;
using route_topk::Matrix;

// Transpose four rows of four numbers into four columns, `lanes` apart.
template <class T>
XSMOE_INLINE void transpose_quads(const T* from, int64_t row_stride, float* to) {
    Quad quads[4];
    for (int i = 0; i < 4; ++i) quads[i] = load_quad(from + i * row_stride);
    transpose(quads);
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * lanes, &quads[i], sizeof(Quad));
}

// Compute the (columns, lanes) transpose of some rows, with zeros in the other lanes.
template <class T>
void load_columns(const Matrix& matrix, int64_t first, int64_t rows, int64_t columns, float* to) {
    const T* from = static_cast<const T*>(matrix.at) + first * matrix.row_stride;
    int64_t column = 0;
    if (rows == lanes && matrix.column_stride == 1) {
        for (; column + 4 <= columns; column += 4) {
            for (int row = 0; row < lanes; row += 4) {
                transpose_quads(from + row * matrix.row_stride + column, matrix.row_stride, to + column * lanes + row);
            }
        }
    }
    for (; column < columns; ++column) {
        const T* at = from + column * matrix.column_stride;
        float* lane = to + column * lanes;
        for (int64_t row = 0; row < rows; ++row) lane[row] = to_float(at[row * matrix.row_stride]);
        for (int64_t row = rows; row < lanes; ++row) lane[row] = 0;
    }
}

// Return integers in the order of the logits: NaN above infinity, as in torch's sorts, and both zeros equal.
XSMOE_INLINE IntVec key_of(Vec logit) {
    const IntVec bits = bit_cast<IntVec>(logit + 0.0f);
    const IntVec key = bits ^ ((bits >> 31) & 0x7fffffff);
    return logit == logit ? key : (IntVec{} | 0x7fffffff);
}

XSMOE_INLINE Vec logit_of(IntVec key) { return bit_cast<Vec>(key ^ ((key >> 31) & 0x7fffffff)); }

// A compensated sum (Kahan), whose error does not grow with the number of experts.
struct Sum {
    Vec total = {}, excess = {};

    XSMOE_INLINE void operator+=(Vec value) {
        const Vec corrected = value - excess, next = total + corrected;
        excess = (next - total) - corrected;
        total = next;
    }
};

XSMOE_INLINE bool any(IntVec mask) {
    uint64_t parts[lanes / 2], all = 0;
    std::memcpy(parts, &mask, sizeof(mask));
    for (int i = 0; i < lanes / 2; ++i) all |= parts[i];
    return all != 0;
}

constexpr int32_t below_all = -0x7fffffff - 1;

// Insert every expert into each lane's list of the best ones so far, after those with an equal logit.
void insert_all(const float* logits, int64_t experts, int64_t chosen, int32_t* keys, int32_t* places) {
    for (int64_t j = 0; j < chosen; ++j) {
        store(keys + j * lanes, IntVec{} + below_all);
        store(places + j * lanes, IntVec{});
    }
    const int64_t settled = 4 * lanes * chosen;  // after this many experts, an expert seldom enters any lane's list
    for (int64_t e = 0; e < experts; ++e) {
        const IntVec key = key_of(load(logits + e * lanes));
        if (e >= settled && !any(key > load(keys + (chosen - 1) * lanes))) continue;
        IntVec moving = key, mover = IntVec{} + static_cast<int32_t>(e);
        for (int64_t j = 0; j < chosen; ++j) {
            const IntVec held = load(keys + j * lanes), holder = load(places + j * lanes);
            const IntVec better = key > held;
            store(keys + j * lanes, better ? moving : held);
            store(places + j * lanes, better ? mover : holder);
            moving = better ? held : moving;
            mover = better ? holder : mover;
        }
    }
}

// The memory to sort a lane: its keys and their experts, twice.
struct SortScratch {
    uint32_t *keys, *other_keys;
    int32_t *places, *other_places;

    SortScratch(Arena& arena, int64_t experts)
        : keys(arena.allocate<uint32_t>(experts)),
          other_keys(arena.allocate<uint32_t>(experts)),
          places(arena.allocate<int32_t>(experts)),
          other_places(arena.allocate<int32_t>(experts)) {}
};

// Sort all experts of each lane by a radix sort from the last digit on. It is stable: equal logits keep their order.
void sort_all(
    const float* logits, int64_t experts, int64_t chosen, SortScratch scratch, int32_t* keys, int32_t* places
) {
    constexpr int digits = 4, values = 256;
    for (int lane = 0; lane < lanes; ++lane) {
        int32_t counts[digits][values] = {};
        for (int64_t e = 0; e < experts; ++e) {
            const float logit = logits[e * lanes + lane];
            const auto bits = bit_cast<int32_t>(logit + 0.0f);
            const int32_t ranked = logit == logit ? bits ^ ((bits >> 31) & 0x7fffffff) : 0x7fffffff;
            const uint32_t key = static_cast<uint32_t>(ranked) ^ 0x7fffffff;  // the largest becomes 0
            scratch.keys[e] = key;
            scratch.places[e] = static_cast<int32_t>(e);
            for (int d = 0; d < digits; ++d) ++counts[d][key >> 8 * d & 0xff];
        }
        for (int d = 0; d < digits; ++d) {
            if (counts[d][scratch.keys[0] >> 8 * d & 0xff] == experts) continue;
            int32_t begin = 0;
            for (int value = 0; value < values; ++value) {
                const int32_t count = counts[d][value];
                counts[d][value] = begin;
                begin += count;
            }
            for (int64_t i = 0; i < experts; ++i) {
                const int32_t to = counts[d][scratch.keys[i] >> 8 * d & 0xff]++;
                scratch.other_keys[to] = scratch.keys[i];
                scratch.other_places[to] = scratch.places[i];
            }
            const SortScratch turned = scratch;
            scratch.keys = turned.other_keys;
            scratch.places = turned.other_places;
            scratch.other_keys = turned.keys;
            scratch.other_places = turned.places;
        }
        for (int64_t j = 0; j < chosen; ++j) {
            keys[j * lanes + lane] = static_cast<int32_t>(scratch.keys[j] ^ 0x7fffffff);
            places[j * lanes + lane] = scratch.places[j];
        }
    }
}

// Return whether sorting is faster. Insertion costs a few vector operations for each expert and place. Sorting costs
// some twelve cycles for each expert and row, and 1,200 for the histograms of the digits.
XSMOE_INLINE bool sorting_is_faster(int64_t experts, int64_t chosen) {
    return 5 * experts * chosen > lanes * (12 * experts + 1200);
}

struct ForwardScratch {
    float* logits;           // (experts, lanes)
    int32_t *keys, *places;  // (chosen, lanes)
    SortScratch sort;

    ForwardScratch(Arena& arena, const Forward& call)
        : logits(arena.allocate<float>(call.experts * lanes)),
          keys(arena.allocate<int32_t>(call.chosen * lanes)),
          places(arena.allocate<int32_t>(call.chosen * lanes)),
          sort(arena, sorting_is_faster(call.experts, call.chosen) ? call.experts : 0) {}
};

template <class T>
void forward(const Forward& call, int64_t first, int64_t last, void* memory, int64_t* counts) {
    Arena arena(memory);
    const ForwardScratch scratch(arena, call);
    const int64_t experts = call.experts, chosen = call.chosen;
    for (int64_t row = first; row < last; row += lanes) {
        const int64_t rows = minimum(last - row, lanes);
        load_columns<T>(call.logits, row, rows, experts, scratch.logits);
        if (sorting_is_faster(experts, chosen)) {
            sort_all(scratch.logits, experts, chosen, scratch.sort, scratch.keys, scratch.places);
        } else {
            insert_all(scratch.logits, experts, chosen, scratch.keys, scratch.places);
        }

        // The gates replace the keys in place.
        const Vec top = logit_of(load(scratch.keys));
        auto* gates = reinterpret_cast<float*>(scratch.keys);
        Sum sum;
        for (int64_t j = 0; j < chosen; ++j) {
            const Vec exponential = exp_negative(logit_of(load(scratch.keys + j * lanes)) - top);
            store(gates + j * lanes, exponential);
            sum += exponential;
        }
        if (!call.renormalize) {
            sum = Sum{};
            for (int64_t e = 0; e < experts; ++e) sum += exp_negative(load(scratch.logits + e * lanes) - top);
        }
        for (int64_t j = 0; j < chosen; ++j) store(gates + j * lanes, load(gates + j * lanes) / sum.total);

        T* to = static_cast<T*>(call.gates) + row * chosen;
        int64_t* places = call.places + row * chosen;
        for (int64_t lane = 0; lane < rows; ++lane) {
            for (int64_t j = 0; j < chosen; ++j) {
                const int32_t place = scratch.places[j * lanes + lane];
                assign(*to++, gates[j * lanes + lane]);
                *places++ = place;
                ++counts[place];
            }
        }
    }
}

struct BackwardScratch {
    float *grad, *gates;   // (chosen, lanes)
    float* probabilities;  // (experts, lanes), without renormalization

    BackwardScratch(Arena& arena, const Backward& call)
        : grad(arena.allocate<float>(call.chosen * lanes)),
          gates(arena.allocate<float>(call.chosen * lanes)),
          probabilities(arena.allocate<float>(call.renormalize ? 0 : call.experts * lanes)) {}
};

// Replace logits (count, lanes) by their softmax in each lane.
XSMOE_INLINE void softmax(float* logits, int64_t count) {
    IntVec most = key_of(load(logits));
    for (int64_t i = 1; i < count; ++i) {
        const IntVec key = key_of(load(logits + i * lanes));
        most = key > most ? key : most;
    }
    const Vec top = logit_of(most);
    Sum sum;
    for (int64_t i = 0; i < count; ++i) {
        const Vec exponential = exp_negative(load(logits + i * lanes) - top);
        store(logits + i * lanes, exponential);
        sum += exponential;
    }
    for (int64_t i = 0; i < count; ++i) store(logits + i * lanes, load(logits + i * lanes) / sum.total);
}

template <class T>
void backward(const Backward& call, int64_t first, int64_t last, void* memory) {
    Arena arena(memory);
    const BackwardScratch scratch(arena, call);
    const int64_t experts = call.experts, chosen = call.chosen;
    for (int64_t row = first; row < last; row += lanes) {
        const int64_t rows = minimum(last - row, lanes);
        const int64_t* places = call.places + row * chosen;
        const T* logits = static_cast<const T*>(call.logits.at) + row * call.logits.row_stride;
        T* to = static_cast<T*>(call.dlogits) + row * experts;
        float* gates = scratch.gates;
        load_columns<T>(call.grad, row, rows, chosen, scratch.grad);
        if (call.renormalize) {
            for (int64_t j = 0; j < chosen; ++j) {
                for (int64_t lane = 0; lane < lanes; ++lane) {
                    const int64_t place = lane < rows ? places[lane * chosen + j] : -1;
                    const T* at = logits + lane * call.logits.row_stride + place * call.logits.column_stride;
                    gates[j * lanes + lane] = place < 0 ? 0 : to_float(*at);
                }
            }
            softmax(gates, chosen);
        } else {
            load_columns<T>(call.logits, row, rows, experts, scratch.probabilities);
            softmax(scratch.probabilities, experts);
            for (int64_t j = 0; j < chosen; ++j) {
                for (int64_t lane = 0; lane < lanes; ++lane) {
                    const int64_t place = lane < rows ? places[lane * chosen + j] : 0;
                    gates[j * lanes + lane] = scratch.probabilities[place * lanes + lane];
                }
            }
        }

        Vec common = {};
        for (int64_t j = 0; j < chosen; ++j) common += load(scratch.grad + j * lanes) * load(gates + j * lanes);
        for (int64_t j = 0; j < chosen; ++j) {
            store(gates + j * lanes, load(gates + j * lanes) * (load(scratch.grad + j * lanes) - common));
        }
        if (call.renormalize) {
            std::memset(static_cast<void*>(to), 0, rows * experts * sizeof(T));
        } else {
            for (int64_t e = 0; e < experts; ++e) {
                float* at = scratch.probabilities + e * lanes;
                store(at, load(at) * (Vec{} - common));
                for (int64_t lane = 0; lane < rows; ++lane) assign(to[lane * experts + e], at[lane]);
            }
        }
        for (int64_t lane = 0; lane < rows; ++lane) {
            for (int64_t j = 0; j < chosen; ++j) {
                assign(to[lane * experts + places[lane * chosen + j]], gates[j * lanes + lane]);
            }
        }
    }
}

template <class T>
constexpr Kernels table = {
    .lanes = lanes,
    .forward_bytes = bytes_of<ForwardScratch, const Forward&>,
    .forward = forward<T>,
    .backward_bytes = bytes_of<BackwardScratch, const Backward&>,
    .backward = backward<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

namespace xsmoe::route_topk::XSMOE_ISA {

extern const Kernels for_float = xsmoe::XSMOE_ISA::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_ISA::table<BFloat16>;

}  // namespace xsmoe::route_topk::XSMOE_ISA
