// The forward pass of a tile of x: router and experts.
//
// With counters, an expert's output x + a up is in registers when the epilogue runs. The epilogue sums its squares and
// adds it to y, times its gate. Without counters, one product multiplies all experts' gated activations by all up
// projections.
#pragma once

#include "side_moe/activations.h"
#include "side_moe/tiles.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using side_moe::Forward;
using side_moe::Totals;

// The derivatives of the gates multiply a logit's rounding error by its size. So logits use shorter chains of additions
// than other products: a chain of K additions has about sqrt(K) times the error of a single one.
constexpr int64_t logit_chain = 32;

// Replace logits by gates in place, row by row. Columns after `gated` become zeros.
void softmax(float* logits, int64_t rows, int64_t gated, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) {
        float* at = logits + row * stride;
        for (int64_t column = gated; column < stride; ++column) at[column] = -__builtin_inff();
        Vec most = load(at);
        for (int64_t column = lanes; column < stride; column += lanes) most = maximum(most, load(at + column));
        float top = most[0];
        for (int i = 1; i < lanes; ++i) top = most[i] > top ? most[i] : top;
        Vec total = {};
        for (int64_t column = 0; column < stride; column += lanes) {
            const Vec exponential = exp_negative(load(at + column) - top);
            store(at + column, exponential);
            total += exponential;
        }
        const float scale = 1.0f / sum(total);
        for (int64_t column = 0; column < stride; column += lanes) store(at + column, load(at + column) * scale);
    }
}

template <class T>
struct ForwardScratch {
    typedef typename Operand<T>::Value Value;

    int64_t gate_stride, rank_stride, activated_stride, mixed_stride;
    LhsRows<T> x;
    float* gates;              // (tile, gate_stride)
    float* expert_gates;       // (tile,): the sum of a row's gates, without the backbone's
    Value* activated;          // (tile, activated_stride): with counters one expert's, else all experts', gated
    float* squares;            // (tile, lanes)
    float* backbone_squares;   // (tile, lanes)
    float* mixed;              // (tile, mixed_stride): partial sums of y, where y is not float32
    Segment<Value>* segments;  // (experts,)

    ForwardScratch(Arena& arena, const Forward& call)
        : gate_stride(round_up(call.sizes.experts + 1, lanes)),
          rank_stride(round_up(call.sizes.rank, column_multiple<Value>)),
          activated_stride(rank_stride * (call.count ? 1 : call.sizes.experts) + lanes),
          mixed_stride(round_up(call.sizes.dim, lanes)),
          x(call.sizes.dim, column_multiple<Value>),
          gates(arena.allocate<float>(tile_rows<Value> * gate_stride)),
          expert_gates(arena.allocate<float>(tile_rows<Value>)),
          activated(arena.allocate<Value>(tile_rows<Value> * activated_stride)),
          squares(arena.allocate<float>(tile_rows<Value> * lanes)),
          backbone_squares(arena.allocate<float>(tile_rows<Value> * lanes)),
          mixed(
              call.count && sizeof(T) != sizeof(float) ? arena.allocate<float>(tile_rows<Value> * mixed_stride)
                                                       : nullptr
          ),
          segments(arena.allocate<Segment<Value>>(call.sizes.experts)) {
        x.allocate(arena, tile_rows<Value>);
    }
};

// Add an expert's gated outputs x + a up to y, and their squares to the sums of the rows. With `backbone`, which is set
// for the first expert, y starts as the backbone's gated rows, and their squares are summed too.
template <class T>
struct Mixing {
    int64_t dim;
    const float* gates;  // the backbone's; `gate` is the expert's
    const float* gate;
    int64_t gate_stride;
    const T* x;
    int64_t x_stride;
    const T* backbone;
    int64_t backbone_stride;
    float* squares;
    float* backbone_squares;
    float* so_far;
    int64_t so_far_stride;
    T* y;

    // Prefetch what the block's epilogue reads.
    XSMOE_INLINE void prefetch(int64_t first, int count, int64_t column) const {
        for (int64_t row = first; row < first + count; ++row) {
            prefetch_panel(x + row * x_stride + column);
            prefetch_panel(so_far + row * so_far_stride + column);
            if (backbone != nullptr) prefetch_panel(backbone + row * backbone_stride + column);
        }
    }

    template <bool begins, bool ends>
    void add(int64_t first, int count, int64_t column, int width, const float* sums) const {
        for (int64_t row = first; row < first + count; ++row, sums += panel) {
            const T* from = x + row * x_stride + column;
            const T* other_row = backbone == nullptr ? nullptr : backbone + row * backbone_stride + column;
            float* sum = so_far + row * so_far_stride + column;
            T* to = y + row * dim + column;
            const Vec own = splat(gate[row * gate_stride]), other = splat(gates[row * gate_stride]);
            Vec total = load(squares + row * lanes), other_total = {};
            if (begins) other_total = load(backbone_squares + row * lanes);
            each_vector(width, dim - column, [&](int i, int64_t here) {
                // After the row's end, an infinite activation times a zero would be NaN.
                const Vec output = leading(load(sums + i) + load(from + i, here), here);
                total += output * output;
                Vec mixed = own * output;
                if constexpr (!begins) {
                    mixed += load(sum + i, here);
                } else if (other_row != nullptr) {
                    const Vec h = load(other_row + i, here);
                    mixed += other * h;
                    other_total += h * h;
                }
                if constexpr (ends) {
                    store(to + i, mixed, here);
                } else {
                    store(sum + i, mixed, here);
                }
            });
            store(squares + row * lanes, total);
            if (begins) store(backbone_squares + row * lanes, other_total);
        }
    }
};

