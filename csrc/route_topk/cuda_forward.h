// The routing kernel. The warps of a few blocks divide the rows, choose the experts of their rows, and count them. Then
// all blocks wait for each other, and each warp writes its choices after those of the warps before it.
#pragma once

#include "cuda/launch.h"
#include "route_topk/cuda.h"
#include "route_topk/cuda_rows.h"

namespace xsmoe::cuda::route_topk {

constexpr int max_warps = 16;
constexpr int max_threads = max_warps * warp_size;
// The largest number of slices into which all blocks' counts of an expert are divided.
constexpr int max_slices = 16;
// The number of a slice's counts that are loaded together.
constexpr int batch = 8;

// The layout of forward's shared memory.
struct Plan {
    int warps, slices;
    int64_t staged;  // choices that a warp keeps in shared memory at once
    int64_t counts, begins, keys, places, bytes;

    __host__ __device__ Plan(int warps, int rows, int experts, int chosen)
        : warps(warps), staged(int64_t{rows} * chosen) {
        const int slices_that_fit = warps * warp_size / experts;
        slices = slices_that_fit < 1 ? 1 : slices_that_fit < max_slices ? slices_that_fit : max_slices;
        // The first region holds 64-bit sums of chunks of experts.
        counts = warp_size * 8;
        keys = begins = up(counts + int64_t{4} * warps * experts);
        // The staged choices are no longer needed when the experts' offsets are computed.
        places = up(keys + 4 * warps * staged);
        const int64_t end = up(places + 2 * warps * staged), other_end = begins + int64_t{16} * slices * experts;
        bytes = end > other_end ? end : other_end;
    }

    static __host__ __device__ int64_t up(int64_t bytes) { return (bytes + 15) / 16 * 16; }
};

// A warp's rows: some of the groups of rows that are routed together, after those of the warps before it.
struct Part {
    int64_t first, last;

