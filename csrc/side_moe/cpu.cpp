// side_moe on the CPU: unpacks the tensors, divides rows among threads, and adds up the threads' results.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "cpu/isa_kernels.h"
#include "side_moe/kernels.h"
#include "side_moe/prepacked_weights.h"

namespace xsmoe::side_moe {

XSMOE_KERNELS_FOR

namespace {

// The most bytes of all threads' sums of weight gradients. Fewer threads run where the sums would be larger.
constexpr int64_t max_gradient_bytes = int64_t{1} << 29;

Activation activation_named(const std::string& name) {
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "relu") return Activation::relu;
    throw std::invalid_argument("activation must be one of gelu, gelu_tanh, relu, not " + name);
}

double row_cost(Sizes sizes, double products) {
    return products * 2.0 * static_cast<double>((sizes.experts * sizes.rank + sizes.experts + 1) * sizes.dim);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up, std::optional<Tensor> frozen_down,
    std::optional<Tensor> frozen_up, std::optional<Tensor> frozen_pack, std::optional<Tensor> row_weight, int64_t,
    bool recompute, bool count, std::string activation
) {
    const ScalarType dtype = x.scalar_type();
    const Kernels& kernels = kernels_for(dtype);
    Weights weights(kernels, router, down, up, frozen_down, frozen_up, frozen_pack);
    weights.request(down_columns);
    weights.request(up_rows);
    const bool few = weights.sizes.experts + 1 <= few_gates;
    if (!few) weights.request_router(true);
    weights.pack();

    const auto [dim, experts, rank] = weights.sizes;
    const int64_t rows = backbone.size(0), gated = experts + 1;
    const bool broadcast = x.size(0) == 1 && rows != 1;
    x = with_dense_rows(x);
    backbone = with_dense_rows(backbone);
    if (row_weight) row_weight = torch::stable::contiguous(torch::stable::to(*row_weight, ScalarType::Float));
    const float* weight = row_weight ? static_cast<const float*>(data(*row_weight)) : nullptr;
    const Tensor y = empty(backbone, {rows, dim}, dtype);
    const Tensor gates = empty(x, {x.size(0), gated}, ScalarType::Float);
    const Tensor hidden = recompute ? empty(x, {0}, dtype) : empty(x, {x.size(0), experts * rank}, dtype);
    std::optional<Tensor> mixture;
    if (broadcast) mixture = empty(x, {dim}, ScalarType::Float);

    Forward call{};
    call.sizes = weights.sizes;
    call.activation = activation_named(activation);
    call.x = data(x);
    call.x_stride = x.stride(0);
    call.backbone = broadcast ? nullptr : data(backbone);
    call.backbone_stride = backbone.stride(0);
    call.row_weight = broadcast ? nullptr : weight;
    call.router = weights.router;
    call.router_rows = few ? weights.router_rows() : nullptr;
    call.experts = weights.experts.data();
    call.count = count;
    call.y = mutable_data(y);
    call.mixture = broadcast ? mutable_data_as<float>(*mixture) : nullptr;
    call.gates = mutable_data_as<float>(gates);
    call.hidden = recompute ? nullptr : mutable_data(hidden);

    const Chunks chunks(x.size(0), kernels.block_rows, row_cost(call.sizes, 2));
    const ChunkScratch work(x, chunks.count, kernels.forward_bytes(call));
    std::vector<double> sums(static_cast<size_t>(chunks.count * 2 * gated));
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto [first, last] = chunks[chunk];
        double* sum = sums.data() + chunk * 2 * gated;
        kernels.forward(call, first, last, work.of(chunk), {sum, sum + gated});
    });
    std::vector<double> totals(sums.begin(), sums.begin() + 2 * gated);
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
        for (int64_t i = 0; i < 2 * gated; ++i) totals[i] += sums[chunk * 2 * gated + i];
    }

    if (broadcast) {
        const Chunks parts(rows, 1, 4.0 * static_cast<double>(dim));
        std::vector<double> norm(static_cast<size_t>(parts.count)), counted(static_cast<size_t>(parts.count));
        for_each_chunk(parts.count, [&](int64_t part) {
            const auto [first, last] = parts[part];
            kernels.broadcast(
                call.mixture, call.gates[0], data(backbone), backbone.stride(0), weight, dim, first, last, call.y,
                &norm[part], &counted[part]
            );
        });
        double all_norm = 0, all_counted = 0;
        for (int64_t part = 0; part < parts.count; ++part) {
            all_norm += norm[part];
            all_counted += counted[part];
        }
        // Zero rows count as zero, even if the row of x is not finite.
        for (double& total : totals) total = rows == 0 ? 0.0 : total * all_counted;
        totals[0] = all_norm;
    }

    const Tensor norm = empty(x, {count ? gated : 0}, ScalarType::Float);
    const Tensor gate = empty(x, {count ? gated : 0}, ScalarType::Float);
    for (int64_t e = 0; count && e < gated; ++e) {
        mutable_data_as<float>(norm)[e] = static_cast<float>(totals[e]);
        mutable_data_as<float>(gate)[e] = static_cast<float>(totals[gated + e]);
    }
    return {y, gates, hidden, norm, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up, std::optional<Tensor> frozen_down,
    std::optional<Tensor> frozen_up, std::optional<Tensor> frozen_pack, Tensor gates, Tensor hidden, int64_t num_frozen,
    bool recompute, std::string activation, bool need_x, bool need_backbone, bool need_router, bool need_down,
    bool need_up
) {
    const ScalarType dtype = x.scalar_type();
    const Kernels& kernels = kernels_for(dtype);
    const int64_t trained = frozen_down ? frozen_down->size(0) : num_frozen;
    const bool rows_needed = need_x || need_router;
    const int64_t first = rows_needed ? 0 : trained;
    Weights weights(kernels, router, down, up, frozen_down, frozen_up, frozen_pack);
    if (rows_needed || need_down || need_up) {
        weights.request(up_columns, first);
        if (recompute) weights.request(down_columns, first);
    }
    if (need_x) {
        weights.request(down_rows);
        weights.request_router(false);
    }
    weights.pack();

    const auto [dim, experts, rank] = weights.sizes;
    const int64_t rows = backbone.size(0), gated = experts + 1;
    const bool broadcast = x.size(0) == 1 && rows != 1;
    grad = with_dense_rows(grad);
    x = with_dense_rows(x);
    backbone = with_dense_rows(backbone);
    gates = torch::stable::contiguous(gates);
    hidden = torch::stable::contiguous(hidden);
    const auto result = [&](bool needed, const Tensor& like) {
        return needed ? torch::stable::new_empty(like, like.sizes(), dtype) : empty(like, {0}, dtype);
    };
    const Tensor dx = result(need_x, x), dbackbone = result(need_backbone, backbone);
    const Tensor drouter = result(need_router, router), ddown = result(need_down, down), dup = result(need_up, up);
    const int64_t panels = (dim + kernels.panel - 1) / kernels.panel;

    Backward call{};
    call.sizes = weights.sizes;
    call.activation = activation_named(activation);
    call.trained = trained;
    call.grad = data(grad);
    call.grad_stride = grad.stride(0);
    call.x = data(x);
    call.x_stride = x.stride(0);
    call.backbone = data(backbone);
    call.backbone_stride = backbone.stride(0);
    call.gates = static_cast<const float*>(data(gates));
    call.hidden = recompute ? nullptr : data(hidden);
    call.router = weights.router;
    call.experts = weights.experts.data();
    call.need_x = need_x;
    call.need_backbone = need_backbone;
    call.need_router = need_router;
    call.need_down = need_down;
    call.need_up = need_up;
    call.dx = mutable_data(dx);
    call.dbackbone = mutable_data(dbackbone);

    std::optional<Tensor> row_grad;
    float backbone_dot = 0;
    if (broadcast) {
        const Chunks parts(rows, 1, 6.0 * static_cast<double>(dim));
        const int64_t two_rows = 2 * panels * kernels.panel;
        const ChunkScratch sums(x, parts.count, two_rows * int64_t{sizeof(float)});
        std::vector<double> dots(static_cast<size_t>(parts.count));
        for_each_chunk(parts.count, [&](int64_t part) {
            const auto [from, to] = parts[part];
            kernels.collect(
                call.grad, call.grad_stride, call.backbone, call.backbone_stride, call.gates[0], dim, from, to,
                static_cast<float*>(sums.of(part)), &dots[part], need_backbone ? call.dbackbone : nullptr
            );
        });
        row_grad = empty(x, {1, dim}, dtype);
        kernels.gather(
            static_cast<const float*>(sums.of(0)), parts.count, two_rows, 1, dim, 0, 1, mutable_data(*row_grad)
        );
        double dot = 0;
        for (double part : dots) dot += part;
        backbone_dot = static_cast<float>(dot);
        call.grad = data(*row_grad);
        call.grad_stride = dim;
        call.backbone = nullptr;
        call.backbone_dot = &backbone_dot;
        call.need_backbone = false;
    }

    // Each chunk has its own sums of the weights' gradients.
    const int64_t expert_rows = (experts - trained) * rank;
    GradientSums layout{};
    layout.router = need_down ? expert_rows : 0;
    layout.up = layout.router + (need_router ? gated : 0);
    layout.rows = layout.up + (need_up ? expert_rows : 0);
    const int64_t sum_bytes = layout.rows * panels * kernels.panel * int64_t{sizeof(float)};
    const int64_t affordable = std::max<int64_t>(1, max_gradient_bytes / std::max<int64_t>(1, sum_bytes));
    const Chunks chunks(
        x.size(0), kernels.block_rows, row_cost(call.sizes, need_x ? 2 : 1),
        std::min<int64_t>(affordable, torch::stable::get_num_threads())
    );
    const ChunkScratch work(x, chunks.count, kernels.backward_bytes(call));
    const ChunkScratch sums(x, chunks.count, sum_bytes);
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        GradientSums own = layout;
        own.at = static_cast<float*>(sums.of(chunk));
        const auto [from, to] = chunks[chunk];
        if (from == to && sum_bytes > 0) std::memset(own.at, 0, sum_bytes);
        kernels.backward(call, from, to, work.of(chunk), own);
    });

    // `count` rows of the sums, from `first` on, become a gradient. Its leading `zeros` rows belong to frozen experts.
    const int64_t row_bytes = dim * element_size(x);
    const auto finish = [&](const Tensor& gradient, int64_t first, int64_t zeros, int64_t count) {
        if (zeros + count == 0 || dim == 0) return;
        char* to = mutable_data_as<char>(gradient);
        const auto* from = static_cast<const float*>(sums.of(0));
        const int64_t chunk_stride = sum_bytes / int64_t{sizeof(float)};
        const Chunks parts(zeros + count, 1, 2.0 * static_cast<double>(dim * chunks.count));
        for_each_chunk(parts.count, [&](int64_t part) {
            const auto [begin, end] = parts[part];
            const int64_t cut = std::clamp(zeros, begin, end);
            std::memset(to + begin * row_bytes, 0, (cut - begin) * row_bytes);
            kernels.gather(
                from, chunks.count, chunk_stride, layout.rows, dim, first + cut - zeros, first + end - zeros,
                to + cut * row_bytes
            );
        });
    };
    const int64_t zeros = num_frozen * rank;
    if (need_router) finish(drouter, layout.router, 0, gated);
    if (need_down) finish(ddown, layout.down, zeros, expert_rows);
    if (need_up) finish(dup, layout.up, zeros, expert_rows);
    return {dx, dbackbone, drouter, ddown, dup};
}

