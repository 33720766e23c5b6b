// Checked kernel launches.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/runtime.h"

namespace xsmoe::cuda {

// Return how many parts of `part` elements cover `count` elements.
constexpr int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

// The launch configuration: blocks along x, threads per block, and bytes of dynamic shared memory.
struct Shape {
    int64_t blocks;
    int threads;
    int64_t shared_bytes = 0;
    // All blocks run at the same time, and may wait for each other.
    bool cooperative = false;
};

constexpr int64_t max_blocks = 0x7fffffff;

inline void check_shape(const Shape& shape, const char* kernel) {
    if (shape.blocks > max_blocks) {
        throw std::runtime_error(
            std::string(kernel) + " would need " + std::to_string(shape.blocks) + " blocks, more than a grid has; " +
            "call it with fewer rows at a time"
        );
    }
}

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clear the error, or torch would report it at an unrelated call
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// Return the largest number of blocks of a cooperative launch on the current device.
template <class... Parameters>
int64_t max_cooperative_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes) {
    int each = 0;
    check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor"
    );
    return int64_t{each} * multiprocessors();
}

// Launch a kernel on the current device. Zero blocks launch nothing.
template <class... Parameters, class... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), const Shape& shape, Stream stream, Arguments... arguments
) {
    if (shape.blocks == 0) return;
    check_shape(shape, name);
    if (shape.shared_bytes > max_shared_bytes) {
        check(
            cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)
            ),
            name
        );
    }
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = shape.cooperative ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

#else

inline int multiprocessors() { return emulated::multiprocessors(); }

template <class... Parameters>
int64_t max_cooperative_blocks(void (*)(Parameters...), int, int64_t) {
    return multiprocessors();
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, Stream, Arguments... arguments) {
    if (shape.blocks == 0) return;
    check_shape(shape, name);
    const emulated::Grid grid{
        {static_cast<unsigned>(shape.blocks), 1, 1}, shape.threads, shape.shared_bytes, shape.cooperative
    };
    emulated::run(grid, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#endif

}  // namespace xsmoe::cuda
