// side_moe on GPUs: the kernels that process rows. A warp, or a part of a warp, processes a row. The order of additions
// does not depend on the number of multiprocessors, or on the levels that share a launch.

#include "side_moe/cuda.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/runtime.h"
#include "side_moe/cuda_rows.h"

namespace xsmoe::side_moe {

namespace {

constexpr float infinity = __builtin_huge_valf();

// Gates.

// Blocks are small, because their registers allow few warps per multiprocessor. So no multiprocessor is idle for long
// at the end of a launch. With more blocks per multiprocessor in __launch_bounds__, ptxas would spill.
constexpr int gate_threads = 64, gate_blocks = 4, rows_per_warp = 4, gates_at_once = 16;
constexpr int rows_per_gate_block = gate_threads / warp_size * rows_per_warp;
// After spread_sums, a row's gates are in this many lanes, two in each.
constexpr int lanes_per_row = warp_size / rows_per_warp;
static_assert(2 * lanes_per_row == gates_at_once);

// Add this lane's part of the products of rows and `gates` rows of the router.
template <bool whole, class T>
__device__ inline void add_products(
    const T* const (&rows)[rows_per_warp], const T* router, int gates, int64_t dim,
    float (&sums)[rows_per_warp * gates_at_once]
) {
    constexpr int width = per_load<T>, together = 4;
    for (int64_t column = lane() * width; column < dim; column += warp_size * width) {
        float states[rows_per_warp][width];
        XSMOE_UNROLL
        for (int r = 0; r < rows_per_warp; ++r) load_columns<whole>(rows[r], column, dim, states[r]);
        XSMOE_UNROLL
        for (int first = 0; first < gates_at_once; first += together) {
            if (first >= gates) continue;
            XSMOE_UNROLL
            for (int g = first; g < first + together; ++g) {
                // The weights after the last gate are zeros, and their products are dropped.
                float weights[width] = {};
                if (g < gates) load_columns<whole>(router + g * dim, column, dim, weights);
                XSMOE_UNROLL
                for (int r = 0; r < rows_per_warp; ++r) {
                    XSMOE_UNROLL
                    for (int i = 0; i < width; ++i) {
                        float& sum = sums[r * gates_at_once + g];
                        sum = fmaf(states[r][i], weights[i], sum);
                    }
                }
            }
        }
    }
}

// Compute a row's gates, `gates_at_once` at a time. All blocks read the whole router, which stays in the first-level
// cache. Each block reads its own rows of x once per 16 gates, mostly from that cache too.
template <class T>
__global__ void __launch_bounds__(gate_threads, gate_blocks)
    gate_kernel(const __grid_constant__ Levels<GateLevel> levels, const __grid_constant__ Units blocks) {
    const int which = blocks.level_of(blockIdx.x);
    const GateLevel& level = levels.level[which];
    const int64_t dim = level.dim;
    const int gated = level.gated;
    const int64_t block = blockIdx.x - blocks.first[which];
    const int64_t first_row = block * rows_per_gate_block + warp() * rows_per_warp;
    if (first_row >= level.rows) return;

    const T* rows[rows_per_warp];
    XSMOE_UNROLL
    for (int r = 0; r < rows_per_warp; ++r) {
        // Rows after the last one repeat it. Their gates are not stored.
        rows[r] = static_cast<const T*>(level.x) + std::min(first_row + r, level.rows - 1) * level.x_stride;
    }
    const T* router = static_cast<const T*>(level.router);

    const int64_t row = first_row + lane() / lanes_per_row;
    const int own = 2 * (lane() % lanes_per_row);
    float* gates = level.gates + row * gated;
    const bool exists = row < level.rows, one_tile = gated <= gates_at_once;
    float largest = -infinity, total = 0;
    float logits[2];
    for (int first = 0; first < gated; first += gates_at_once) {
        float sums[rows_per_warp * gates_at_once] = {};
        const int left = gated - first, count = left < gates_at_once ? left : gates_at_once;
        if (level.whole) {
            add_products<true>(rows, router + first * dim, count, dim, sums);
        } else {
            add_products<false>(rows, router + first * dim, count, dim, sums);
        }
        spread_sums<rows_per_warp * gates_at_once>(sums);
        XSMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            logits[i] = own + i < count ? sums[i] : -infinity;
            if (!one_tile && exists && own + i < count) gates[first + own + i] = logits[i];
        }
        const float larger = fmaxf(largest, largest_of_lanes<lanes_per_row>(fmaxf(logits[0], logits[1])));
        // If all logits so far are -inf, nothing is subtracted: -inf - (-inf) would be NaN.
        const float shift = larger == -infinity ? 0.0f : larger;
        const float added = sum_over_lanes<lanes_per_row>(expf(logits[0] - shift) + expf(logits[1] - shift));
        total = fmaf(total, expf(largest - shift), added);
        largest = larger;
    }
    for (int first = 0; first < gated; first += gates_at_once) {
        XSMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int gate = first + own + i;
            if (!exists || gate >= gated) continue;
            // Logits that do not fit in registers are stored in the memory of their gates.
            const float logit = one_tile ? logits[i] : gates[gate];
            gates[gate] = expf(logit - largest) / total;
        }
    }
}

