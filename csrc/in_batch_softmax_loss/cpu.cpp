// in_batch_softmax_loss on the CPU: unpacks the tensors, and divides items among threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "cpu/isa_kernels.h"
#include "in_batch_softmax_loss/kernels.h"

namespace xsmoe::in_batch_softmax_loss {

XSMOE_KERNELS_FOR

namespace {

// The floats of logits that a part keeps for a tile: they fit in a second-level cache together with the part's items
// and their gradients. The larger limit holds if the tile would otherwise have too few queries for each read of the
// items.
constexpr int64_t max_logits = 130'000, max_logits_of_few = int64_t{1} << 18;
constexpr int64_t max_queries = 256, few_queries = 96, min_queries = 32;
// The floats of logits that all parts keep for a tile, or a quarter of the floats of the returned gradients, if that is
// more.
constexpr int64_t max_kept = int64_t{1} << 19;
// The queries of a tile that keeps no logits.
constexpr int64_t plain_tile = 112;
// The floats of all parts' contributions to the queries' gradients, 64 MB. Further queries are processed after them.
constexpr int64_t max_partial = int64_t{1} << 24;
// Tiles are multiples of the widest vectors.
constexpr int64_t multiple = 16;

// Return the height of tiles of equal height, at most `most` and a multiple of `multiple`.
int64_t equal_tiles(int64_t queries, int64_t most) {
    const int64_t tiles = (queries + most - 1) / most;
    return (queries + tiles * multiple - 1) / (tiles * multiple) * multiple;
}

Plan plan_of(const Batch& batch, const Results& results, int64_t parts, int64_t widest) {
    const int64_t kept = std::max(max_kept, (batch.num_queries + batch.num_items) * batch.dim / 4);
    // A tile's contributions to the queries' gradients are stored for two tiles at a time.
    const int64_t of_query = batch.num_items + (results.need_queries ? 2 * parts * batch.dim : 0);
    const int64_t affordable = std::min(
        kept / of_query,
        std::max(std::min(max_logits / widest, max_queries), std::min(max_logits_of_few / widest, few_queries))
    );
    const bool keeps = !results.lse_known && (results.need_queries || results.need_items) && affordable >= min_queries;
    const int64_t tile = equal_tiles(batch.num_queries, keeps ? affordable / multiple * multiple : plain_tile);
    const int64_t tiles = std::max<int64_t>(1, max_partial / (parts * (batch.dim + 1) * tile));
    return {
        .keeps = keeps,
        .tile = tile,
        // Rows of logits whose distance is a power of two would map to the same cache sets.
        .stride = tile % 64 == 0 ? tile + multiple : tile,
        .block = keeps ? tile : std::min(batch.num_queries, tiles * tile),
        .parts = parts,
        .widest = widest,
    };
}

// The arguments that forward and backward share, in the form that the kernels need.
class Input {
public:
    Input(
        const Tensor& queries, const Tensor& items, const Tensor& targets, const Tensor& rejected,
        const std::optional<Tensor>& users, const std::optional<Tensor>& logq, const std::optional<Tensor>& counts
    )
        : kernels_(kernels_for(queries.scalar_type())),
          queries_(with_dense_rows(queries)),
          items_(with_dense_rows(items)),
          targets_(torch::stable::contiguous(targets)),
          rejected_(torch::stable::contiguous(rejected)) {
        batch_ = {};
        batch_.num_queries = queries.size(0);
        batch_.num_items = items.size(0);
        batch_.dim = items.size(1);
        batch_.width = rejected.size(1);
        batch_.queries = data(queries_);
        // Rows without numbers may have any stride.
        batch_.query_stride = batch_.dim == 0 ? 0 : queries_.stride(0);
        batch_.items = data(items_);
        batch_.item_stride = batch_.dim == 0 ? 0 : items_.stride(0);
        batch_.targets = static_cast<const int64_t*>(data(targets_));
        batch_.rejected = static_cast<const int64_t*>(data(rejected_));
        if (users) batch_.users = static_cast<const int64_t*>(data(held(torch::stable::contiguous(*users))));
        compute_bias(logq, counts);
    }

