// torch's current stream.

#include "cuda/device.h"

#ifdef XSMOE_EMULATE_CUDA

namespace xsmoe::cuda {

StreamHandle current_stream(int) { return nullptr; }

}  // namespace xsmoe::cuda

#else

#include <dlfcn.h>

#include <stdexcept>

namespace xsmoe::cuda {

namespace {

using GetStream = int32_t (*)(int32_t, void**);

// Look the function up when it is needed, so that this library also links with a torch without CUDA.
GetStream stream_getter() {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!found) throw std::runtime_error("this torch has no CUDA: libtorch_cuda.so is not loaded");
    return reinterpret_cast<GetStream>(found);
}

}  // namespace

StreamHandle current_stream(int index) {
    static const GetStream get = stream_getter();
    void* stream = nullptr;
    if (get(index, &stream) != 0) throw std::runtime_error("torch has no current stream on this device");
    return stream;
}

}  // namespace xsmoe::cuda

#endif