// Counters.

constexpr int count_threads = 256, gates_per_warp = 8, max_slices = 256;

// The number of rows in a slice: at most `max_slices` slices, and the same number of rows for each lane of a warp.
constexpr int64_t rows_per_slice(int64_t rows) {
    return warp_size * std::max<int64_t>(1, parts_of(rows, int64_t{warp_size} * max_slices));
}

// Compute what a slice of rows adds to the norms and masses of up to eight gates, from `first` on: sums[k], sums[8 +
// k].
__device__ inline void count_slice(
    const CountLevel& level, int64_t slice, int first, float (&sums)[2 * gates_per_warp]
) {
    const bool one_row = level.backbone_squares != nullptr;
    const int64_t slice_rows = rows_per_slice(level.rows), end = std::min((slice + 1) * slice_rows, level.rows);
    for (int64_t row = slice * slice_rows + lane(); row < end; row += warp_size) {
        const int64_t rows = one_row ? 1 : level.rows, place = one_row ? 0 : row;
        const float weight = level.row_weight ? level.row_weight[row] : 1.0f;
        float squares[gates_per_warp] = {};
        for (int64_t block = 0; block < level.column_blocks; ++block) {
            XSMOE_UNROLL
            for (int k = 0; k < gates_per_warp; ++k) {
                const int64_t gate = first + k;
                if (gate >= level.gated || (one_row && gate == 0)) continue;
                squares[k] += level.squares[(gate * level.column_blocks + block) * rows + place];
            }
        }
        if (one_row && first == 0) squares[0] = level.backbone_squares[row];
        XSMOE_UNROLL
        for (int k = 0; k < gates_per_warp; ++k) {
            if (first + k >= level.gated) continue;
            const float weighted = level.gates[place * level.gated + first + k] * weight;
            sums[k] = fmaf(weighted, sqrtf(squares[k]), sums[k]);
            sums[gates_per_warp + k] += weighted;
        }
    }
}

// First, a warp sums a slice of rows for eight gates, so that it reads a row's gates by whole sectors. Then it sums all
// slices for one gate.
__global__ void __launch_bounds__(count_threads) count_kernel(
    const __grid_constant__ Levels<CountLevel> levels, const __grid_constant__ Units groups,
    const __grid_constant__ Units gates
) {
    const int64_t warps = int64_t{gridDim.x} * (count_threads / warp_size);
    const int64_t own = int64_t{blockIdx.x} * (count_threads / warp_size) + warp();
    for (int64_t unit = own; unit < groups.first[groups.count]; unit += warps) {
        const int which = groups.level_of(unit);
        const CountLevel& level = levels.level[which];
        const int64_t groups_of_row = parts_of(level.gated, gates_per_warp), within = unit - groups.first[which];
        const int64_t slice = within / groups_of_row;
        const int first = static_cast<int>(within % groups_of_row) * gates_per_warp;
        float sums[2 * gates_per_warp] = {};
        count_slice(level, slice, first, sums);
        spread_sums<2 * gates_per_warp>(sums);
        const int index = lane() / 2, gate = first + index % gates_per_warp;
        if (lane() % 2 == 0 && gate < level.gated) {
            level.parts[(2 * slice + index / gates_per_warp) * level.gated + gate] = sums[0];
        }
    }
    wait_for_grid();
    for (int64_t unit = own; unit < gates.first[gates.count]; unit += warps) {
        const int which = gates.level_of(unit);
        const CountLevel& level = levels.level[which];
        const int64_t gate = unit - gates.first[which], slices = parts_of(level.rows, rows_per_slice(level.rows));
        float norm = 0, mass = 0;
        for (int64_t slice = lane(); slice < slices; slice += warp_size) {
            norm += level.parts[2 * slice * level.gated + gate];
            mass += level.parts[(2 * slice + 1) * level.gated + gate];
        }
        norm = sum_over_lanes(norm);
        mass = sum_over_lanes(mass);
        if (lane() == 0) {
            level.norm[gate] = norm;
            level.mass[gate] = mass;
        }
    }
}