// Pack frozen experts' weights (F, R, D) in the layouts of all their products. Only this process can interpret the
// bytes.
Tensor pack_experts(Tensor down, Tensor up) {
    const Kernels& kernels = kernels_for(down.scalar_type());
    const int64_t frozen = down.size(0);
    const Sizes sizes{down.size(2), frozen, down.size(1)};
    down = torch::stable::contiguous(down);
    up = torch::stable::contiguous(up);
    const int64_t bytes = sizes.rank * sizes.dim * element_size(down);
    Packing packing(kernels);
    const void* unused = nullptr;
    std::vector<const void*> places(static_cast<size_t>(frozen * parts), unused);
    for (int64_t e = 0; e < frozen; ++e) {
        for (int part = 0; part < parts; ++part) {
            const char* from = static_cast<const char*>(data(reads_down(part) ? down : up)) + e * bytes;
            packing.add(from, shape_of(part, sizes), &places[static_cast<size_t>(e * parts + part)]);
        }
    }
    const Tensor packed = empty(down, {packing.bytes()}, ScalarType::Byte);
    packing.run(mutable_data_as<char>(packed));
    return packed;
}

}  // namespace
}  // namespace xsmoe::side_moe

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_native, m) {
    m.def(
        "side_moe(Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up, Tensor? frozen_down, "
        "Tensor? frozen_up, Tensor? frozen_pack, Tensor? row_weight, SymInt num_frozen, bool recompute, bool count, "
        "str activation) -> (Tensor y, Tensor gates, Tensor hidden, Tensor norm, Tensor gate)"
    );
    m.def(
        "side_moe_backward(Tensor grad, Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up, "
        "Tensor? frozen_down, Tensor? frozen_up, Tensor? frozen_pack, Tensor gates, Tensor hidden, SymInt num_frozen, "
        "bool recompute, str activation, bool need_x, bool need_backbone, bool need_router, bool need_down, "
        "bool need_up) -> (Tensor x, Tensor backbone, Tensor router, Tensor down, Tensor up)"
    );
    m.def("pack_experts(Tensor down, Tensor up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CPU, m) {
    m.impl("side_moe", TORCH_BOX(&xsmoe::side_moe::forward));
    m.impl("side_moe_backward", TORCH_BOX(&xsmoe::side_moe::backward));
    m.impl("pack_experts", TORCH_BOX(&xsmoe::side_moe::pack_experts));
}
