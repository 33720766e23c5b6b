// Launches of route_topk's CUDA kernels, by dtype and number of experts.

#include "route_topk/cuda.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "route_topk/cuda_backward.h"
#include "route_topk/cuda_forward.h"

namespace xsmoe::cuda::route_topk {

namespace {

template <class T, class Run>
auto with_layout(int64_t experts, const Run& run) {
    if (experts <= 16) return run(Layout<T, 2, 8>{});
    if (experts <= 32) return run(Layout<T, 4, 8>{});
    if (experts <= 64) return run(Layout<T, 4, 16>{});
    if (experts <= 256) return run(Layout<T, 16, 16>{});
    return run(Layout<T, 32, 32>{});
}

// Call `run` with the layout of rows of this dtype and number of experts.
template <class Run>
auto with_layout(Dtype dtype, int64_t experts, const Run& run) {
    if (experts > max_experts) {
        throw std::invalid_argument(
            "logits has " + std::to_string(experts) + " experts, but the CUDA kernels of route_topk support at most " +
            std::to_string(max_experts)
        );
    }
    return with_dtype(dtype, [&](auto zero) { return with_layout<decltype(zero)>(experts, run); });
}

// The register layout of a kernel that holds no rows in registers.
template <class Row>
using Narrowest = Layout<typename Row::Value, Row::lanes, 8>;

template <class Row>
bool loads_whole(const void* logits, int64_t stride) {
    return rows_allow_loads(static_cast<const typename Row::Value*>(logits), stride);
}

// Return a plan with as many warps as fit in shared memory.
Plan plan_for(int rows_at_once, const Forward& call) {
    for (int warps = max_warps;; --warps) {
        const Plan plan(warps, rows_at_once, static_cast<int>(call.experts), static_cast<int>(call.chosen));
        if (plan.bytes <= max_shared_bytes || warps == 1) return plan;
    }
}

}  // namespace

int64_t forward_blocks(const Forward& call) {
    return with_layout(call.dtype, call.experts, [&](auto layout) -> int64_t {
        using Row = decltype(layout);
        const Plan plan = plan_for(Row::rows, call);
        const int64_t wanted = parts_of(parts_of(call.rows, Row::rows), plan.warps);
        if (wanted <= 1) return 1;  // offsets are written even without rows
        // Each block reads the counts of all blocks, so launch no more blocks than fill a GPU.
        const int64_t limit = max_cooperative_blocks(route_kernel<Row>, plan.warps * warp_size, plan.bytes);
        return std::min({wanted, limit, int64_t{multiprocessors()}});
    });
}

void forward(const Forward& call, int64_t blocks, void* stream) {
    if (parts_of(call.rows, blocks) + max_threads > INT32_MAX) {
        throw std::invalid_argument(
            "logits has " + std::to_string(call.rows) + " rows, too many to count those of a block in 32 bits; route " +
            "fewer at a time"
        );
    }
    with_layout(call.dtype, call.experts, [&](auto layout) {
        using Row = decltype(layout);
        const Plan plan = plan_for(Row::rows, call);
        const Shape shape{blocks, plan.warps * warp_size, plan.bytes, blocks > 1};
        const bool whole = loads_whole<Row>(call.logits, call.logits_stride);
        launch("route_topk", route_kernel<Row>, shape, static_cast<Stream>(stream), call, whole);
    });
}

void backward(const Backward& call, void* stream) {
    with_layout(call.dtype, call.experts, [&](auto layout) {
        using Row = decltype(layout);
        const int64_t bytes = int64_t{4} * gradient_warps * Row::rows * call.experts;
        const Shape shape{parts_of(call.rows, int64_t{gradient_warps} * Row::rows), gradient_warps * warp_size, bytes};
        const auto on = static_cast<Stream>(stream);
        if (call.renormalize) {
            launch("route_topk_backward", chosen_gradient_kernel<Narrowest<Row>>, shape, on, call);
        } else {
            const bool whole = loads_whole<Row>(call.logits, call.logits_stride);
            launch("route_topk_backward", whole_gradient_kernel<Row>, shape, on, call, whole);
        }
    });
}

}  // namespace xsmoe::cuda::route_topk