// Gradients of logits.

constexpr int logit_threads = 256, rows_per_logit_block = logit_threads / warp_size;

struct Dots {
    float with_x = 0, with_backbone = 0;
};

// Compute this lane's part of grad . x and grad . backbone, and of the backbone's gradient from the same loads.
template <bool whole, class T, class Grad>
__device__ inline Dots row_dots(const LogitLevel& level, int64_t row, float first_gate) {
    constexpr int width = per_load<T>;
    const Grad* grad = static_cast<const Grad*>(level.grad) + row * level.grad_stride;
    const T* x = static_cast<const T*>(level.x) + row * level.x_stride;
    const T* backbone = static_cast<const T*>(level.backbone) + row * level.backbone_stride;
    T* grad_backbone = static_cast<T*>(level.grad_backbone) + row * level.dim;
    const bool need_logits = level.grad_logits, need_backbone = level.grad_backbone, own_dot = !level.backbone_dot;
    Dots dots;
    for (int64_t column = lane() * width; column < level.dim; column += warp_size * width) {
        float incoming[width], states[width];
        load_columns<whole>(grad, column, level.dim, incoming);
        if (need_logits) {
            load_columns<whole>(x, column, level.dim, states);
            XSMOE_UNROLL
            for (int i = 0; i < width; ++i) dots.with_x = fmaf(incoming[i], states[i], dots.with_x);
        }
        if (need_logits && own_dot) {
            load_columns<whole>(backbone, column, level.dim, states);
            XSMOE_UNROLL
            for (int i = 0; i < width; ++i) dots.with_backbone = fmaf(incoming[i], states[i], dots.with_backbone);
        }
        if (need_backbone) {
            XSMOE_UNROLL
            for (int i = 0; i < width; ++i) incoming[i] *= first_gate;
            store_columns<whole>(grad_backbone, column, level.dim, incoming);
        }
    }
    return dots;
}

// Return the sum of an expert's dots; 0 for the backbone and after the last expert.
__device__ inline float dots_of(const LogitLevel& level, int64_t row, int gate) {
    if (gate == 0 || gate >= level.gated) return 0;
    const float* dots = level.dots + (row * (level.gated - 1) + gate - 1) * level.chunks;
    float sum = 0;
    for (int chunk = 0; chunk < level.chunks; ++chunk) sum += dots[chunk];
    return sum;
}

// A warp processes a row; then each lane processes one of its gates.
template <class T, class Grad>
__global__ void __launch_bounds__(logit_threads)
    logit_gradient_kernel(const __grid_constant__ Levels<LogitLevel> levels, const __grid_constant__ Units blocks) {
    const int which = blocks.level_of(blockIdx.x);
    const LogitLevel& level = levels.level[which];
    const int64_t row = (blockIdx.x - blocks.first[which]) * rows_per_logit_block + warp();
    if (row >= level.rows) return;

    const float* gates = level.gates + row * level.gated;
    // The first 32 gates are loaded before the rows, so that both arrive together.
    const float own_gate = lane() < level.gated ? gates[lane()] : 0.0f;
    const float own_dots = level.grad_logits ? dots_of(level, row, lane()) : 0.0f;
    const float first_gate = __shfl_sync(whole_warp, own_gate, 0);
    const Dots parts = level.whole ? row_dots<true, T, Grad>(level, row, first_gate)
                                   : row_dots<false, T, Grad>(level, row, first_gate);
    if (!level.grad_logits) return;

    const float with_x = sum_over_lanes(parts.with_x);
    const float with_backbone = level.backbone_dot ? *level.backbone_dot : sum_over_lanes(parts.with_backbone);
    const auto change = [&](int gate, float dots) { return gate == 0 ? with_backbone : with_x + dots; };
    float mean = own_gate * change(lane(), own_dots);
    for (int gate = lane() + warp_size; gate < level.gated; gate += warp_size) {
        mean = fmaf(gates[gate], change(gate, dots_of(level, row, gate)), mean);
    }
    mean = sum_over_lanes(mean);
    const int64_t columns = padded_logits(level.gated);
    float* grad_logits = level.grad_logits + row * columns;
    if (lane() < columns) {
        grad_logits[lane()] = lane() < level.gated ? own_gate * (change(lane(), own_dots) - mean) : 0.0f;
    }
    for (int gate = lane() + warp_size; gate < columns; gate += warp_size) {
        const bool exists = gate < level.gated;
        grad_logits[gate] = exists ? gates[gate] * (change(gate, dots_of(level, row, gate)) - mean) : 0.0f;
    }
}

