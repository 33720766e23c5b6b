// rank_of_target on NVIDIA GPUs: unpacks the tensors and allocates the outputs of the kernels.

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/device.h"
#include "rank_of_target/cuda.h"
#include "shared/tensors.h"

namespace xsmoe::rank_of_target {

namespace {

Rows rows(const Tensor& matrix) { return {static_cast<const float*>(data(matrix)), matrix.stride(0)}; }

Tensor forward(
    Tensor queries, Tensor items, Tensor targets, std::optional<Tensor> seen, std::optional<Tensor> seen_offsets
) {
    const cuda::OnDevice on(queries);
    const int64_t num_queries = queries.size(0), num_items = items.size(0);
    const Tensor ranks = empty(targets, {num_queries}, ScalarType::Long);
    if (num_queries == 0) return ranks;
    queries = with_dense_rows(queries);
    items = with_dense_rows(items);
    targets = torch::stable::contiguous(targets);
    Lists lists{};
    if (seen && seen_offsets) {
        seen_offsets = torch::stable::contiguous(*seen_offsets);
        lists = {
            static_cast<const int64_t*>(data(*seen)), seen->size(0), seen->stride(0), data(*seen_offsets),
            seen_offsets->scalar_type() == ScalarType::Long
        };
    }
    const Plan shares = plan(num_queries, num_items);
    const Tensor own = empty(queries, {num_queries}, ScalarType::Float);
    const Tensor points = shares.slices == 1 ? ranks : empty(targets, {shares.slices, num_queries}, ScalarType::Long);
    const Call call{
        num_queries,
        num_items,
        queries.size(1),
        rows(queries),
        rows(items),
        static_cast<const int64_t*>(data(targets)),
        lists,
        shares,
        mutable_data_as<float>(own),
        mutable_data_as<int64_t>(points),
        mutable_data_as<int64_t>(ranks)
    };
    rank(call, on.stream());
    return ranks;
}

}  // namespace
}  // namespace xsmoe::rank_of_target

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_cuda, m) {
    m.def("rank_of_target(Tensor queries, Tensor items, Tensor targets, Tensor? seen, Tensor? seen_offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_cuda, CompositeExplicitAutograd, m) {
    m.impl("rank_of_target", TORCH_BOX(&xsmoe::rank_of_target::forward));
}