template <class T, Activation activation>
struct ForwardTile {
    typedef typename Operand<T>::Value Value;

    const Forward& call;
    const ForwardScratch<T>& scratch;
    int64_t first, rows;
    const T* x;
    const T* backbone;
    Lhs<Value> left;

    ForwardTile(const Forward& call, const ForwardScratch<T>& scratch, int64_t first, int64_t rows)
        : call(call),
          scratch(scratch),
          first(first),
          rows(rows),
          x(static_cast<const T*>(call.x) + first * call.x_stride),
          backbone(
              call.backbone == nullptr ? nullptr : static_cast<const T*>(call.backbone) + first * call.backbone_stride
          ),
          left(scratch.x.of(x, call.x_stride, rows)) {}

    void run(Totals totals) const {
        if (call.count) {
            for (int64_t e = 0; e < call.sizes.experts; ++e) {
                activate_expert(e);
                // The gates are computed here, so that the expert's product hides the first reads of x.
                if (e == 0) gate_rows(totals);
                mix_expert(e, totals);
            }
        } else {
            gate_rows(totals);
            for (int64_t e = 0; e < call.sizes.experts; ++e) activate_expert(e);
            mix_experts();
        }
    }

    double weight(int64_t row) const { return call.row_weight == nullptr ? 1.0 : double{call.row_weight[first + row]}; }

    void gate_rows(Totals totals) const {
        const int64_t dim = call.sizes.dim, gated = call.sizes.experts + 1, stride = scratch.gate_stride;
        float* gates = scratch.gates;
        if (call.router_rows != nullptr) {
            const T* router = static_cast<const T*>(call.router_rows);
            for (int64_t row = 0; row < rows; ++row) {
                for (int64_t e = 0; e < gated; ++e) {
                    gates[row * stride + e] = dot(x + row * call.x_stride, router + e * dim, dim);
                }
            }
        } else {
            const Segment<Value> router = packed_segment<Value>(call.router, dim);
            product<false>(
                rows, stride, left, Rhs<Value>{&router, 1, panel, logit_chain},
                [&](int64_t row, int count, int64_t column, int width, const float* sums) {
                    for (int64_t at = row; at < row + count; ++at, sums += panel) {
                        std::memcpy(gates + at * stride + column, sums, width * sizeof(float));
                    }
                }
            );
        }
        softmax(gates, rows, gated, stride);
        for (int64_t row = 0; row < rows; ++row) {
            std::memcpy(call.gates + (first + row) * gated, gates + row * stride, gated * sizeof(float));
            if (!call.count) continue;
            const double counted = weight(row);
            for (int64_t e = 0; e < gated; ++e) totals.gate[e] += counted * gates[row * stride + e];
        }
    }

    // Compute an expert's activations, times its gates unless the call counts, and its hidden states if they are kept.
    void activate_expert(int64_t e) const {
        const auto [dim, experts, rank] = call.sizes;
        const Segment<Value> down = packed_segment<Value>(call.experts[e].part[side_moe::down_columns], dim);
        Value* activated = scratch.activated + (call.count ? 0 : e * scratch.rank_stride);
        T* kept = call.hidden == nullptr ? nullptr : static_cast<T*>(call.hidden) + first * experts * rank + e * rank;
        product<false>(
            rows, round_up(rank, lanes), left, Rhs<Value>{&down, 1, panel},
            [&](int64_t row, int count, int64_t column, int width, const float* sums) {
                for (int64_t at = row; at < row + count; ++at, sums += panel) {
                    const Vec gate = splat(call.count ? 1.0f : scratch.gates[at * scratch.gate_stride + e + 1]);
                    T* keep = kept == nullptr ? nullptr : kept + at * experts * rank + column;
                    Value* to = activated + at * scratch.activated_stride + column;
                    each_vector(width, rank - column, [&](int i, int64_t here) {
                        const Vec hidden = load(sums + i);
                        if (keep != nullptr) store(keep + i, hidden, here);
                        store(to + i, gate * activate<activation>(hidden).value);
                    });
                }
            }
        );
    }