    // Compute losses and gradients. Return the items' gradients.
    Tensor run(Results results) {
        const int64_t items = batch_.num_items, dim = batch_.dim;
        const Tensor grad_items = results.need_items ? empty(items_, {items, dim}, items_.scalar_type())
                                                     : empty(items_, {0}, items_.scalar_type());
        const double products = 2.0 + (results.need_queries ? 2.0 : 0.0) + (results.need_items ? 2.0 : 0.0);
        const double at_once = static_cast<double>(std::min(batch_.num_queries, max_queries));
        // Each part computes a gradient for all queries. If a part had fewer items than a query has numbers, this would
        // cost more than the part saves.
        const int64_t worth = results.need_queries ? std::max<int64_t>(2, items / std::max<int64_t>(1, dim)) : items;
        const Chunks parts(
            items, kernels_.granularity, at_once * (products * static_cast<double>(dim) + 20.0),
            std::min<int64_t>(torch::stable::get_num_threads(), worth)
        );
        int64_t widest = 0;
        for (int64_t part = 0; part < parts.count; ++part) {
            widest = std::max(widest, parts[part].last - parts[part].first);
        }
        Call call = {};
        call.plan = plan_of(batch_, results, parts.count, widest);
        results.items = mutable_data(grad_items);
        const bool at_one_go = !call.plan.keeps && call.plan.block >= batch_.num_queries;
        const bool elsewhere = results.need_items && !at_one_go && !kernels_.sums_in_place(dim);
        results.sum_stride = kernels_.sum_stride(dim);
        const Tensor sums = empty(items_, {elsewhere ? items * results.sum_stride : 0}, ScalarType::Float);
        if (results.need_items && kernels_.sums_in_place(dim)) {
            results.item_sums = static_cast<float*>(results.items);
        } else if (elsewhere) {
            results.item_sums = mutable_data_as<float>(sums);
        }
        if (results.need_queries) pack(parts, call.plan.keeps);
        call.batch = batch_;
        call.results = results;
        const Tensor statistics = empty(items_, {kernels_.statistics_floats(call)}, ScalarType::Float);
        const Tensor partial = empty(items_, {kernels_.partial_floats(call)}, ScalarType::Float);
        call.statistics = mutable_data_as<float>(statistics);
        call.partial = mutable_data_as<float>(partial);
        const ChunkScratch scratch(items_, parts.count, kernels_.scratch_bytes(call));
        const auto for_each_part = [&](const auto& body) {
            for_each_chunk(parts.count, [&](int64_t index) {
                body(Part{index, {parts[index].first, parts[index].last}, scratch.of(index)});
            });
        };
        if (call.plan.keeps) {
            run_with_kept_logits(call, for_each_part);
        } else {
            run_with_recomputed_logits(call, for_each_part);
        }
        if (elsewhere) for_each_part([&](const Part& part) { kernels_.store_sums(call, part.items); });
        return grad_items;
    }

private:
    template <class ForEachPart>
    void run_with_kept_logits(const Call& call, const ForEachPart& for_each_part) {
        const int64_t tiles = (batch_.num_queries + call.plan.tile - 1) / call.plan.tile;
        const int64_t steps = tiles + (call.results.need_queries ? 2 : 1);
        for (int64_t index = 0; index < steps; ++index) {
            for_each_part([&](const Part& part) { kernels_.step(call, part, index); });
        }
    }

