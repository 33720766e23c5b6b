// in_batch_softmax_loss on the CPU: takes tensors apart, and shares queries out among threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "cpu/tiers.h"
#include "in_batch_softmax_loss/kernels.h"

namespace xsmoe::in_batch_softmax_loss {

XSMOE_KERNELS_FOR

namespace {

// The arguments that forward and backward share, as the kernels take them.
class Input {
public:
    Input(
        const Tensor& queries, const Tensor& items, const Tensor& targets, const Tensor& rejected,
        const std::optional<Tensor>& users, const std::optional<Tensor>& logq, const std::optional<Tensor>& counts,
        bool need_queries
    )
        : kernels(kernels_for(queries.scalar_type())),
          num_queries(queries.size(0)),
          queries_(with_dense_rows(queries)),
          items_(with_dense_rows(items)),
          targets_(torch::stable::contiguous(targets)),
          rejected_(torch::stable::contiguous(rejected)) {
        batch = {};
        batch.num_items = items.size(0);
        batch.dim = items.size(1);
        batch.width = rejected.size(1);
        batch.queries = data(queries_);
        // Rows without numbers may lie nowhere, and nowhere has no neighbours.
        batch.query_stride = batch.dim == 0 ? 0 : queries_.stride(0);
        batch.items = data(items_);
        batch.item_stride = batch.dim == 0 ? 0 : items_.stride(0);
        batch.targets = static_cast<const int64_t*>(data(targets_));
        batch.rejected = static_cast<const int64_t*>(data(rejected_));
        if (users) batch.users = static_cast<const int64_t*>(data(held(torch::stable::contiguous(*users))));
        correct(logq, counts);
        pack(need_queries);
    }

    const Kernels& kernels;
    int64_t num_queries;
    Batch batch;

    // The losses' and gradients' part of a call. Returns the items' gradients.
    Tensor run(const Results& results) {
        const int64_t items = batch.num_items, dim = batch.dim;
        const Tensor grad_items = results.need_items ? empty(items_, {items, dim}, items_.scalar_type())
                                                     : empty(items_, {0}, items_.scalar_type());
        const double products = 2.0 + (results.need_queries ? 2.0 : 0.0) + (results.need_items ? 2.0 : 0.0);
        const double cost = static_cast<double>(items) * (products * static_cast<double>(dim) + 20.0);
        const Chunks chunks(num_queries, kernels.block_rows, cost);
        const int64_t part = results.need_items ? items * kernels.sum_stride(dim) : 0;
        const Tensor sums = empty(items_, {chunks.count * part}, ScalarType::Float);
        const ChunkScratch work(items_, chunks.count, kernels.bytes(batch, results));
        for_each_chunk(chunks.count, [&](int64_t chunk) {
            const auto [first, last] = chunks[chunk];
            kernels.run(batch, results, first, last, work.of(chunk), mutable_data_as<float>(sums) + chunk * part);
        });
        if (!results.need_items) return grad_items;
        const Chunks shares(items, 1, 4.0 * static_cast<double>(chunks.count * dim));
        for_each_chunk(shares.count, [&](int64_t chunk) {
            const auto [first, last] = shares[chunk];
            kernels.add(
                batch, static_cast<const float*>(data(sums)), chunks.count, first, last, mutable_data(grad_items)
            );
        });
        return grad_items;
    }

private:
    const Tensor& held(Tensor tensor) { return held_.emplace_back(std::move(tensor)); }

    const float* floats(const Tensor& tensor) {
        return static_cast<const float*>(
            data(held(torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float))))
        );
    }

    // What counts and logq add to the logits of negatives.
    void correct(const std::optional<Tensor>& logq, const std::optional<Tensor>& counts) {
        const int64_t items = batch.num_items, padded = strips_of(items) * strip;
        batch.logq = logq ? floats(*logq) : nullptr;
        const float* times = counts ? floats(*counts) : nullptr;
        const bool never = times != nullptr && std::find(times, times + items, 0.0f) != times + items;
        float* bias = mutable_data_as<float>(held(empty(items_, {padded}, ScalarType::Float)));
        // Not left to a bias of -inf alone: an item that is never a negative may have any logit, +inf and NaN too.
        auto* drawn = never ? mutable_data_as<uint32_t>(held(empty(items_, {padded}, ScalarType::Int))) : nullptr;
        for (int64_t i = 0; i < padded; ++i) {
            const bool negative = i < items && (times == nullptr || times[i] != 0);
            bias[i] = negative ? 0 : -INFINITY;
            if (negative && times != nullptr && times[i] != 1) bias[i] = std::log(times[i]);
            if (negative && batch.logq != nullptr) bias[i] -= batch.logq[i];
            if (drawn != nullptr) drawn[i] = negative ? ~uint32_t{0} : 0;
        }
        batch.bias = bias;
        batch.drawn = drawn;
    }

