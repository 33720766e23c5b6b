// Shared parts of the kernels that process rows: the level of a block or warp, loads of several columns, sums over
// lanes.
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

// The levels of a launch, as an argument of its kernel. A table in global memory would need a copy before the launch.
template <class Level>
struct Levels {
    Level level[max_levels];

    Levels(const Level* from, int count) : level{} {
        if (count > max_levels) throw std::invalid_argument("a launch supports at most 8 levels");
        std::copy(from, from + count, level);
    }
};

// Units of work, such as blocks, of all levels, one level after the other.
struct Units {
    int64_t first[max_levels + 1];
    int count;

    template <class Level, class UnitsOf>
    Units(const Levels<Level>& levels, int count, UnitsOf units_of) : first{}, count(count) {
        for (int i = 0; i < count; ++i) first[i + 1] = first[i] + units_of(levels.level[i]);
    }

    int64_t all() const { return first[count]; }

    // Return the level of a unit.
    __device__ int level_of(int64_t unit) const {
        int found = 0;
        while (found + 1 < count && unit >= first[found + 1]) ++found;
        return found;
    }
};

// Load `count` numbers of a row from a column on. `whole` says that all of them exist and start at a multiple of 16
// bytes. Otherwise numbers after the row's end are 0. A lane gets the same numbers either way, so alignment does not
// change the results.
template <bool whole, int count, class T>
__device__ inline void load_columns(const T* row, int64_t column, int64_t dim, float (&values)[count]) {
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

// Store `count` numbers of a row from a column on, with the same meaning of `whole`.
template <bool whole, class T, int count>
__device__ inline void store_columns(T* row, int64_t column, int64_t dim, const float (&values)[count]) {
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

// Sum `count` numbers, a power of two, over the lanes of a warp, and leave the sums spread over the lanes: with count =
// 64, lane l gets the sums 2 l and 2 l + 1; with count = 16, lanes l and l + 1 both get the sum l / 2. Each exchange
// halves the remaining numbers, so it needs about `count` exchanges instead of 5 * count. `apart` is the lane distance
// of the first exchange.
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