    template <class ForEachPart>
    void run_with_recomputed_logits(const Call& call, const ForEachPart& for_each_part) {
        const Results& results = call.results;
        const int64_t queries = batch_.num_queries;
        if (!results.lse_known) {
            for_each_part([&](const Part& part) { kernels_.summarize(call, part); });
            const Chunks shares(queries, 64, 100.0 * static_cast<double>(call.plan.parts));
            for_each_chunk(shares.count, [&](int64_t chunk) {
                const auto [first, last] = shares[chunk];
                kernels_.combine(call, {first, last});
            });
        }
        if (!results.need_queries && !results.need_items) return;
        for (int64_t first = 0; first < queries; first += call.plan.block) {
            const Span block = {first, std::min(first + call.plan.block, queries)};
            for_each_part([&](const Part& part) { kernels_.differentiate(call, part, block); });
            if (!results.need_queries) continue;
            const Chunks shares(block.size(), 1, static_cast<double>(call.plan.parts * batch_.dim));
            for_each_chunk(shares.count, [&](int64_t chunk) {
                const auto [from, to] = shares[chunk];
                kernels_.write_gradients(call, block, {from, to});
            });
        }
    }

    const Tensor& held(Tensor tensor) { return held_.emplace_back(std::move(tensor)); }

    const float* floats(const Tensor& tensor) {
        return static_cast<const float*>(
            data(held(torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float))))
        );
    }

    // Compute what counts and logq add to the logits of negatives.
    void compute_bias(const std::optional<Tensor>& logq, const std::optional<Tensor>& counts) {
        const int64_t items = batch_.num_items;
        batch_.logq = logq ? floats(*logq) : nullptr;
        const float* times = counts ? floats(*counts) : nullptr;
        const bool never = times != nullptr && std::find(times, times + items, 0.0f) != times + items;
        float* bias = mutable_data_as<float>(held(empty(items_, {items}, ScalarType::Float)));
        // A bias of -inf would not be enough: an item that is never a negative may have any logit, even +inf or NaN.
        bool* drawn = never ? mutable_data_as<bool>(held(empty(items_, {items}, ScalarType::Bool))) : nullptr;
        for (int64_t i = 0; i < items; ++i) {
            const bool negative = times == nullptr || times[i] != 0;
            bias[i] = negative && times != nullptr && times[i] != 1 ? std::log(times[i]) : 0;
            if (negative && batch_.logq != nullptr) bias[i] -= batch_.logq[i];
            if (drawn != nullptr) drawn[i] = negative;
        }
        batch_.bias = bias;
        batch_.drawn = drawn;
    }

    // Pack the items if they cannot be read in place and each of them is needed more than once.
    void pack(const Chunks& parts, bool keeps) {
        std::vector<char> usable(static_cast<size_t>(parts.count));
        const auto part_of = [&](int64_t index) { return Span{parts[index].first, parts[index].last}; };
        for_each_chunk(parts.count, [&](int64_t index) {
            usable[static_cast<size_t>(index)] = kernels_.usable_in_place(batch_, part_of(index));
        });
        batch_.pack_items = std::find(usable.begin(), usable.end(), 0) != usable.end();
        if (!batch_.pack_items || !keeps) return;
        batch_.packed = mutable_data(held(scratch(items_, kernels_.packed_bytes(batch_))));
        for_each_chunk(parts.count, [&](int64_t index) { kernels_.pack(batch_, part_of(index)); });
    }

    const Kernels& kernels_;
    Batch batch_;
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
    Input input(queries, items, targets, rejected, users, logq, counts);
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

// Multiply a gradient that forward already computed by the loss's gradient.
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
    const Tensor grad_queries = gradient_of(queries, need_queries);
    // The gradients are zero, whatever the loss's gradient is.
    if (num_queries == 0) return {grad_queries, zeros(items, need_items)};
    if (ahead_queries && ahead_items) return {scaled(*ahead_queries, factor), scaled(*ahead_items, factor)};
    if (!need_queries && !need_items) return {grad_queries, zeros(items, need_items)};
    Input input(queries, items, targets, rejected, users, logq, counts);
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
