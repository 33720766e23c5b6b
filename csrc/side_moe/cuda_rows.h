// What kernels that go over rows share: which level a block or a warp works for, loads of pieces, sums over lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/runtime.h"
#include "side_moe/cuda.h"

namespace xsmoe::side_moe {

using namespace xsmoe::cuda;

// The levels of a launch, as an argument of its kernel: a table in memory would have to be copied there first.
template <class Level>
struct Levels {
    Level level[most_levels];

    Levels(const Level* from, int count) : level{} {
        if (count > most_levels) throw std::invalid_argument("a launch takes at most 8 levels");
        std::copy(from, from + count, level);
    }
};

// Units of work, such as blocks, that levels bring one after the other.
struct Units {
    int64_t first[most_levels + 1];
    int count;

    template <class Level, class UnitsOf>
    Units(const Levels<Level>& levels, int count, UnitsOf units_of) : first{}, count(count) {
        for (int i = 0; i < count; ++i) first[i + 1] = first[i] + units_of(levels.level[i]);
    }

    int64_t all() const { return first[count]; }

    // The level that a unit belongs to.
    __device__ int level_of(int64_t unit) const {
        int found = 0;
        while (found + 1 < count && unit >= first[found + 1]) ++found;
        return found;
    }
};

// `count` numbers of a row from a column on; `whole` says that they exist and lie at a 16-byte boundary, else what is
// beyond the row's end is 0. A lane has the same numbers either way, so that alignment changes no bits.
template <bool whole, int count, class T>
__device__ inline void load_piece(const T* row, int64_t column, int64_t dim, float (&values)[count]) {
    if constexpr (whole) {
        XSMOE_UNROLL
        for (int first = 0; first < count; first += per_load<T>) {
            float part[per_load<T>];
            load_16(row + column + first, part);
            XSMOE_UNROLL
            for (int i = 0; i < per_load<T>; ++i) values[first + i] = part[i];
        }
    } else {
        XSMOE_UNROLL
        for (int i = 0; i < count; ++i) values[i] = column + i < dim ? to_float(row[column + i]) : 0.0f;
    }
}

// The same the other way round.
template <bool whole, class T, int count>
__device__ inline void store_piece(T* row, int64_t column, int64_t dim, const float (&values)[count]) {
    if constexpr (whole) {
        static_assert(count == per_load<T>);
        store_16(row + column, values);
    } else {
        XSMOE_UNROLL
        for (int i = 0; i < count; ++i) {
            if (column + i < dim) row[column + i] = from_float<T>(values[i]);
        }
    }
}

template <int lanes = warp_size>
__device__ inline float sum_over_lanes(float value) {
    XSMOE_UNROLL
    for (int apart = lanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(whole_warp, value, apart);
    return value;
}

template <int lanes>
__device__ inline float largest_of_lanes(float value) {
    XSMOE_UNROLL
    for (int apart = lanes / 2; apart > 0; apart /= 2) {
        value = fmaxf(value, __shfl_xor_sync(whole_warp, value, apart));
    }
    return value;
}

// Sums `count` numbers, a power of two, over the lanes of a warp, and leaves them spread over these: with count = 64
// lane l has those at 2 l and 2 l + 1, with count = 16 lanes l and l + 1 both have that at l / 2. Each exchange halves
// what is left, which takes about `count` of them instead of 5 * count. `apart` is the distance of the first.
template <int count, int apart = warp_size / 2, int size>
__device__ inline void spread_sums(float (&values)[size]) {
    if constexpr (apart > 0 && count > 1) {
        constexpr int half = count / 2;
        const bool upper = lane() & apart;
        XSMOE_UNROLL
        for (int i = 0; i < half; ++i) {
            const float kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
            values[i] = kept + __shfl_xor_sync(whole_warp, given, apart);
        }
        spread_sums<half, apart / 2>(values);
    } else if constexpr (apart > 0) {
        values[0] += __shfl_xor_sync(whole_warp, values[0], apart);
        spread_sums<1, apart / 2>(values);
    }
}

}  // namespace xsmoe::side_moe
