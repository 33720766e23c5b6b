// What kernels for GPUs are written in: CUDA's own language, or its emulation on a CPU.
//
// A kernel of csrc/<operator>/cuda.cu keeps to what both have: blocks of whole warps along x, dynamic shared memory
// from shared_memory(), collectives of whole warps, and the helpers below.
#pragma once

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

// Has the next loop unrolled, so that an array which it indexes stays in registers.
#define XSMOE_UNROLL _Pragma("unroll")
// Has it left as it is, where several turns at once would take registers and gain nothing.
#define XSMOE_ROLLED _Pragma("unroll 1")

#else

#include "cuda/emulated.h"

#define XSMOE_UNROLL
#define XSMOE_ROLLED

#endif

namespace xsmoe::cuda {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

// The rest of a block's 48 KB need no permission of the device.
constexpr int most_shared_bytes = 48 * 1024;

#ifdef __CUDACC__

using Stream = cudaStream_t;

// The block's dynamic shared memory, from a 16-byte boundary on.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char xsmoe_shared_memory[];
    return xsmoe_shared_memory;
}

// Waits for all threads of a cooperative launch, and has them see what each wrote.
__device__ inline void wait_for_grid() { cooperative_groups::this_grid().sync(); }

// Begins to copy 16 bytes from global to shared memory, of which the last 16 - `bytes` become zeros.
__device__ inline void begin_copy(void* shared, const void* global, int bytes) {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}

// The same for 4 bytes, which need not lie on a 16-byte boundary; zeros unless they are `there`.
__device__ inline void begin_copy_4(void* shared, const void* global, bool there) {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}

// Makes one group of the copies begun since the last.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for this thread's groups of copies, all but the `open` latest; other threads see them after a barrier.
template <int open>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(open) : "memory");
}

#endif

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % warp_size; }

__device__ inline int warp() { return static_cast<int>(threadIdx.x) / warp_size; }

}  // namespace xsmoe::cuda
