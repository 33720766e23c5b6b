// route_topk on a GPU: unpacks the tensors and launches the kernels.

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/device.h"
#include "cuda/tensors.h"
#include "route_topk/cuda.h"
#include "shared/tensors.h"

namespace xsmoe::cuda::route_topk {

namespace {

using torch::headeronly::toString;

std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor logits, int64_t k, bool renormalize) {
    const OnDevice device(logits);
    logits = with_dense_rows(logits);
    const int64_t rows = logits.size(0), experts = logits.size(1);
    const Tensor gates = empty(logits, {rows, k}, logits.scalar_type());
    const Tensor places = empty(logits, {rows, k}, ScalarType::Long);
    const Tensor order = empty(logits, {rows * k}, ScalarType::Long);
    const Tensor offsets = empty(logits, {experts + 1}, ScalarType::Long);
    Forward call{
        .dtype = dtype_of(logits, "logits"),
        .rows = rows,
        .experts = experts,
        .chosen = k,
        .renormalize = renormalize,
        .logits = data(logits),
        .logits_stride = logits.stride(0),
        .gates = mutable_data(gates),
        .places = mutable_data_as<int64_t>(places),
        .order = mutable_data_as<int64_t>(order),
        .offsets = mutable_data_as<int64_t>(offsets),
        .counts = nullptr,
    };
    const int64_t blocks = forward_blocks(call);
    const Tensor counts = empty(logits, {blocks, experts}, ScalarType::Int);
    call.counts = mutable_data_as<int32_t>(counts);
    forward(call, blocks, device.stream());
    return {gates, places, order, offsets};
}

Tensor gradient(Tensor grad, Tensor logits, Tensor places, bool renormalize) {
    const OnDevice device(logits);
    if (grad.scalar_type() != logits.scalar_type()) {
        throw std::invalid_argument(
            std::string("grad must have the dtype of logits, ") + toString(logits.scalar_type()) + ", not " +
            toString(grad.scalar_type()) + "; convert it"
        );
    }
    logits = with_dense_rows(logits);
    places = torch::stable::contiguous(places);
    const int64_t rows = logits.size(0), experts = logits.size(1);
    const Tensor dlogits = empty(logits, {rows, experts}, logits.scalar_type());
    const Backward call{
        .dtype = dtype_of(logits, "logits"),
        .rows = rows,
        .experts = experts,
        .chosen = places.size(1),
        .renormalize = renormalize,
        .grad = data(grad),
        .grad_stride = grad.stride(0),
        .grad_step = grad.stride(1),
        .logits = data(logits),
        .logits_stride = logits.stride(0),
        .places = static_cast<const int64_t*>(data(places)),
        .dlogits = mutable_data(dlogits),
    };
    backward(call, device.stream());
    return dlogits;
}

}  // namespace
}  // namespace xsmoe::cuda::route_topk

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_cuda, m) {
    m.def(
        "route_topk(Tensor logits, SymInt k, bool renormalize) -> "
        "(Tensor gates, Tensor experts, Tensor order, Tensor offsets)"
    );
    m.def("route_topk_backward(Tensor grad, Tensor logits, Tensor experts, bool renormalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_cuda, CompositeExplicitAutograd, m) {
    m.impl("route_topk", TORCH_BOX(&xsmoe::cuda::route_topk::route));
    m.impl("route_topk_backward", TORCH_BOX(&xsmoe::cuda::route_topk::gradient));
}
