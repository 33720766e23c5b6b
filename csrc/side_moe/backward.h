// The backward pass of a tile. The output's gradient is multiplied by up^T, one expert after the other, which also
// gives the gates' gradients. One product of the gradients of all hidden states and logits gives the gradient of x. The
// weights' gradients are accumulated tile by tile.
#pragma once

#include "side_moe/activations.h"
#include "side_moe/tiles.h"
#include "side_moe/weight_gradients.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using side_moe::Backward;
using side_moe::GradientSums;

template <class T>
void scale_row(const T* from, float factor, int64_t dim, T* to) {
    int64_t column = 0;
    for (; column + lanes <= dim; column += lanes) store(to + column, factor * load(from + column));
    if (column < dim) store(to + column, factor * load(from + column, dim - column), dim - column);
}

template <class T>
struct BackwardScratch {
    typedef typename Operand<T>::Value Value;

    int64_t gate_stride, rank_columns, rank_stride, hidden_stride, activated_stride;
    bool experts_needed;
    LhsRows<T> grad, x;
    float* hidden;        // (tile, rank_columns): one expert's, where it is recomputed
    Value* dhidden;       // (tile, hidden_stride): gradients of all experts' hidden states, then of the logits
    Value* activated;     // (tile, activated_stride): the trained experts', times their gates
    float* dots;          // (tile, lanes)
    float* dgates;        // (tile, gate_stride)
    float* expert_gates;  // (tile,)
    WeightScratch<Value> weights;
    Segment<Value>* segments;  // (experts + 1,)

    BackwardScratch(Arena& arena, const Backward& call)
        : gate_stride(round_up(call.sizes.experts + 1, column_multiple<Value>)),
          rank_columns(round_up(call.sizes.rank, lanes)),
          rank_stride(round_up(call.sizes.rank, column_multiple<Value>)),
          hidden_stride(call.sizes.experts * rank_stride + gate_stride + lanes),
          activated_stride((call.sizes.experts - call.trained) * rank_stride + lanes),
          experts_needed(call.need_x || call.need_router || call.need_down || call.need_up),
          grad(call.sizes.dim, column_multiple<Value>),
          x(call.sizes.dim, column_multiple<Value>),
          hidden(call.hidden == nullptr ? arena.allocate<float>(tile_rows<Value> * rank_columns) : nullptr),
          dhidden(arena.allocate<Value>(tile_rows<Value> * hidden_stride)),
          activated(arena.allocate<Value>(tile_rows<Value> * activated_stride)),
          dots(arena.allocate<float>(tile_rows<Value> * lanes)),
          dgates(arena.allocate<float>(tile_rows<Value> * gate_stride)),
          expert_gates(arena.allocate<float>(tile_rows<Value>)),
          weights(arena, hidden_stride),
          segments(arena.allocate<Segment<Value>>(call.sizes.experts + 1)) {
        if (!experts_needed) return;
        grad.allocate(arena, tile_rows<Value>);
        x.allocate(arena, tile_rows<Value>);
    }
};

