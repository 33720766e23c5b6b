// CUDA's language on a CPU, for tests on machines without a GPU. A CUDA thread is a fiber; threads switch at barriers.
//
// The emulation is as strict as possible. Shared memory starts as NaN and ends at the size of the launch. Asynchronous
// copies write their target only when the kernel waits for them. The program aborts if some lanes of a warp miss a
// collective, or some threads of a block miss a barrier; the message names where each thread waits. Between barriers,
// threads run in ascending order, or in descending order with XSMOE_EMULATED_ORDER=descending. A device has
// XSMOE_EMULATED_MULTIPROCESSORS multiprocessors (3 by default), each of which holds one block of a cooperative launch.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace xsmoe::cuda {

// There is one stream, and launches are synchronous.
using Stream = void*;

namespace emulated {

struct Grid {
    dim3 blocks;
    int threads;
    int64_t shared_bytes;
    bool cooperative;
};

// The indices of the running thread.
struct Place {
    dim3 thread, block, threads, blocks;
};
extern Place place;

// Run `kernel` once for each thread of each block, and return when all have ended.
void run(const Grid& grid, const std::function<void()>& kernel);

// The exchange behind all collectives: store `value`, wait for all lanes of the warp, and return the values of all
// lanes.
const uint64_t* exchange(const char* collective, unsigned lanes, uint64_t value);

unsigned char* shared_memory();
void wait_for_block();
void wait_for_grid();
// Copy the first `bytes` of `size` bytes, and fill the others with zeros.
void copy_async(void* shared, const void* global, int size, int bytes);
void commit_copies();
void wait_for_copies(int open);
int multiprocessors();

template <class T>
T from(uint64_t bits) {
    static_assert(sizeof(T) <= sizeof bits && std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

inline unsigned lane() { return place.thread.x % 32; }

}  // namespace emulated

inline unsigned char* shared_memory() { return emulated::shared_memory(); }
inline void wait_for_grid() { emulated::wait_for_grid(); }
inline void copy_async(void* shared, const void* global, int bytes) { emulated::copy_async(shared, global, 16, bytes); }
inline void copy_async_4(void* shared, const void* global, bool there) {
    emulated::copy_async(shared, global, 4, there ? 4 : 0);
}
inline void commit_copies() { emulated::commit_copies(); }
template <int open>
void wait_for_copies() {
    emulated::wait_for_copies(open);
}

}  // namespace xsmoe::cuda

#define threadIdx (::xsmoe::cuda::emulated::place.thread)
#define blockIdx (::xsmoe::cuda::emulated::place.block)
#define blockDim (::xsmoe::cuda::emulated::place.threads)
#define gridDim (::xsmoe::cuda::emulated::place.blocks)

inline void __syncthreads() { xsmoe::cuda::emulated::wait_for_block(); }

inline void __syncwarp(unsigned lanes = 0xffffffffu) { xsmoe::cuda::emulated::exchange("__syncwarp", lanes, 0); }

template <class T>
T __shfl_sync(unsigned lanes, T value, int source) {
    namespace emulated = xsmoe::cuda::emulated;
    const uint64_t* all = emulated::exchange("__shfl_sync", lanes, emulated::bits_of(value));
    return emulated::from<T>(all[source & 31]);
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int other) {
    namespace emulated = xsmoe::cuda::emulated;
    const uint64_t* all = emulated::exchange("__shfl_xor_sync", lanes, emulated::bits_of(value));
    return emulated::from<T>(all[(emulated::lane() ^ static_cast<unsigned>(other)) & 31]);
}

template <class T>
T __shfl_up_sync(unsigned lanes, T value, unsigned distance) {
    namespace emulated = xsmoe::cuda::emulated;
    const uint64_t* all = emulated::exchange("__shfl_up_sync", lanes, emulated::bits_of(value));
    return emulated::lane() < distance ? value : emulated::from<T>(all[emulated::lane() - distance]);
}

template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned distance) {
    namespace emulated = xsmoe::cuda::emulated;
    const uint64_t* all = emulated::exchange("__shfl_down_sync", lanes, emulated::bits_of(value));
    return emulated::lane() + distance > 31 ? value : emulated::from<T>(all[emulated::lane() + distance]);
}

inline unsigned __ballot_sync(unsigned lanes, int predicate) {
    const uint64_t* all = xsmoe::cuda::emulated::exchange("__ballot_sync", lanes, predicate != 0);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(all[lane]) << lane;
    return votes;
}

inline int __any_sync(unsigned lanes, int predicate) { return __ballot_sync(lanes, predicate) != 0; }

inline int __all_sync(unsigned lanes, int predicate) { return __ballot_sync(lanes, predicate) == 0xffffffffu; }

template <class T>
unsigned __match_any_sync(unsigned lanes, T value) {
    namespace emulated = xsmoe::cuda::emulated;
    const uint64_t own = emulated::bits_of(value);
    const uint64_t* all = emulated::exchange("__match_any_sync", lanes, own);
    unsigned equal = 0;
    for (unsigned lane = 0; lane < 32; ++lane) equal |= static_cast<unsigned>(all[lane] == own) << lane;
    return equal;
}

inline unsigned __reduce_max_sync(unsigned lanes, unsigned value) {
    const uint64_t* all = xsmoe::cuda::emulated::exchange("__reduce_max_sync", lanes, value);
    return static_cast<unsigned>(*std::max_element(all, all + 32));
}

inline unsigned __reduce_min_sync(unsigned lanes, unsigned value) {
    const uint64_t* all = xsmoe::cuda::emulated::exchange("__reduce_min_sync", lanes, value);
    return static_cast<unsigned>(*std::min_element(all, all + 32));
}

inline unsigned __reduce_add_sync(unsigned lanes, unsigned value) {
    const uint64_t* all = xsmoe::cuda::emulated::exchange("__reduce_add_sync", lanes, value);
    unsigned sum = 0;
    for (unsigned lane = 0; lane < 32; ++lane) sum += static_cast<unsigned>(all[lane]);
    return sum;
}

inline int atomicAdd(int* place, int value) {
    const int before = *place;
    *place += value;
    return before;
}

inline unsigned atomicOr(unsigned* place, unsigned bits) {
    const unsigned before = *place;
    *place |= bits;
    return before;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits == 0 ? 0 : 1 + std::countr_zero(bits); }
inline int __clz(unsigned bits) { return std::countl_zero(bits); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
