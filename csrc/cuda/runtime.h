// The language of the CUDA kernels: CUDA itself, or its emulation on a CPU.
//
// A kernel in csrc/<operator>/cuda.cu uses only what both support: blocks of whole warps along x, dynamic shared memory
// from shared_memory(), collectives of whole warps, and the helpers below.
#pragma once

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

// Unroll the next loop, so that an array that it indexes stays in registers.
#define XSMOE_UNROLL _Pragma("unroll")
// Do not unroll the next loop: unrolling would need registers and gain nothing.
#define XSMOE_ROLLED _Pragma("unroll 1")

#else

#include "cuda/emulated.h"

#define XSMOE_UNROLL
#define XSMOE_ROLLED

#endif

namespace xsmoe::cuda {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

// A block may use up to 48 KB of shared memory without an opt-in.
constexpr int max_shared_bytes = 48 * 1024;

#ifdef __CUDACC__

using Stream = cudaStream_t;

// Return the block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char xsmoe_shared_memory[];
    return xsmoe_shared_memory;
}

// Wait for all threads of a cooperative launch, and make their writes visible.
__device__ inline void wait_for_grid() { cooperative_groups::this_grid().sync(); }

// cp.async: start a copy of 16 bytes from global to shared memory. The last 16 - `bytes` of them become zeros.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}

// cp.async: start a copy of 4 bytes from an address that is a multiple of 4. If not `there`, the bytes become zeros.
__device__ inline void copy_async_4(void* shared, const void* global, bool there) {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}

// cp.async.commit_group: make one group of the copies since the last commit.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// cp.async.wait_group: wait until at most `open` groups of this thread are pending. Other threads see the data after a
// barrier.
template <int open>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(open) : "memory");
}

#endif

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % warp_size; }

__device__ inline int warp() { return static_cast<int>(threadIdx.x) / warp_size; }

}  // namespace xsmoe::cuda
