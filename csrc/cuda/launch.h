// Launches of kernels, each of them checked.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/runtime.h"

namespace xsmoe::cuda {

// The least whole number of `parts` that cover `count`.
constexpr int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

// How a kernel is launched: blocks along x, threads of each, and bytes of dynamic shared memory.
struct Shape {
    int64_t blocks;
    int threads;
    int64_t shared_bytes = 0;
    // All blocks run at once, and may wait for each other.
    bool cooperative = false;
};

constexpr int64_t most_blocks = 0x7fffffff;

inline void check_shape(const Shape& shape, const char* kernel) {
    if (shape.blocks > most_blocks) {
        throw std::runtime_error(
            std::string(kernel) + " would take " + std::to_string(shape.blocks) + " blocks, more than a grid has; " +
            "give it fewer rows at a time"
        );
    }
}

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or torch would find it again, at a place that is not to blame
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// How many blocks of a cooperative launch the current device has room for.
template <class... Parameters>
int64_t most_cooperative_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes) {
    int each = 0;
    check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor"
    );
    return int64_t{each} * multiprocessors();
}

// Starts a kernel on the current device; nothing for no blocks.
template <class... Parameters, class... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), const Shape& shape, Stream stream, Arguments... arguments
) {
    if (shape.blocks == 0) return;
    check_shape(shape, name);
    if (shape.shared_bytes > most_shared_bytes) {
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
int64_t most_cooperative_blocks(void (*)(Parameters...), int, int64_t) {
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