    __device__ Part(int64_t rows, int rows_at_once, int warps) {
        const int64_t groups = parts_of(rows, rows_at_once), all = int64_t{gridDim.x} * warps;
        const int64_t own = int64_t{blockIdx.x} * warps + warp();
        first = groups * own / all;
        last = groups * (own + 1) / all;
    }
};

template <class Row>
__device__ inline void load_group(Row& row, const Forward& call, int64_t group, bool whole) {
    const int64_t own = group * Row::rows + Row::row();
    const auto* logits = static_cast<const typename Row::Value*>(call.logits) + own * call.logits_stride;
    row.load(logits, own < call.rows ? static_cast<int>(call.experts) : 0, whole);
}

// Replace a row's staged keys by its gates.
template <class Row>
__device__ inline void normalize_gates(uint32_t* keys, int chosen, float total, bool renormalize) {
    using T = typename Row::Value;
    const float largest = logit_of_key<T>(keys[0]);
    __syncwarp();
    float sum = 0;
    XSMOE_ROLLED
    for (int j = Row::lane_of_row(); j < chosen; j += Row::lanes) {
        const float weight = expf(logit_of_key<T>(keys[j]) - largest);
        keys[j] = float_to_bits(weight);
        sum += weight;
    }
    sum = sum_of_row<Row::lanes>(sum);
    const float share = 1.0f / (renormalize ? sum : total);
    XSMOE_ROLLED
    for (int j = Row::lane_of_row(); j < chosen; j += Row::lanes) {
        keys[j] = float_to_bits(bits_to_float(keys[j]) * share);
    }
}

// Choose the experts of a warp's rows, and count them.
template <class Row>
__device__ void choose(
    const Forward& call, const Part& part, uint32_t* keys, uint16_t* places, int* counts, bool whole
) {
    using T = typename Row::Value;
    const int experts = static_cast<int>(call.experts), chosen = static_cast<int>(call.chosen);
    uint32_t* row_keys = keys + Row::row() * chosen;
    uint16_t* row_places = places + Row::row() * chosen;
    Row loaded{};
    // Rows are loaded while the previous ones are routed.
    XSMOE_ROLLED
    for (int64_t next = part.first; next <= part.last; ++next) {
        const int64_t first_row = (next - 1) * Row::rows;
        const int rows = call.rows - first_row < Row::rows ? static_cast<int>(call.rows - first_row) : Row::rows;
        uint32_t left[Row::values];
        XSMOE_UNROLL
        for (int v = 0; v < Row::values; ++v) {
            const int column = Row::column(v);
            left[v] = column < experts && Row::row() < rows ? key_of<T>(loaded[v], column) : taken;
        }
        if (next < part.last) load_group(loaded, call, next, whole);
        if (next == part.first) continue;
        float total = 0;
        if (!call.renormalize) {
            uint32_t most = left[0];
            XSMOE_UNROLL
            for (int v = 1; v < Row::values; ++v) most = left[v] > most ? left[v] : most;
            const float largest = logit_of_key<T>(max_of_row<Row::lanes>(most));
            XSMOE_UNROLL
            for (int v = 0; v < Row::values; ++v) {
                total += left[v] == taken ? 0.0f : expf(logit_of_key<T>(left[v]) - largest);
            }
            total = sum_of_row<Row::lanes>(total);
        }
        XSMOE_ROLLED
        for (int j = 0; j < chosen; ++j) {
            int column;
            const uint32_t best = take_best<Row>(left, column);
            if (Row::lane_of_row() == 0) {
                row_keys[j] = best;
                row_places[j] = static_cast<uint16_t>(column);
            }
        }
        __syncwarp();
        normalize_gates<Row>(row_keys, chosen, total, call.renormalize);
        __syncwarp();
        T* gates_to = static_cast<T*>(call.gates) + first_row * chosen;
        int64_t* places_to = call.places + first_row * chosen;
        XSMOE_ROLLED
        for (int i = lane(); i < rows * chosen; i += warp_size) {
            gates_to[i] = from_float<T>(bits_to_float(keys[i]));
            places_to[i] = places[i];
            atomicAdd(counts + places[i], 1);
        }
        __syncwarp();
    }
}

// Replace counts (warps, experts) by the exclusive prefix sum over warps, and return the total of an expert.
__device__ inline int count_before(int* counts, int warps, int experts) {
    int own[max_warps], before = 0;
    XSMOE_UNROLL
    for (int w = 0; w < max_warps; ++w) own[w] = w < warps ? counts[w * experts] : 0;
    XSMOE_UNROLL
    for (int w = 0; w < max_warps; ++w) {
        if (w < warps) counts[w * experts] = before;
        before += own[w];
    }
    return before;
}

// Compute the first index of this block's choices of each expert in the order of all: begins (experts,). The memory of
// `begins` has space for two (slices, experts) arrays.
__device__ void find_begins(const Forward& call, const Plan& plan, int64_t* begins, int64_t* chunk_sums) {
    const int experts = static_cast<int>(call.experts), threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
    const auto block = static_cast<int>(blockIdx.x);
    int64_t* befores = begins + plan.slices * experts;
    XSMOE_ROLLED
    for (int i = thread; i < plan.slices * experts; i += threads) {
        int64_t total = 0, before = 0;
        XSMOE_ROLLED
        for (int first = i / experts; first < blocks; first += batch * plan.slices) {
            int counts[batch];
            XSMOE_UNROLL
            for (int b = 0; b < batch; ++b) {
                const int other = first + b * plan.slices;
                counts[b] = other < blocks ? call.counts[int64_t{other} * experts + i % experts] : 0;
            }
            XSMOE_UNROLL
            for (int b = 0; b < batch; ++b) {
                total += counts[b];
                before += first + b * plan.slices < block ? counts[b] : 0;
            }
        }
        begins[i] = total;
        befores[i] = before;
    }
    __syncthreads();
    const int chunks = (experts + warp_size - 1) / warp_size;
    XSMOE_ROLLED
    for (int chunk = warp(); chunk < chunks; chunk += plan.warps) {
        const int expert = chunk * warp_size + lane();
        int64_t total = 0, before = 0;
        if (expert < experts) {
            XSMOE_UNROLL
            for (int slice = 0; slice < max_slices; ++slice) {
                if (slice < plan.slices) {
                    total += begins[slice * experts + expert];
                    before += befores[slice * experts + expert];
                }
            }
        }
        int64_t until = total;
        XSMOE_UNROLL
        for (int distance = 1; distance < warp_size; distance *= 2) {
            const int64_t others = __shfl_up_sync(whole_warp, until, static_cast<unsigned>(distance));
            if (lane() >= distance) until += others;
        }
        if (expert < experts) {
            begins[expert] = until - total;
            befores[expert] = before;
        }
        if (lane() == warp_size - 1) chunk_sums[chunk] = until;
    }
    __syncthreads();
    XSMOE_ROLLED
    for (int expert = thread; expert < experts; expert += threads) {
        int64_t begin = begins[expert];
        XSMOE_ROLLED
        for (int chunk = 0; chunk < expert / warp_size; ++chunk) begin += chunk_sums[chunk];
        if (block == 0) call.offsets[expert] = begin;
        begins[expert] = begin + befores[expert];
    }
    if (block == 0 && thread == 0) call.offsets[experts] = call.rows * call.chosen;
    __syncthreads();
}

// Write the choices [first, last) after the earlier choices of the same expert, whose numbers are counts (experts,).
__device__ inline void sort(const Forward& call, int64_t first, int64_t last, const int64_t* begins, int* counts) {
    const auto chosen_at = [&](int64_t at) { return at < last ? static_cast<int>(call.places[at]) : -1; };
    int next = chosen_at(first + lane());
    XSMOE_ROLLED
    for (int64_t step = first; step < last; step += warp_size) {
        const int64_t at = step + lane();
        const int expert = next;
        next = chosen_at(at + warp_size);
        const unsigned same = __match_any_sync(whole_warp, expert);
        const int rank = __popc(same & ((1u << lane()) - 1));
        const int before = expert < 0 ? 0 : counts[expert];
        __syncwarp();
        if (expert >= 0) {
            if (rank == 0) counts[expert] = before + __popc(same);
            call.order[begins[expert] + before + rank] = at;
        }
        __syncwarp();
    }
}

// A multiprocessor holds one block. With fewer registers it would not hold two.
template <class Row>
__global__ void __launch_bounds__(max_threads, 1) route_kernel(Forward call, bool whole) {
    const int experts = static_cast<int>(call.experts), thread = static_cast<int>(threadIdx.x);
    const auto threads = static_cast<int>(blockDim.x);
    const Plan plan(threads / warp_size, Row::rows, experts, static_cast<int>(call.chosen));
    unsigned char* shared = shared_memory();
    auto* counts = reinterpret_cast<int*>(shared + plan.counts);
    auto* begins = reinterpret_cast<int64_t*>(shared + plan.begins);
    auto* keys = reinterpret_cast<uint32_t*>(shared + plan.keys) + warp() * plan.staged;
    auto* places = reinterpret_cast<uint16_t*>(shared + plan.places) + warp() * plan.staged;
    XSMOE_ROLLED
    for (int i = thread; i < plan.warps * experts; i += threads) counts[i] = 0;
    __syncthreads();

    const Part part(call.rows, Row::rows, plan.warps);
    choose<Row>(call, part, keys, places, counts + warp() * experts, whole);
    __syncthreads();
    XSMOE_ROLLED
    for (int expert = thread; expert < experts; expert += threads) {
        call.counts[int64_t{blockIdx.x} * experts + expert] = count_before(counts + expert, plan.warps, experts);
    }
    if (gridDim.x > 1) {
        wait_for_grid();
    } else {
        __syncthreads();
    }

    find_begins(call, plan, begins, reinterpret_cast<int64_t*>(shared));
    const int64_t last_row = part.last * Row::rows < call.rows ? part.last * Row::rows : call.rows;
    sort(call, part.first * Row::rows * call.chosen, last_row * call.chosen, begins, counts + warp() * experts);
}

}  // namespace xsmoe::cuda::route_topk
