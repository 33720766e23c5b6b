// Number types of tensors in CUDA kernels: conversions, and loads and stores of 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/runtime.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace xsmoe::cuda {

// A bfloat16 number: the upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

// Call `run` with a zero of the C++ type of a dtype.
template <class Run>
auto with_dtype(Dtype dtype, const Run& run) {
    switch (dtype) {
        case Dtype::bfloat16:
            return run(BFloat16{});
        case Dtype::float16:
            return run(Half{});
        default:
            return run(float{});
    }
}

__host__ __device__ inline float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__) || !defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    float value;
    static_assert(sizeof value == sizeof bits);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

__host__ __device__ inline uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__) || !defined(__CUDACC__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof value);
    return bits;
#endif
}

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

__device__ inline float to_float(Half value) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(value.bits));
#else
    return static_cast<float>(std::bit_cast<_Float16>(value.bits));
#endif
}

// Round to nearest, ties to even.
template <class T>
__device__ inline T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
    return value;
}

template <>
__device__ inline BFloat16 from_float<BFloat16>(float value) {
    const uint32_t bits = float_to_bits(value);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
__device__ inline Half from_float<Half>(float value) {
#ifdef __CUDACC__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))};
#endif
}

// The count of numbers in 16 bytes.
template <class T>
constexpr int per_load = 16 / static_cast<int>(sizeof(T));

// Return whether rows that begin at `data` and are `stride` numbers apart can be read 16 bytes at a time.
template <class T>
bool rows_allow_loads(const T* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % per_load<T> == 0;
}

// Load 16 bytes of numbers, from an address that is a multiple of 16.
template <class T>
__device__ inline void load_16(const T* from, float (&values)[per_load<T>]) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
    if constexpr (sizeof(T) == 4) {
        for (int i = 0; i < 4; ++i) values[i] = bits_to_float(all[i]);
    } else {
        for (int i = 0; i < 8; ++i) values[i] = to_float(T{static_cast<uint16_t>(all[i / 2] >> (16 * (i % 2)))});
    }
}

// Store 16 bytes of numbers, at an address that is a multiple of 16.
template <class T>
__device__ inline void store_16(T* to, const float (&values)[per_load<T>]) {
    uint32_t all[4];
    if constexpr (sizeof(T) == 4) {
        for (int i = 0; i < 4; ++i) all[i] = float_to_bits(values[i]);
    } else {
        for (int i = 0; i < 4; ++i) {
            all[i] = from_float<T>(values[2 * i]).bits | static_cast<uint32_t>(from_float<T>(values[2 * i + 1]).bits)
                                                             << 16;
        }
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(all[0], all[1], all[2], all[3]);
}

}  // namespace xsmoe::cuda
