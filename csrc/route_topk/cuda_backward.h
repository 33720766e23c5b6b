// The kernels of the logits' gradient. A warp computes the gradients of its rows in shared memory, then copies them
// out.
#pragma once

#include "route_topk/cuda.h"
#include "route_topk/cuda_rows.h"

namespace xsmoe::cuda::route_topk {

// Copy a warp's gradients, which are contiguous in shared and in global memory.
template <class T>
__device__ inline void write_out(const float* from, T* to, int count) {
    int first = lane();
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        const int whole = count - count % per_load<T>;
        XSMOE_ROLLED
        for (int i = lane() * per_load<T>; i < whole; i += warp_size * per_load<T>) {
            float values[per_load<T>];
            XSMOE_UNROLL
            for (int v = 0; v < per_load<T>; ++v) values[v] = from[i + v];
            store_16(to + i, values);
        }
        first += whole;
    }
    XSMOE_ROLLED
    for (int i = first; i < count; i += warp_size) to[i] = from_float<T>(from[i]);
}

constexpr int gradient_warps = 8;

// The rows of a warp, and the shared memory of their gradients: (rows, experts), initially zero.
template <class Row>
struct Gradients {
    int experts, rows;
    int64_t first_row, own;
    bool inside;
    float *all, *grads;

    __device__ explicit Gradients(const Backward& call)
        : experts(static_cast<int>(call.experts)),
          first_row((int64_t{blockIdx.x} * gradient_warps + warp()) * Row::rows),
          own(first_row + Row::row()) {
        const int64_t left = call.rows - first_row;
        rows = left < 0 ? 0 : left < Row::rows ? static_cast<int>(left) : Row::rows;
        inside = Row::row() < rows;
        all = reinterpret_cast<float*>(shared_memory()) + warp() * Row::rows * experts;
        grads = all + Row::row() * experts;
        XSMOE_ROLLED
        for (int i = lane(); i < Row::rows * experts; i += warp_size) all[i] = 0;
        __syncwarp();
    }

    __device__ int place(const Backward& call, int j) const {
        return static_cast<int>(call.places[own * call.chosen + j]);
    }

    __device__ float grad(const Backward& call, int j) const {
        const auto* at = static_cast<const typename Row::Value*>(call.grad) + own * call.grad_stride;
        return to_float(at[j * call.grad_step]);
    }

    __device__ const typename Row::Value* logits(const Backward& call) const {
        return static_cast<const typename Row::Value*>(call.logits) + own * call.logits_stride;
    }

    __device__ void write(const Backward& call) const {
        __syncwarp();
        auto* to = static_cast<typename Row::Value*>(call.dlogits) + first_row * experts;
        write_out(all, to, rows * experts);
    }
};

// The gradient of gates that are a softmax over the chosen experts. It reads no other logits.
template <class Row>
__global__ void __launch_bounds__(gradient_warps* warp_size) chosen_gradient_kernel(Backward call) {
    const Gradients<Row> own(call);
    const int begin = Row::lane_of_row(), end = own.inside ? static_cast<int>(call.chosen) : 0;
    const auto* logits = own.logits(call);
    const auto logit = [&](int j) { return to_float(logits[own.place(call, j)]); };
    float most = -INFINITY, total = 0, mean = 0;
    XSMOE_ROLLED
    for (int j = begin; j < end; j += Row::lanes) most = fmaxf(most, logit(j));
    most = max_of_row<Row::lanes>(most);
    XSMOE_ROLLED
    for (int j = begin; j < end; j += Row::lanes) total += expf(logit(j) - most);
    const float share = 1.0f / sum_of_row<Row::lanes>(total);
    XSMOE_ROLLED
    for (int j = begin; j < end; j += Row::lanes) mean += expf(logit(j) - most) * share * own.grad(call, j);
    mean = sum_of_row<Row::lanes>(mean);
    XSMOE_ROLLED
    for (int j = begin; j < end; j += Row::lanes) {
        own.grads[own.place(call, j)] = expf(logit(j) - most) * share * (own.grad(call, j) - mean);
    }
    own.write(call);
}

// The gradient of gates that are a softmax over all experts.
template <class Row>
__global__ void __launch_bounds__(gradient_warps* warp_size) whole_gradient_kernel(Backward call, bool whole) {
    const Gradients<Row> own(call);
    const int begin = Row::lane_of_row(), end = own.inside ? static_cast<int>(call.chosen) : 0;
    const int columns = own.inside ? own.experts : 0;
    Row row;
    row.load(own.logits(call), columns, whole);
    XSMOE_ROLLED
    for (int j = begin; j < end; j += Row::lanes) own.grads[own.place(call, j)] = own.grad(call, j);
    float gates[Row::values], most = -INFINITY, total = 0, mean = 0;
    XSMOE_UNROLL
    for (int v = 0; v < Row::values; ++v) most = Row::column(v) < columns ? fmaxf(most, row[v]) : most;
    most = max_of_row<Row::lanes>(most);
    XSMOE_UNROLL
    for (int v = 0; v < Row::values; ++v) {
        gates[v] = Row::column(v) < columns ? expf(row[v] - most) : 0.0f;
        total += gates[v];
    }
    const float share = 1.0f / sum_of_row<Row::lanes>(total);
    __syncwarp();
    XSMOE_UNROLL
    for (int v = 0; v < Row::values; ++v) {
        gates[v] *= share;
        if (Row::column(v) < columns) mean += gates[v] * own.grads[Row::column(v)];
    }
    mean = sum_of_row<Row::lanes>(mean);
    XSMOE_UNROLL
    for (int v = 0; v < Row::values; ++v) {
        const int column = Row::column(v);
        if (column < columns) own.grads[column] = gates[v] * (own.grads[column] - mean);
    }
    own.write(call);
}

}  // namespace xsmoe::cuda::route_topk
