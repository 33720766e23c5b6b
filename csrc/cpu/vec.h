// Vectors of float32 as wide as the registers of the instruction set level, and functions on them.
//
// The files that include this one are compiled once for each level, with XSMOE_ISA as the level's namespace. All
// functions have internal linkage, and the standard library's templates are not used. So no function that is compiled
// for one level can be called from another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/types.h"

#ifndef XSMOE_ISA
#error "compile with -DXSMOE_ISA=<namespace of the instruction set level>"
#endif

#define XSMOE_INLINE inline __attribute__((always_inline))

namespace xsmoe::XSMOE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * lanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * lanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * lanes)));

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From>
XSMOE_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

XSMOE_INLINE Vec splat(float value) { return value - Vec{}; }

// Load a vector from an address of any alignment.
template <class Vector>
XSMOE_INLINE Vector load_as(const void* from) {
    Vector value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

XSMOE_INLINE Vec load(const float* from) { return load_as<Vec>(from); }

XSMOE_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

XSMOE_INLINE IntVec load(const int32_t* from) { return load_as<IntVec>(from); }

XSMOE_INLINE void store(int32_t* to, IntVec value) { std::memcpy(to, &value, sizeof(value)); }

XSMOE_INLINE Vec load(const BFloat16* from) {
    return bit_cast<Vec>(__builtin_convertvector(load_as<HalfVec>(from), BitVec) << 16);
}

// Round to nearest, ties to even. NaN stays NaN.
XSMOE_INLINE void store(BFloat16* to, Vec value) {
    const BitVec bits = bit_cast<BitVec>(value);
    const BitVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const BitVec quiet = (bits >> 16) | 0x40;
    const HalfVec half = __builtin_convertvector(value == value ? rounded : quiet, HalfVec);
    std::memcpy(to, &half, sizeof(half));
}

XSMOE_INLINE float to_float(float value) { return value; }

XSMOE_INLINE float to_float(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

XSMOE_INLINE void assign(float& to, float value) { to = value; }

XSMOE_INLINE void assign(BFloat16& to, float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    to.bits = static_cast<uint16_t>(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40);
}

// Store the leading `count` lanes. `count` is below `lanes` at the end of a row only.
template <class T>
XSMOE_INLINE void store(T* to, Vec value, int64_t count) {
    if (count >= lanes) {
        store(to, value);
    } else {
        for (int i = 0; i < count; ++i) assign(to[i], value[i]);
    }
}

// Load `count` numbers. The lanes after them are 0.
template <class T>
XSMOE_INLINE Vec load(const T* from, int64_t count) {
    if (count >= lanes) return load(from);
    Vec value = {};
    for (int i = 0; i < count; ++i) value[i] = to_float(from[i]);
    return value;
}

// Return the leading `count` lanes, and 0 in the others.
XSMOE_INLINE Vec leading(Vec value, int64_t count) {
    for (int64_t i = count; i < lanes; ++i) value[i] = 0.0f;
    return value;
}

// Return the sum of the lanes, by halves: the order is the same in every call.
template <int width>
XSMOE_INLINE float sum_of(const float* part) {
    if constexpr (width == 1) {
        return *part;
    } else {
        typedef float Half __attribute__((vector_size(2 * width)));
        Half low, high;
        std::memcpy(&low, part, sizeof(low));
        std::memcpy(&high, part + width / 2, sizeof(high));
        const Half both = low + high;
        float halves[width / 2];
        std::memcpy(halves, &both, sizeof(both));
        return sum_of<width / 2>(halves);
    }
}

XSMOE_INLINE float sum(Vec value) {
    float part[lanes];
    store(part, value);
    return sum_of<lanes>(part);
}

// Return the dot product of two rows, as the sum of two partial sums.
template <class T>
float dot(const T* a, const T* b, int64_t count) {
    Vec even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * lanes <= count; i += 2 * lanes) {
        even += load(a + i) * load(b + i);
        odd += load(a + i + lanes) * load(b + i + lanes);
    }
    for (; i < count; i += lanes) even += load(a + i, count - i) * load(b + i, count - i);
    return sum(even + odd);
}

XSMOE_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Return 1 / x for x in [1, 2^60], with an error of one or two bits.
XSMOE_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    const Vec guess = bit_cast<Vec>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(x)));
    return guess + guess * (1.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// Return e^x for x <= 0, and 0 below -87 (the limit of normal float32 numbers). NaN stays NaN.
XSMOE_INLINE Vec exp_negative(Vec x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is in the low bits
    const Vec shifted = x * 1.44269504f + shift;
    const Vec n = shifted - shift;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    // e^r within 3e-9 for |r| <= ln 2 / 2, a minimax fit.
    Vec p = r * 1.381453835e-03f + 8.368745542e-03f;
    p = p * r + 4.166839084e-02f;
    p = p * r + 1.666652039e-01f;
    p = p * r + 4.999999343e-01f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Vec scale = bit_cast<Vec>((bit_cast<BitVec>(shifted) - bit_cast<BitVec>(splat(shift)) + 127) << 23);
    return x < -87.0f ? Vec{} : p * scale;
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
