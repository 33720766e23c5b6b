// Tensors, and scratch memory for CPU threads.
#pragma once

#include "shared/tensors.h"

namespace xsmoe {

// Scratch memory, `bytes` for each chunk.
class ChunkScratch {
public:
    ChunkScratch(const Tensor& like, int64_t chunks, int64_t bytes)
        : bytes_(bytes), memory_(scratch(like, chunks * bytes)) {}

    void* of(int64_t chunk) const { return mutable_data_as<char>(memory_) + chunk * bytes_; }

private:
    int64_t bytes_;
    Tensor memory_;
};

}  // namespace xsmoe
