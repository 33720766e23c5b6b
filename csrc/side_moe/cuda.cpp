// side_moe on GPUs: unpacks the tensors of all levels of a launch for the kernels that process rows.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/device.h"
#include "cuda/tensors.h"
#include "shared/tensors.h"
#include "side_moe/cuda.h"

namespace xsmoe::side_moe {

namespace {

using xsmoe::cuda::dtype_of;
using xsmoe::cuda::OnDevice;
using Tensors = std::vector<Tensor>;

void check_levels(const char* name, size_t found, size_t levels) {
    if (found != levels || levels == 0 || levels > max_levels) {
        throw std::invalid_argument(
            std::string(name) + " must have an entry for each of 1 to " + std::to_string(max_levels) + " levels, not " +
            std::to_string(found)
        );
    }
}

// Raise an error unless all levels have the dtype and device of `first`, as the kernels of one launch require.
void check_alike(const char* name, const Tensors& tensors, const Tensor& first) {
    for (const Tensor& tensor : tensors) {
        const bool same_device = tensor.is_cuda() == first.is_cuda() &&
                                 (!first.is_cuda() || tensor.get_device_index() == first.get_device_index());
        if (tensor.scalar_type() != first.scalar_type() || !same_device) {
            throw std::invalid_argument(std::string(name) + " must have the dtype and device of x in all levels");
        }
    }
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(data(tensor)); }

int gated_of(const Tensor& gates) { return static_cast<int>(gates.size(1)); }

// Return the (rows, E+1) gates of each level, from rows of x and routers (E+1, D).
Tensors gate(Tensors x, Tensors router) {
    check_levels("x", x.size(), x.size());
    check_levels("router", router.size(), x.size());
    check_alike("x", x, x[0]);
    check_alike("router", router, x[0]);
    const OnDevice device(x[0]);
    Tensors gates;
    std::vector<GateLevel> levels;
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = with_dense_rows(x[i]);
        router[i] = torch::stable::contiguous(router[i]);
        gates.push_back(empty(x[i], {x[i].size(0), router[i].size(0)}, ScalarType::Float));
        GateLevel level{};
        level.x = data(x[i]);
        level.x_stride = x[i].stride(0);
        level.router = data(router[i]);
        level.gates = mutable_data_as<float>(gates[i]);
        level.rows = x[i].size(0);
        level.dim = x[i].size(1);
        level.gated = gated_of(gates[i]);
        levels.push_back(level);
    }
    launch_gate(dtype_of(x[0], "x"), levels.data(), static_cast<int>(levels.size()), device.stream());
    return gates;
}

// Return the increments of norm and gate (E+1,) of each level, from gates (rows, E+1), sums of squares (E+1, column
// blocks, rows), and optional row weights (N,). With backbone_squares (N,), gates and squares have one row for all N.
std::tuple<Tensors, Tensors> count(
    Tensors gates, Tensors squares, Tensors backbone_squares, std::vector<std::optional<Tensor>> row_weight
) {
    const bool one_row = !backbone_squares.empty();
    check_levels("gates", gates.size(), gates.size());
    check_levels("squares", squares.size(), gates.size());
    check_levels("row_weight", row_weight.size(), gates.size());
    if (one_row) check_levels("backbone_squares", backbone_squares.size(), gates.size());
    const OnDevice device(gates[0]);
    Tensors norm, mass, weights, parts;
    std::vector<CountLevel> levels;
    for (size_t i = 0; i < gates.size(); ++i) {
        const int64_t gated = gates[i].size(1), rows = one_row ? backbone_squares[i].size(0) : gates[i].size(0);
        norm.push_back(empty(gates[i], {gated}, ScalarType::Float));
        mass.push_back(empty(gates[i], {gated}, ScalarType::Float));
        parts.push_back(empty(gates[i], {count_slices(rows), 2, gated}, ScalarType::Float));
        CountLevel level{};
        if (row_weight[i]) {
            weights.push_back(torch::stable::contiguous(torch::stable::to(*row_weight[i], ScalarType::Float)));
            level.row_weight = floats(weights.back());
        }
        level.gates = floats(gates[i]);
        level.squares = floats(squares[i]);
        level.backbone_squares = one_row ? floats(backbone_squares[i]) : nullptr;
        level.rows = rows;
        level.column_blocks = squares[i].size(1);
        level.gated = static_cast<int>(gated);
        level.parts = mutable_data_as<float>(parts[i]);
        level.norm = mutable_data_as<float>(norm[i]);
        level.mass = mutable_data_as<float>(mass[i]);
        levels.push_back(level);
    }
    launch_count(levels.data(), static_cast<int>(levels.size()), device.stream());
    return {norm, mass};
}

// Return the gradients of the logits (rows, 16 ceil((E+1) / 16)) and of the backbone of each level; they are empty
// where they are not needed. Where x is one row, backbone_dot (1,) is grad . backbone, and grad is float32.
std::tuple<Tensors, Tensors> logit_gradient(
    Tensors x, Tensors backbone, Tensors grad, Tensors gates, Tensors dots, Tensors backbone_dot, bool need_logits,
    bool need_backbone
) {
    const bool one_row = !backbone_dot.empty();
    check_levels("x", x.size(), x.size());
    for (const auto& [name, found] :
         {std::pair{"backbone", backbone.size()},
          {"grad", grad.size()},
          {"gates", gates.size()},
          {"dots", dots.size()},
          {"backbone_dot", one_row ? backbone_dot.size() : x.size()}}) {
        check_levels(name, found, x.size());
    }
    check_alike("x", x, x[0]);
    check_alike("backbone", backbone, x[0]);
    const OnDevice device(x[0]);
    Tensors grad_logits, grad_backbone;
    std::vector<LogitLevel> levels;
    for (size_t i = 0; i < x.size(); ++i) {
        const int64_t rows = x[i].size(0), dim = x[i].size(1), gated = gates[i].size(1);
        x[i] = with_dense_rows(x[i]);
        backbone[i] = with_dense_rows(backbone[i]);
        grad[i] = with_dense_rows(grad[i]);
        LogitLevel level{};
        if (need_logits) {
            grad_logits.push_back(empty(x[i], {rows, padded_logits(gated)}, ScalarType::Float));
            level.grad_logits = mutable_data_as<float>(grad_logits[i]);
            level.dots = floats(dots[i]);
            level.chunks = static_cast<int>(dots[i].size(1) / (gated - 1));
        }
        if (need_backbone) {
            grad_backbone.push_back(empty(backbone[i], {rows, dim}, backbone[i].scalar_type()));
            level.grad_backbone = mutable_data(grad_backbone[i]);
        }
        level.x = data(x[i]);
        level.x_stride = x[i].stride(0);
        level.backbone = data(backbone[i]);
        level.backbone_stride = backbone[i].stride(0);
        level.grad = data(grad[i]);
        level.grad_stride = grad[i].stride(0);
        level.gates = floats(gates[i]);
        level.backbone_dot = one_row ? floats(backbone_dot[i]) : nullptr;
        level.rows = rows;
        level.dim = dim;
        level.gated = static_cast<int>(gated);
        levels.push_back(level);
    }
    const bool wide_grad = grad[0].scalar_type() == ScalarType::Float;
    launch_logit_gradient(
        dtype_of(x[0], "x"), wide_grad, levels.data(), static_cast<int>(levels.size()), device.stream()
    );
    return {grad_logits, grad_backbone};
}

}  // namespace
}  // namespace xsmoe::side_moe

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_cuda, m) {
    m.def("side_moe_gate(Tensor[] x, Tensor[] router) -> Tensor[] gates");
    m.def(
        "side_moe_count(Tensor[] gates, Tensor[] squares, Tensor[] backbone_squares, Tensor?[] row_weight) "
        "-> (Tensor[] norm, Tensor[] gate)"
    );
    m.def(
        "side_moe_logit_gradient(Tensor[] x, Tensor[] backbone, Tensor[] grad, Tensor[] gates, Tensor[] dots, "
        "Tensor[] backbone_dot, bool need_logits, bool need_backbone) -> (Tensor[] logits, Tensor[] backbone)"
    );
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_cuda, CompositeExplicitAutograd, m) {
    m.impl("side_moe_gate", TORCH_BOX(&xsmoe::side_moe::gate));
    m.impl("side_moe_count", TORCH_BOX(&xsmoe::side_moe::count));
    m.impl("side_moe_logit_gradient", TORCH_BOX(&xsmoe::side_moe::logit_gradient));
}
