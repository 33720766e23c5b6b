// The launches of route_topk's CUDA kernels.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace xsmoe::cuda::route_topk {

// A row of more logits does not fit in the registers of a warp.
constexpr int64_t max_experts = 1024;

struct Forward {
    Dtype dtype;
    int64_t rows, experts, chosen;
    bool renormalize;
    const void* logits;  // contiguous rows
    int64_t logits_stride;
    void* gates;       // (rows, chosen)
    int64_t* places;   // (rows, chosen), the experts chosen
    int64_t* order;    // (rows * chosen,)
    int64_t* offsets;  // (experts + 1,)
    int32_t* counts;   // scratch: (blocks, experts)
};

// Return the number of blocks that `forward` launches on the current device.
int64_t forward_blocks(const Forward& call);
void forward(const Forward& call, int64_t blocks, void* stream);

struct Backward {
    Dtype dtype;
    int64_t rows, experts, chosen;
    bool renormalize;
    const void* grad;
    int64_t grad_stride, grad_step;  // between rows, and between the numbers of a row
    const void* logits;              // contiguous rows
    int64_t logits_stride;
    const int64_t* places;  // (rows, chosen)
    void* dlogits;          // (rows, experts)
};

void backward(const Backward& call, void* stream);

}  // namespace xsmoe::cuda::route_topk