    // Add an expert to y and to the counters.
    void mix_expert(int64_t e, Totals totals) const {
        const auto [dim, experts, rank] = call.sizes;
        const float* gates = scratch.gates;
        float* floats = call.mixture;
        if constexpr (sizeof(T) == sizeof(float)) {
            if (floats == nullptr) floats = static_cast<float*>(call.y);
        }
        std::memset(scratch.squares, 0, rows * lanes * sizeof(float));
        if (e == 0) std::memset(scratch.backbone_squares, 0, rows * lanes * sizeof(float));
        Mixing<T> mixing{};
        mixing.dim = dim;
        mixing.gates = gates;
        mixing.gate = gates + e + 1;
        mixing.gate_stride = scratch.gate_stride;
        mixing.x = x;
        mixing.x_stride = call.x_stride;
        mixing.backbone = e == 0 ? backbone : nullptr;
        mixing.backbone_stride = call.backbone_stride;
        mixing.squares = scratch.squares;
        mixing.backbone_squares = scratch.backbone_squares;
        mixing.so_far = floats != nullptr ? floats + first * dim : scratch.mixed;
        mixing.so_far_stride = floats != nullptr ? dim : scratch.mixed_stride;
        mixing.y = static_cast<T*>(call.y) + first * dim;
        const bool begins = e == 0, ends = e + 1 == experts && floats == nullptr;
        const Segment<Value> up = packed_segment<Value>(call.experts[e].part[side_moe::up_rows], rank);
        product<false>(
            rows, round_up(dim, lanes), Lhs<Value>{scratch.activated, scratch.activated_stride},
            Rhs<Value>{&up, 1, panel},
            [&](int64_t row, int count, int64_t column) { mixing.prefetch(row, count, column); },
            [&](int64_t row, int count, int64_t column, int width, const float* sums) {
                if (begins && ends) {
                    mixing.template add<true, true>(row, count, column, width, sums);
                } else if (begins) {
                    mixing.template add<true, false>(row, count, column, width, sums);
                } else if (ends) {
                    mixing.template add<false, true>(row, count, column, width, sums);
                } else {
                    mixing.template add<false, false>(row, count, column, width, sums);
                }
            }
        );
        for (int64_t row = 0; row < rows; ++row) {
            const float* gate = gates + row * scratch.gate_stride;
            totals.norm[e + 1] += weight(row) * gate[e + 1] * norm(scratch.squares + row * lanes);
            if (begins) totals.norm[0] += weight(row) * gate[0] * norm(scratch.backbone_squares + row * lanes);
        }
    }

    static float norm(const float* squares) { return __builtin_sqrtf(sum(load(squares))); }

    // Compute y of all experts at once, without counters.
    void mix_experts() const {
        const auto [dim, experts, rank] = call.sizes;
        sum_expert_gates(scratch.gates, rows, experts, scratch.gate_stride, scratch.expert_gates);
        for (int64_t e = 0; e < experts; ++e) {
            scratch.segments[e] =
                packed_segment<Value>(call.experts[e].part[side_moe::up_rows], rank, e * scratch.rank_stride);
        }
        product<false>(
            rows, round_up(dim, lanes), Lhs<Value>{scratch.activated, scratch.activated_stride},
            Rhs<Value>{scratch.segments, experts, panel},
            [&](int64_t row, int count, int64_t column) {
                for (int64_t at = row; at < row + count; ++at) {
                    prefetch_panel(x + at * call.x_stride + column);
                    if (backbone != nullptr) prefetch_panel(backbone + at * call.backbone_stride + column);
                }
            },
            [&, dim = dim](int64_t row, int count, int64_t column, int width, const float* sums) {
                for (int64_t at = row; at < row + count; ++at, sums += panel) {
                    const Vec own = splat(scratch.expert_gates[at]),
                              other = splat(scratch.gates[at * scratch.gate_stride]);
                    const T* from = x + at * call.x_stride + column;
                    const T* other_row = backbone == nullptr ? nullptr : backbone + at * call.backbone_stride + column;
                    const int64_t to = (first + at) * dim + column;
                    each_vector(width, dim - column, [&](int i, int64_t here) {
                        const Vec mixed = load(sums + i) + own * load(from + i, here);
                        if (call.mixture != nullptr) {
                            store(call.mixture + to + i, mixed, here);
                        } else {
                            store(static_cast<T*>(call.y) + to + i, mixed + other * load(other_row + i, here), here);
                        }
                    });
                }
            }
        );
    }
};

template <class T>
void forward(const Forward& call, int64_t first, int64_t last, void* memory, Totals totals) {
    typedef typename Operand<T>::Value Value;
    Arena arena(memory);
    const ForwardScratch<T> scratch(arena, call);
    // Columns after the experts' ranks are never written. They must be finite, because the other operand has zeros
    // there.
    std::memset(scratch.activated, 0, tile_rows<Value> * scratch.activated_stride * sizeof(Value));
    const MatrixUnit unit;
    const int64_t height = tile_height<Value>(last - first);
    with_activation(call.activation, [&]<Activation activation>() {
        for (int64_t row = first; row < last; row += height) {
            ForwardTile<T, activation>(call, scratch, row, minimum(height, last - row)).run(totals);
        }
    });
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