    void pack(bool need_rows) {
        batch.columns = mutable_data(held(scratch(items_, kernels.columns_bytes(batch))));
        if (need_rows) batch.rows = mutable_data(held(scratch(items_, kernels.rows_bytes(batch))));
        const Chunks chunks(strips_of(batch.num_items), 1, 10.0 * static_cast<double>(strip * batch.dim));
        for_each_chunk(chunks.count, [&](int64_t chunk) {
            const auto [first, last] = chunks[chunk];
            for (int64_t index = first; index < last; ++index) kernels.pack(batch, index);
        });
    }

    Tensor queries_, items_, targets_, rejected_;
    std::vector<Tensor> held_;
};

Tensor gradient_of(const Tensor& queries, bool need) {
    if (!need) return empty(queries, {0}, queries.scalar_type());
    return empty(queries, {queries.size(0), queries.size(1)}, queries.scalar_type());
}

Tensor zeros(const Tensor& like, bool need) {
    Tensor result = gradient_of(like, need);
    torch::stable::zero_(result);
    return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor queries, Tensor items, Tensor targets, Tensor rejected, std::optional<Tensor> users,
    std::optional<Tensor> logq, std::optional<Tensor> counts, bool need_queries, bool need_items
) {
    const int64_t num_queries = queries.size(0);
    const Tensor loss = empty(queries, {}, ScalarType::Float), lse = empty(queries, {num_queries}, ScalarType::Float);
    const Tensor grad_queries = gradient_of(queries, need_queries);
    if (num_queries == 0) {
        *mutable_data_as<float>(loss) = 0;
        return {loss, lse, grad_queries, zeros(items, need_items)};
    }
    Input input(queries, items, targets, rejected, users, logq, counts, need_queries);
    const Tensor losses = empty(queries, {num_queries}, ScalarType::Float);
    const Results results = {
        .lse_known = false,
        .lse = mutable_data_as<float>(lse),
        .losses = mutable_data_as<float>(losses),
        .need_queries = need_queries,
        .need_items = need_items,
        .scale = 1.0f / static_cast<float>(num_queries),
        .queries = mutable_data(grad_queries),
    };
    const Tensor grad_items = input.run(results);
    double total = 0;
    for (int64_t row = 0; row < num_queries; ++row) total += static_cast<double>(results.losses[row]);
    *mutable_data_as<float>(loss) = static_cast<float>(total / static_cast<double>(num_queries));
    return {loss, lse, grad_queries, grad_items};
}

// What forward got ahead, times the loss's gradient.
Tensor scaled(const Tensor& gradient, float factor) {
    const Tensor from = torch::stable::contiguous(gradient), result = torch::stable::empty_like(from);
    const Kernels& kernels = kernels_for(gradient.scalar_type());
    const Chunks chunks(gradient.numel(), 4096, 10.0);
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto [first, last] = chunks[chunk];
        kernels.scale(data(from), factor, first, last, mutable_data(result));
    });
    return result;
}

std::tuple<Tensor, Tensor> backward(
    Tensor queries, Tensor items, Tensor targets, Tensor rejected, std::optional<Tensor> users,
    std::optional<Tensor> logq, std::optional<Tensor> counts, Tensor lse, std::optional<Tensor> ahead_queries,
    std::optional<Tensor> ahead_items, Tensor grad, bool need_queries, bool need_items
) {
    const int64_t num_queries = queries.size(0);
    const float factor = *static_cast<const float*>(data(grad));
    if (ahead_queries && ahead_items) return {scaled(*ahead_queries, factor), scaled(*ahead_items, factor)};
    const Tensor grad_queries = gradient_of(queries, need_queries);
    if (num_queries == 0 || (!need_queries && !need_items)) return {grad_queries, zeros(items, need_items)};
    Input input(queries, items, targets, rejected, users, logq, counts, need_queries);
    lse = torch::stable::contiguous(lse);
    const Results results = {
        .lse_known = true,
        .lse = mutable_data_as<float>(lse),
        .losses = nullptr,
        .need_queries = need_queries,
        .need_items = need_items,
        .scale = factor / static_cast<float>(num_queries),
        .queries = mutable_data(grad_queries),
    };
    return {grad_queries, input.run(results)};
}

}  // namespace
}  // namespace xsmoe::in_batch_softmax_loss

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_native, m) {
    m.def(
        "in_batch_softmax_loss(Tensor queries, Tensor items, Tensor targets, Tensor rejected, Tensor? users, "
        "Tensor? logq, Tensor? counts, bool need_queries, bool need_items) -> (Tensor, Tensor, Tensor, Tensor)"
    );
    m.def(
        "in_batch_softmax_loss_backward(Tensor queries, Tensor items, Tensor targets, Tensor rejected, Tensor? users, "
        "Tensor? logq, Tensor? counts, Tensor lse, Tensor? ahead_queries, Tensor? ahead_items, Tensor grad, "
        "bool need_queries, bool need_items) -> (Tensor, Tensor)"
    );
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CPU, m) {
    m.impl("in_batch_softmax_loss", TORCH_BOX(&xsmoe::in_batch_softmax_loss::forward));
    m.impl("in_batch_softmax_loss_backward", TORCH_BOX(&xsmoe::in_batch_softmax_loss::backward));
}
