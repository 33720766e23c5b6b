// Devices and streams: CUDA's runtime is asked for the former, torch for the latter.

#include "cuda/device.h"

#ifdef XSMOE_EMULATE_CUDA

namespace xsmoe::cuda {

int enter_device(int) { return -1; }

void leave_device(int, int) {}

StreamHandle current_stream(int) { return nullptr; }

}  // namespace xsmoe::cuda

#else

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace xsmoe::cuda {

namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

using GetStream = int32_t (*)(int32_t, void**);

// Looked up when it is needed, so that this library also links beside a torch without CUDA.
GetStream stream_getter() {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!found) throw std::runtime_error("this torch has no CUDA: libtorch_cuda.so is not loaded");
    return reinterpret_cast<GetStream>(found);
}

}  // namespace

int enter_device(int index) {
    int before = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (before != index) check(cudaSetDevice(index), "cudaSetDevice");
    return before;
}

void leave_device(int index, int before) {
    if (before != index) cudaSetDevice(before);
}

StreamHandle current_stream(int index) {
    static const GetStream get = stream_getter();
    void* stream = nullptr;
    if (get(index, &stream) != 0) throw std::runtime_error("torch has no current stream on this device");
    return stream;
}

}  // namespace xsmoe::cuda

#endif