template <class T, Activation activation>
void backward_tile(
    const Backward& call, const BackwardScratch<T>& scratch, int64_t first, int64_t rows, bool begins, GradientSums sums
) {
    typedef typename Operand<T>::Value Value;
    const auto [dim, experts, rank] = call.sizes;
    const int64_t gated = experts + 1, gate_stride = scratch.gate_stride;
    const bool rows_needed = call.need_x || call.need_router;
    const T* grad = static_cast<const T*>(call.grad) + first * call.grad_stride;
    const T* x = static_cast<const T*>(call.x) + first * call.x_stride;
    const T* backbone =
        call.backbone == nullptr ? nullptr : static_cast<const T*>(call.backbone) + first * call.backbone_stride;
    const float* gates = call.gates + first * gated;

    if (call.need_backbone) {
        T* to = static_cast<T*>(call.dbackbone) + first * dim;
        for (int64_t row = 0; row < rows; ++row)
            scale_row(grad + row * call.grad_stride, gates[row * gated], dim, to + row * dim);
    }
    if (!scratch.experts_needed) return;

    const Lhs<Value> grad_left = scratch.grad.of(grad, call.grad_stride, rows);
    const Lhs<Value> x_left = scratch.x.of(x, call.x_stride, rows);

    for (int64_t e = rows_needed ? 0 : call.trained; e < experts; ++e) {
        const bool trained = e >= call.trained;
        if (call.hidden == nullptr) {
            const Segment<Value> down = packed_segment<Value>(call.experts[e].part[side_moe::down_columns], dim);
            product<false>(
                rows, scratch.rank_columns, x_left, Rhs<Value>{&down, 1, panel},
                [&](int64_t row, int count, int64_t column, int width, const float* sums) {
                    for (int r = 0; r < count; ++r) {
                        float* to = scratch.hidden + (row + r) * scratch.rank_columns + column;
                        for (int i = 0; i < width; i += lanes) store(to + i, load(sums + r * panel + i));
                    }
                }
            );
        }
        const T* kept =
            call.hidden == nullptr ? nullptr : static_cast<const T*>(call.hidden) + first * experts * rank + e * rank;
        Value* dhidden = scratch.dhidden + e * scratch.rank_stride;
        Value* activated = trained ? scratch.activated + (e - call.trained) * scratch.rank_stride : nullptr;
        std::memset(scratch.dots, 0, rows * lanes * sizeof(float));
        const Segment<Value> up = packed_segment<Value>(call.experts[e].part[side_moe::up_columns], dim);
        product<false>(
            rows, scratch.rank_columns, grad_left, Rhs<Value>{&up, 1, panel},
            [&](int64_t row, int count, int64_t column) {
                if (kept == nullptr) return;
                for (int64_t at = row; at < row + count; ++at) prefetch_panel(kept + at * experts * rank + column);
            },
            [&](int64_t row, int count, int64_t column, int width, const float* sums) {
                for (int64_t at = row; at < row + count; ++at, sums += panel) {
                    const Vec gate = splat(gates[at * gated + e + 1]);
                    const T* keep = kept == nullptr ? nullptr : kept + at * experts * rank + column;
                    const float* again = scratch.hidden + at * scratch.rank_columns + column;
                    Value* to = dhidden + at * scratch.hidden_stride + column;
                    Value* gated_to =
                        activated == nullptr ? nullptr : activated + at * scratch.activated_stride + column;
                    Vec dots = load(scratch.dots + at * lanes);
                    each_vector(width, rank - column, [&](int i, int64_t here) {
                        const Vec hidden = keep == nullptr ? load(again + i) : load(keep + i, here);
                        const Vec up_grad = load(sums + i);
                        const Activated a = activate<activation>(hidden);
                        dots += up_grad * a.value;
                        store(to + i, gate * up_grad * a.slope);
                        if (gated_to != nullptr) store(gated_to + i, gate * a.value);
                    });
                    store(scratch.dots + at * lanes, dots);
                }
            }
        );
        if (rows_needed) {
            for (int64_t row = 0; row < rows; ++row) {
                scratch.dgates[row * gate_stride + e + 1] = sum(load(scratch.dots + row * lanes));
            }
        }
    }

    // This runs after the experts, so that their products hide the first reads of the gradient.
    if (rows_needed) {
        for (int64_t row = 0; row < rows; ++row) {
            const T* go = grad + row * call.grad_stride;
            float* dgates = scratch.dgates + row * gate_stride;
            dgates[0] = call.backbone_dot != nullptr ? call.backbone_dot[first + row]
                                                     : dot(go, backbone + row * call.backbone_stride, dim);
            const float shared = dot(go, x + row * call.x_stride, dim);
            for (int64_t e = 1; e < gated; ++e) dgates[e] += shared;
        }
    }

    Value* dlogits = scratch.dhidden + experts * scratch.rank_stride;
    for (int64_t row = 0; rows_needed && row < rows; ++row) {
        const float* gate = gates + row * gated;
        const float* dgate = scratch.dgates + row * gate_stride;
        float mean = 0;
        for (int64_t e = 0; e < gated; ++e) mean += gate[e] * dgate[e];
        for (int64_t e = 0; e < gated; ++e) {
            assign(dlogits[row * scratch.hidden_stride + e], gate[e] * (dgate[e] - mean));
        }
    }

    // The trained experts' columns of dhidden and those of dlogits are adjacent, so that x is read once for both.
    const int64_t trained_columns = (experts - call.trained) * scratch.rank_stride;
    const auto row_of = [&](int64_t column) {
        const int64_t r = column % scratch.rank_stride;
        return r < rank ? column / scratch.rank_stride * rank + r : -1;
    };
    if (call.need_up && trained_columns > 0) {
        add_weight_gradients<Value>(
            {scratch.activated, scratch.activated_stride}, trained_columns, grad_left, dim, rows, scratch.weights,
            begins, sums.at + sums.up * panel, sums.rows, row_of
        );
    }
    const int64_t down_columns = call.need_down ? trained_columns : 0;
    if (down_columns > 0 || call.need_router) {
        add_weight_gradients<Value>(
            {dlogits - down_columns, scratch.hidden_stride}, down_columns + (call.need_router ? gated : 0), x_left, dim,
            rows, scratch.weights, begins, sums.at, sums.rows,
            [&](int64_t column) {
                if (column >= down_columns) return sums.router + column - down_columns;
                const int64_t row = row_of(column);
                return row < 0 ? row : sums.down + row;
            }
        );
    }
    if (!call.need_x) return;

    sum_expert_gates(gates, rows, experts, gated, scratch.expert_gates);
    for (int64_t e = 0; e < experts; ++e) {
        scratch.segments[e] =
            packed_segment<Value>(call.experts[e].part[side_moe::down_rows], rank, e * scratch.rank_stride);
    }
    scratch.segments[experts] = packed_segment<Value>(call.router, gated, experts * scratch.rank_stride);
    product<false>(
        rows, round_up(dim, lanes), Lhs<Value>{scratch.dhidden, scratch.hidden_stride},
        Rhs<Value>{scratch.segments, gated, panel},
        [&](int64_t row, int count, int64_t column) {
            for (int64_t at = row; at < row + count; ++at) prefetch_panel(grad + at * call.grad_stride + column);
        },
        [&](int64_t row, int count, int64_t column, int width, const float* sums) {
            for (int64_t at = row; at < row + count; ++at, sums += panel) {
                const Vec own = splat(scratch.expert_gates[at]);
                const T* go = grad + at * call.grad_stride + column;
                T* to = static_cast<T*>(call.dx) + (first + at) * dim + column;
                each_vector(width, dim - column, [&](int i, int64_t here) {
                    store(to + i, load(sums + i) + own * load(go + i, here), here);
                });
            }
        }
    );
}

template <class T>
void backward(const Backward& call, int64_t first, int64_t last, void* memory, GradientSums sums) {
    typedef typename Operand<T>::Value Value;
    Arena arena(memory);
    const BackwardScratch<T> scratch(arena, call);
    std::memset(scratch.dhidden, 0, tile_rows<Value> * scratch.hidden_stride * sizeof(Value));
    std::memset(scratch.activated, 0, tile_rows<Value> * scratch.activated_stride * sizeof(Value));
    const MatrixUnit unit;
    const int64_t height = tile_height<Value>(last - first);
    with_activation(call.activation, [&]<Activation activation>() {
        for (int64_t row = first; row < last; row += height) {
            backward_tile<T, activation>(call, scratch, row, minimum(height, last - row), row == first, sums);
        }
    });
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