template <class T>
bool whole_rows(const void* data, int64_t stride, int64_t dim) {
    return rows_allow_loads(static_cast<const T*>(data), stride) && dim % per_load<T> == 0;
}

template <class T>
void gate_of(const GateLevel* from, int count, Stream stream) {
    Levels<GateLevel> levels(from, count);
    for (int i = 0; i < count; ++i) {
        GateLevel& level = levels.level[i];
        level.whole =
            whole_rows<T>(level.x, level.x_stride, level.dim) && whole_rows<T>(level.router, level.dim, level.dim);
    }
    const Units blocks(levels, count, [](const GateLevel& level) { return parts_of(level.rows, rows_per_gate_block); });
    launch("side_moe_gate", gate_kernel<T>, {blocks.all(), gate_threads}, stream, levels, blocks);
}

template <class T, class Grad>
void logit_gradient_of(const LogitLevel* from, int count, Stream stream) {
    Levels<LogitLevel> levels(from, count);
    for (int i = 0; i < count; ++i) {
        LogitLevel& level = levels.level[i];
        // The columns per load are those of x. A wider gradient needs several loads for them.
        level.whole = level.dim % per_load<T> == 0 && whole_rows<Grad>(level.grad, level.grad_stride, level.dim) &&
                      whole_rows<T>(level.x, level.x_stride, level.dim) &&
                      whole_rows<T>(level.backbone, level.backbone_stride, level.dim) &&
                      whole_rows<T>(level.grad_backbone, level.dim, level.dim);
    }
    const Units blocks(levels, count, [](const LogitLevel& level) {
        return parts_of(level.rows, rows_per_logit_block);
    });
    launch(
        "side_moe_logit_gradient", logit_gradient_kernel<T, Grad>, {blocks.all(), logit_threads}, stream, levels, blocks
    );
}

}  // namespace

int64_t count_slices(int64_t rows) { return parts_of(rows, rows_per_slice(rows)); }

void launch_gate(Dtype dtype, const GateLevel* levels, int count, void* stream) {
    const auto on = static_cast<Stream>(stream);
    with_dtype(dtype, [&](auto zero) { gate_of<decltype(zero)>(levels, count, on); });
}

void launch_count(const CountLevel* from, int count, void* stream) {
    const Levels<CountLevel> levels(from, count);
    const Units groups(levels, count, [](const CountLevel& level) {
        return count_slices(level.rows) * parts_of(level.gated, gates_per_warp);
    });
    const Units gates(levels, count, [](const CountLevel& level) { return int64_t{level.gated}; });
    const int64_t wanted = parts_of(std::max(groups.all(), gates.all()), count_threads / warp_size);
    const int64_t blocks = std::min(wanted, max_cooperative_blocks(count_kernel, count_threads, 0));
    launch(
        "side_moe_count", count_kernel, {blocks, count_threads, 0, true}, static_cast<Stream>(stream), levels, groups,
        gates
    );
}

void launch_logit_gradient(Dtype dtype, bool wide_grad, const LogitLevel* levels, int count, void* stream) {
    const auto on = static_cast<Stream>(stream);
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (wide_grad) {
            logit_gradient_of<T, float>(levels, count, on);
        } else {
            logit_gradient_of<T, T>(levels, count, on);
        }
    });
}

}  // namespace xsmoe::side_moe
