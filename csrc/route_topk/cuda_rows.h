// Rows of logits in the registers of a warp. A few lanes hold a row.
#pragma once

#include "cuda/numbers.h"

namespace xsmoe::cuda::route_topk {

// A lane holds `values_` numbers of a row, in chunks of 16 bytes. Lane l holds the chunks l, lanes + l, 2 lanes + l and
// so on, so that the loads of neighboring lanes are contiguous.
template <class T, int lanes_, int values_>
struct Layout {
    using Value = T;
    static constexpr int lanes = lanes_, values = values_;
    static constexpr int rows = warp_size / lanes;  // rows that a warp holds at once
    static constexpr int chunk = per_load<T>;
    static_assert(values % chunk == 0);

    // Numbers are kept in their storage type, so that no instruction waits for a load before the numbers are used.
    static constexpr int per_word = 4 / static_cast<int>(sizeof(T));
    uint32_t words[values / per_word];

    static __device__ int row() { return lane() / lanes; }
    static __device__ int lane_of_row() { return lane() % lanes; }
    // Return the column of number `value` of this lane.
    static __device__ int column(int value) { return (value / chunk * lanes + lane_of_row()) * chunk + value % chunk; }

    __device__ float operator[](int value) const {
        if constexpr (per_word == 1) {
            return bits_to_float(words[value]);
        } else {
            return to_float(T{static_cast<uint16_t>(words[value / 2] >> (16 * (value % 2)))});
        }
    }

    // Load a row, with zeros after its end. `whole` says that its chunks can be loaded with one instruction each.
    __device__ void load(const T* from, int columns, bool whole) {
        XSMOE_UNROLL
        for (int first = 0; first < values; first += chunk) {
            const int begin = column(first);
            uint32_t* to = words + first / per_word;
            if (whole && begin + chunk <= columns) {
                const uint4 loaded = *reinterpret_cast<const uint4*>(from + begin);
                to[0] = loaded.x;
                to[1] = loaded.y;
                to[2] = loaded.z;
                to[3] = loaded.w;
                continue;
            }
            XSMOE_UNROLL
            for (int word = 0; word < 4; ++word) {
                const int at = begin + word * per_word;
                uint32_t bits = at < columns ? bits_of(from[at]) : 0;
                if constexpr (per_word == 2) bits |= at + 1 < columns ? bits_of(from[at + 1]) << 16 : 0;
                to[word] = bits;
            }
        }
    }

private:
    static __device__ uint32_t bits_of(T value) {
        if constexpr (per_word == 1) {
            return float_to_bits(value);
        } else {
            return value.bits;
        }
    }
};

// Reduce over the lanes of a row. All of these lanes get the same bits.
template <int lanes>
__device__ inline float sum_of_row(float value) {
    XSMOE_UNROLL
    for (int other = lanes / 2; other > 0; other /= 2) value += __shfl_xor_sync(whole_warp, value, other);
    return value;
}

// Return the largest number of a row, without NaN.
template <int lanes>
__device__ inline float max_of_row(float value) {
    XSMOE_UNROLL
    for (int other = lanes / 2; other > 0; other /= 2) value = fmaxf(value, __shfl_xor_sync(whole_warp, value, other));
    return value;
}

template <int lanes>
__device__ inline uint32_t max_of_row(uint32_t value) {
    if constexpr (lanes == warp_size) {
        return __reduce_max_sync(whole_warp, value);
    } else {
        XSMOE_UNROLL
        for (int other = lanes / 2; other > 0; other /= 2) {
            const uint32_t theirs = __shfl_xor_sync(whole_warp, value, other);
            value = theirs > value ? theirs : value;
        }
        return value;
    }
}

template <int lanes>
__device__ inline uint32_t min_of_row(uint32_t value) {
    return ~max_of_row<lanes>(~value);
}

// Return integers in the order of the logits: NaN above infinity, as in torch's sorts, and both zeros equal.
__device__ inline uint32_t key_of(float logit) {
    if (logit != logit) return 0xffffffffu;
    const uint32_t bits = float_to_bits(logit + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float logit_of(uint32_t key) { return bits_to_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// The key of a missing or already chosen expert. It is below all others.
constexpr uint32_t taken = 0;

// As float32, a 16-bit logit has only zeros in its last 13 bits. The key stores the inverted column there. Then all
// keys of a row differ, and of equal logits the first has the largest key.
template <class T>
constexpr bool has_column = sizeof(T) == 2;
constexpr uint32_t column_bits = 0x1fff;

template <class T>
__device__ inline uint32_t key_of(float logit, int column) {
    const uint32_t key = key_of(logit);
    return has_column<T> ? (key & ~column_bits) | (column_bits - static_cast<uint32_t>(column)) : key;
}

template <class T>
__device__ inline float logit_of_key(uint32_t key) {
    if (!has_column<T>) return logit_of(key);
    return logit_of(key & 0x80000000u ? key & ~column_bits : key | column_bits);
}

// Return the largest key of each row and its column, the first of equal ones, and mark it as taken.
template <class Row>
__device__ inline uint32_t take_best(uint32_t (&keys)[Row::values], int& column) {
    uint32_t best = keys[0];
    XSMOE_UNROLL
    for (int v = 1; v < Row::values; ++v) best = keys[v] > best ? keys[v] : best;
    best = max_of_row<Row::lanes>(best);
    if constexpr (has_column<typename Row::Value>) {
        column = static_cast<int>(column_bits - (best & column_bits));
        XSMOE_UNROLL
        for (int v = 0; v < Row::values; ++v) keys[v] = keys[v] == best ? taken : keys[v];
    } else {
        int at = Row::values;
        XSMOE_UNROLL
        for (int v = Row::values - 1; v >= 0; --v) at = keys[v] == best ? v : at;
        const uint32_t own = at < Row::values ? static_cast<uint32_t>(Row::column(at)) : 0xffffffffu;
        const uint32_t first = min_of_row<Row::lanes>(own);
        column = static_cast<int>(first);
        XSMOE_UNROLL
        for (int v = 0; v < Row::values; ++v) keys[v] = own == first && v == at ? taken : keys[v];
    }
    return best;
}

}  // namespace xsmoe::cuda::route_topk
