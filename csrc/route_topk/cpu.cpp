// route_topk on the CPU: unpacks the tensors, divides rows among threads, and sorts their choices by expert.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "cpu/isa_kernels.h"
#include "route_topk/kernels.h"

namespace xsmoe::route_topk {

XSMOE_KERNELS_FOR

namespace {

Matrix matrix(const Tensor& tensor) { return {data(tensor), tensor.stride(0), tensor.stride(1)}; }

// Return the work of a row, in floating-point operations: a hundred per nanosecond.
double row_cost(int64_t experts, int64_t chosen) {
    return 100.0 * static_cast<double>(experts) * (1.0 + 0.25 * static_cast<double>(chosen));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, int64_t k, bool renormalize) {
    const Kernels& kernels = kernels_for(logits.scalar_type());
    const int64_t rows = logits.size(0), experts = logits.size(1);
    const Tensor gates = empty(logits, {rows, k}, logits.scalar_type());
    const Tensor places = empty(logits, {rows, k}, ScalarType::Long);
    const Tensor order = empty(logits, {rows * k}, ScalarType::Long);
    const Tensor offsets = empty(logits, {experts + 1}, ScalarType::Long);
    const Forward call{experts, k, renormalize, matrix(logits), mutable_data(gates), mutable_data_as<int64_t>(places)};

    const Chunks chunks(rows, kernels.lanes, row_cost(experts, k));
    const ChunkScratch work(logits, chunks.count, kernels.forward_bytes(call));
    std::vector<int64_t> counts(static_cast<size_t>(chunks.count * experts));
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto [first, last] = chunks[chunk];
        kernels.forward(call, first, last, work.of(chunk), counts.data() + chunk * experts);
    });

    // Each chunk's choices of an expert come after those of the chunks before it.
    auto* bounds = mutable_data_as<int64_t>(offsets);
    int64_t begin = 0;
    for (int64_t e = 0; e < experts; ++e) {
        bounds[e] = begin;
        for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
            int64_t& count = counts[static_cast<size_t>(chunk * experts + e)];
            const int64_t end = begin + count;
            count = begin;
            begin = end;
        }
    }
    bounds[experts] = begin;
    auto* sorted = mutable_data_as<int64_t>(order);
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto [first, last] = chunks[chunk];
        int64_t* next = counts.data() + chunk * experts;
        for (int64_t i = first * k; i < last * k; ++i) sorted[next[call.places[i]]++] = i;
    });
    return {gates, places, order, offsets};
}

Tensor backward(Tensor grad, Tensor logits, Tensor places, bool renormalize) {
    const Kernels& kernels = kernels_for(logits.scalar_type());
    const int64_t rows = logits.size(0), experts = logits.size(1), chosen = places.size(1);
    places = torch::stable::contiguous(places);
    const Tensor dlogits = empty(logits, {rows, experts}, logits.scalar_type());
    const Backward call{
        experts,
        chosen,
        renormalize,
        matrix(grad),
        matrix(logits),
        static_cast<const int64_t*>(data(places)),
        mutable_data(dlogits)
    };
    const Chunks chunks(rows, kernels.lanes, row_cost(experts, chosen));
    const ChunkScratch work(logits, chunks.count, kernels.backward_bytes(call));
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto [first, last] = chunks[chunk];
        kernels.backward(call, first, last, work.of(chunk));
    });
    return dlogits;
}

}  // namespace
}  // namespace xsmoe::route_topk

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_native, m) {
    m.def(
        "route_topk(Tensor logits, SymInt k, bool renormalize) -> "
        "(Tensor gates, Tensor experts, Tensor order, Tensor offsets)"
    );
    m.def("route_topk_backward(Tensor grad, Tensor logits, Tensor experts, bool renormalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CPU, m) {
    m.impl("route_topk", TORCH_BOX(&xsmoe::route_topk::forward));
    m.impl("route_topk_backward", TORCH_BOX(&xsmoe::route_topk::backward));
}
