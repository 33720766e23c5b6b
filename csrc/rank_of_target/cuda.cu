// Ranks of targets among all items, in float32 on the CUDA cores.
//
// A score is one chain of fused multiply-adds, by ascending index in the row, starting from 0. It has the same bits
// wherever it is computed: for the target alone, in a tile, or again for a seen item. So the tiles count all items, and
// the counts of seen items are subtracted afterwards, exactly.
//
// An item that scores higher than the target adds two points, an equal one adds one. With p points the rank, 1 +
// #higher + ceil(#equal / 2), is 1 + ceil(p / 2). NaN adds no points.

#include "rank_of_target/cuda.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/runtime.h"

namespace xsmoe::rank_of_target {

using namespace cuda;

namespace {

template <class T>
__device__ inline T minimum(T a, T b) {
    return a < b ? a : b;
}

// A block of the product: threads form a square. Each thread has every 16th query and every 16th item of a tile.
constexpr int threads = 256, across = 16;
constexpr int items_each = 8, tile_items = across * items_each;
constexpr int many_each = 8, few_each = 2;
// The numbers of a row that are in shared memory at a time, in chunks of 16 bytes, and the number of stages.
constexpr int chunks = 4, step = 4 * chunks;
constexpr int stages = 3;

template <int queries_each>
constexpr int tile_queries = across * queries_each;
template <int queries_each>
constexpr int stage_chunks = (tile_queries<queries_each> + tile_items) * chunks;
// The blocks per multiprocessor.
constexpr int blocks_each = 2;

// The bits that mark seen items at a time: 16 KB, so that a multiprocessor holds many blocks.
constexpr int64_t max_marks = int64_t{1} << 17;
constexpr int marks_of_16_bytes = 128;
constexpr int rank_threads = 128, own_threads = 64;

// The scratch memory of all slices' points.
constexpr int64_t max_scratch_bytes = int64_t{64} << 20;
// More waves of blocks than this do not balance the last wave any better.
constexpr int64_t max_waves = 8;

// Return the index of a chunk of a row in shared memory. Rows are consecutive. Their chunks are permuted (swizzled), so
// that the same chunk of eight consecutive rows, which a warp reads at once, is spread over all banks.
__device__ inline int place(int row, int chunk) { return row * chunks + (chunk ^ (row / 2 % chunks)); }

// Start asynchronous copies of `step` numbers of each row of a tile, from `from` on. Rows from `rows_there` on, and
// numbers from `numbers_there` on, become zeros.
template <int rows, bool aligned>
__device__ inline void begin_rows(
    float4* to, const float* from, int64_t stride, int rows_there, int numbers_there, int thread
) {
    constexpr int count = rows * chunks;
    XSMOE_UNROLL
    for (int first = 0; first < count; first += threads) {
        const int row = (first + thread) / chunks, chunk = thread % chunks;
        if (count % threads != 0 && first + thread >= count) break;
        const int numbers = row < rows_there && 4 * chunk < numbers_there ? minimum(numbers_there - 4 * chunk, 4) : 0;
        // A copy of zero bytes needs a valid address too.
        const float* source = numbers > 0 ? from + row * stride + 4 * chunk : from;
        float4* target = to + place(row, chunk);
        if constexpr (aligned) {
            copy_async(target, source, 4 * numbers);
        } else {
            for (int i = 0; i < 4; ++i) {
                copy_async_4(reinterpret_cast<float*>(target) + i, i < numbers ? source + i : from, i < numbers);
            }
        }
    }
}

// Add the products of `step` numbers to the scores of this thread's queries and items.
template <int queries_each>
__device__ inline void add_products(
    float (&scores)[queries_each][items_each], const float4* stage, int query, int item
) {
    const float4* items = stage + tile_queries<queries_each> * chunks;
    XSMOE_ROLLED
    for (int chunk = 0; chunk < chunks; ++chunk) {
        float4 left[queries_each];
        XSMOE_UNROLL
        for (int q = 0; q < queries_each; ++q) left[q] = stage[place(query, chunk) + q * across * chunks];
        XSMOE_UNROLL
        for (int i = 0; i < items_each; ++i) {
            const float4 right = items[place(item, chunk) + i * across * chunks];
            XSMOE_UNROLL
            for (int q = 0; q < queries_each; ++q) scores[q][i] = __fmaf_rn(left[q].x, right.x, scores[q][i]);
            XSMOE_UNROLL
            for (int q = 0; q < queries_each; ++q) scores[q][i] = __fmaf_rn(left[q].y, right.y, scores[q][i]);
            XSMOE_UNROLL
            for (int q = 0; q < queries_each; ++q) scores[q][i] = __fmaf_rn(left[q].z, right.z, scores[q][i]);
            XSMOE_UNROLL
            for (int q = 0; q < queries_each; ++q) scores[q][i] = __fmaf_rn(left[q].w, right.w, scores[q][i]);
        }
    }
}

// Return the score of one query and one item, with the same bits as in a tile.
template <bool aligned>
__device__ inline float score(const float* query, const float* item, int64_t dim) {
    float total = 0;
    int64_t k = 0;
    if constexpr (aligned) {
        for (; k + 4 <= dim; k += 4) {
            const float4 left = *reinterpret_cast<const float4*>(query + k);
            const float4 right = *reinterpret_cast<const float4*>(item + k);
            total = __fmaf_rn(left.x, right.x, total);
            total = __fmaf_rn(left.y, right.y, total);
            total = __fmaf_rn(left.z, right.z, total);
            total = __fmaf_rn(left.w, right.w, total);
        }
    }
    for (; k < dim; ++k) total = __fmaf_rn(query[k], item[k], total);
    return total;
}

__device__ inline unsigned points_of(float score, float own) {
    return static_cast<unsigned>(score > own) + static_cast<unsigned>(score >= own);
}

// Return the points that this thread keeps of a tile: the sums over eight threads, for the `items_there` items.
template <int queries_each>
__device__ inline unsigned points_of_tile(
    const float (&scores)[queries_each][items_each], float own, int item, int items_there
) {
    constexpr int words = (queries_each + 3) / 4;
    // A query's 16 points of a thread, and the 128 of eight threads, fit in a byte.
    unsigned packed[words] = {};
    XSMOE_UNROLL
    for (int q = 0; q < queries_each; ++q) {
        const float bound = __shfl_sync(whole_warp, own, lane() / 8 * 8 + q);
        XSMOE_UNROLL
        for (int i = 0; i < items_each; ++i) {
            if (i * across + item < items_there) packed[q / 4] += points_of(scores[q][i], bound) << (8 * (q % 4));
        }
    }
    XSMOE_UNROLL
    for (int word = 0; word < words; ++word) {
        for (int other = 1; other < 8; other *= 2) packed[word] += __shfl_xor_sync(whole_warp, packed[word], other);
    }
    const int kept = lane() % 8;
    return ((kept < 4 ? packed[0] : packed[words - 1]) >> (8 * (kept % 4))) & 0xff;
}

// Compute the targets' scores; NaN for a target that is not an item.
template <bool aligned>
__global__ void own_kernel(Call call) {
    const int64_t query = int64_t{blockIdx.x} * own_threads + threadIdx.x;
    if (query >= call.num_queries) return;
    const int64_t target = call.targets[query];
    const bool exists = target >= 0 && target < call.num_items;
    call.own[query] = exists ? score<aligned>(
                                   call.queries.data + query * call.queries.stride,
                                   call.items.data + target * call.items.stride, call.dim
                               )
                             : bits_to_float(0x7fc00000);
}

// Compute the points of a tile's queries from a slice of the items. The copies of a stage start two stages ahead,
// across tiles.
template <int queries_each, bool aligned>
__global__ void __launch_bounds__(threads, blocks_each) count_kernel(Call call) {
    constexpr int rows = tile_queries<queries_each>;
    auto* shared = reinterpret_cast<float4*>(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    // A warp has four queries by eight items of each 16 by 16 square. Of the eight threads with the same queries,
    // thread q keeps the points of square q.
    const int query = warp() / 2 * 4 + lane() / 8, item = warp() % 2 * 8 + lane() % 8, kept = lane() % 8;
    const int64_t row_blocks = parts_of(call.num_queries, rows), slice = blockIdx.x / row_blocks;
    const int64_t first_query = blockIdx.x % row_blocks * rows;
    const int queries_there = static_cast<int>(minimum<int64_t>(rows, call.num_queries - first_query));
    const int begin = static_cast<int>(slice * call.plan.slice_tiles * tile_items);
    const int end = static_cast<int>(minimum(begin + call.plan.slice_tiles * tile_items, call.num_items));

    const int64_t dim = call.dim;
    int next_item = begin;
    int64_t next_place = 0;
    const auto begin_next = [&](int stage) {
        if (next_item < end && next_place < dim) {
            float4* to = shared + stage * stage_chunks<queries_each>;
            const int numbers = static_cast<int>(minimum<int64_t>(step, dim - next_place));
            const float* queries = call.queries.data + first_query * call.queries.stride + next_place;
            const float* items = call.items.data + next_item * call.items.stride + next_place;
            begin_rows<rows, aligned>(to, queries, call.queries.stride, queries_there, numbers, thread);
            begin_rows<tile_items, aligned>(
                to + rows * chunks, items, call.items.stride, end - next_item, numbers, thread
            );
            next_place += step;
            if (next_place >= dim) {
                next_place = 0;
                next_item += tile_items;
            }
        }
        commit_copies();
    };

    const int row = kept * across + query;
    const bool keeps = kept < queries_each && row < queries_there;
    const float own = keeps ? call.own[first_query + row] : 0;
    unsigned points = 0;
    begin_next(0);
    begin_next(1);
    int stage = 0;
    for (int first = begin; first < end; first += tile_items) {
        float scores[queries_each][items_each] = {};
        for (int64_t k = 0; k < dim; k += step) {
            wait_for_copies<1>();
            __syncthreads();
            begin_next(stage == 0 ? stages - 1 : stage - 1);
            add_products<queries_each>(scores, shared + stage * stage_chunks<queries_each>, query, item);
            stage = stage == stages - 1 ? 0 : stage + 1;
        }
        points += points_of_tile<queries_each>(scores, own, item, end - first);
    }

    __syncthreads();
    auto* halves = reinterpret_cast<unsigned*>(shared);
    if (keeps) halves[warp() % 2 * rows + row] = points;
    __syncthreads();
    if (thread < queries_there) {
        call.points[slice * call.num_queries + first_query + thread] = int64_t{halves[thread]} + halves[rows + thread];
    }
}

__device__ inline int64_t offset(const Lists& lists, int64_t m) {
    if (lists.offsets == nullptr) return 0;
    const int64_t at =
        lists.wide ? static_cast<const int64_t*>(lists.offsets)[m] : static_cast<const int32_t*>(lists.offsets)[m];
    return at < 0 ? 0 : minimum(at, lists.count);
}

// Return the sum over a block in thread 0. The function contains a barrier.
__device__ inline int64_t block_sum(int64_t value, int64_t* of_warps) {
    for (int other = warp_size / 2; other > 0; other /= 2) value += __shfl_xor_sync(whole_warp, value, other);
    if (lane() == 0) of_warps[warp()] = value;
    __syncthreads();
    int64_t sum = 0;
    for (int i = 0; i < rank_threads / warp_size; ++i) sum += of_warps[i];
    return sum;
}

// Compute a query's rank: its points of all slices, minus those of its seen items. If an item is listed twice, the
// first thread that marks it subtracts its points. Marks are bits, for one window of items at a time.
template <bool aligned>
__global__ void rank_kernel(Call call, int64_t window) {
    auto* marks = reinterpret_cast<unsigned*>(shared_memory());
    const int64_t query = blockIdx.x, target = call.targets[query];
    const int64_t begin = offset(call.seen, query), end = offset(call.seen, query + 1);
    const float* row = call.queries.data + query * call.queries.stride;
    const float own = call.own[query];
    int64_t points = 0, hidden = 0;
    for (int64_t slice = threadIdx.x; slice < call.plan.slices; slice += rank_threads) {
        points += call.points[slice * call.num_queries + query];
    }
    for (int64_t first = 0; begin < end && first < call.num_items; first += window) {
        const int64_t count = minimum(window, call.num_items - first);
        for (int64_t i = threadIdx.x; i < parts_of(count, marks_of_16_bytes); i += rank_threads) {
            reinterpret_cast<uint4*>(marks)[i] = make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
        for (int64_t i = begin + threadIdx.x; i < end; i += rank_threads) {
            const int64_t item = call.seen.values[i * call.seen.stride], bit = item - first;
            if (bit < 0 || bit >= count || item == target) continue;
            const unsigned mark = 1u << (bit % 32);
            if (atomicOr(&marks[bit / 32], mark) & mark) continue;
            points -= points_of(score<aligned>(row, call.items.data + item * call.items.stride, call.dim), own);
            ++hidden;
        }
        __syncthreads();
    }
    auto* of_warps = reinterpret_cast<int64_t*>(marks);
    points = block_sum(points, of_warps);
    hidden = block_sum(hidden, of_warps + rank_threads / warp_size);
    if (threadIdx.x != 0) return;
    // The target is equal to itself. If its score is not finite, all other unseen items rank before it.
    call.ranks[query] = own - own == 0 ? 1 + points / 2 : call.num_items - hidden;
}

template <int queries_each, bool aligned>
void count(const Call& call, Stream stream) {
    const int64_t row_blocks = parts_of(call.num_queries, tile_queries<queries_each>);
    constexpr int64_t shared_bytes = int64_t{16} * stages * stage_chunks<queries_each>;
    static_assert(shared_bytes <= max_shared_bytes);
    launch(
        "rank_of_target's count_kernel", count_kernel<queries_each, aligned>,
        {row_blocks * call.plan.slices, threads, shared_bytes}, stream, call
    );
}

template <bool aligned>
void rank_rows(const Call& call, Stream stream) {
    launch(
        "rank_of_target's own_kernel", own_kernel<aligned>, {parts_of(call.num_queries, own_threads), own_threads},
        stream, call
    );
    if (call.plan.few) {
        count<few_each, aligned>(call, stream);
    } else {
        count<many_each, aligned>(call, stream);
    }
    const int64_t window = std::min(max_marks, parts_of(call.num_items, marks_of_16_bytes) * marks_of_16_bytes);
    const int64_t of_warps = 2 * (rank_threads / warp_size) * int64_t{sizeof(int64_t)};
    launch(
        "rank_of_target's rank_kernel", rank_kernel<aligned>,
        {call.num_queries, rank_threads, std::max(window / 8, of_warps)}, stream, call, window
    );
}

}  // namespace

Plan plan(int64_t num_queries, int64_t num_items) {
    const bool few = num_queries <= tile_queries<few_each>;
    const int64_t row_blocks = parts_of(num_queries, few ? tile_queries<few_each> : tile_queries<many_each>);
    const int64_t at_once = int64_t{multiprocessors()} * blocks_each;
    const int64_t tiles = parts_of(num_items, tile_items);
    const int64_t most = std::min(
        tiles, std::max<int64_t>(1, max_scratch_bytes / int64_t{sizeof(int64_t)} / std::max<int64_t>(num_queries, 1))
    );
    // Choose the slices whose waves of blocks end first. Starting and ending a slice takes a block about as long as a
    // tile.
    Plan best{few, 1, tiles};
    int64_t least = parts_of(row_blocks, at_once) * (tiles + 1);
    for (int64_t waves = 1; waves <= max_waves; ++waves) {
        const int64_t slice_tiles = parts_of(tiles, std::clamp<int64_t>(waves * at_once / row_blocks, 1, most));
        const int64_t slices = parts_of(tiles, slice_tiles);
        const int64_t time = parts_of(row_blocks * slices, at_once) * (slice_tiles + 1);
        if (time < least) {
            best = {few, slices, slice_tiles};
            least = time;
        }
    }
    return best;
}

void rank(const Call& call, void* handle) {
    const auto stream = static_cast<Stream>(handle);
    const bool aligned = rows_allow_loads(call.queries.data, call.queries.stride) &&
                         rows_allow_loads(call.items.data, call.items.stride);
    if (aligned) {
        rank_rows<true>(call, stream);
    } else {
        rank_rows<false>(call, stream);
    }
}

}  // namespace xsmoe::rank_of_target
