// Kernels that try out the emulation of CUDA; test_emulated_cuda.py compiles this and runs each by its name.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace {

using namespace xsmoe::cuda;

void collectives(int* results) {
    const int self = lane();
    int* mine = results + threadIdx.x * 8;
    mine[0] = __shfl_sync(whole_warp, self, 5);
    mine[1] = __shfl_xor_sync(whole_warp, self, 3);
    mine[2] = __shfl_up_sync(whole_warp, self, 2);
    mine[3] = __shfl_down_sync(whole_warp, self, 2);
    mine[4] = static_cast<int>(__ballot_sync(whole_warp, self % 2));
    mine[5] = static_cast<int>(__match_any_sync(whole_warp, self / 8));
    mine[6] = static_cast<int>(__reduce_max_sync(whole_warp, static_cast<unsigned>(self)));
    mine[7] = static_cast<int>(__reduce_add_sync(whole_warp, static_cast<unsigned>(self)));
}

// Each thread leaves its number, and reads what the next one left.
void neighbours(int* results) {
    int* left = reinterpret_cast<int*>(shared_memory());
    left[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    results[blockIdx.x * blockDim.x + threadIdx.x] = left[(threadIdx.x + 1) % blockDim.x];
}

void without_a_barrier(int* results) {
    int* left = reinterpret_cast<int*>(shared_memory());
    left[threadIdx.x] = static_cast<int>(threadIdx.x);
    results[threadIdx.x] = left[(threadIdx.x + 1) % blockDim.x];
}

void grid(int* left, int* results) {
    if (threadIdx.x == 0) left[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    wait_for_grid();
    int sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += left[block];
    results[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

void copies(const int* from, int* results) {
    int* arrived = reinterpret_cast<int*>(shared_memory()) + 4 * threadIdx.x;
    copy_async(arrived, from + 4 * threadIdx.x, 8);
    commit_copies();
    results[2 * threadIdx.x] = arrived[0];
    wait_for_copies<0>();
    results[2 * threadIdx.x + 1] = arrived[1] + arrived[2];
}

void half_a_warp(int*) {
    if (lane() < 16) __syncwarp();
}

void some_of_a_block(int*) {
    if (threadIdx.x != 3) __syncthreads();
}

void other_collectives(int*) {
    if (lane() < 16) {
        __ballot_sync(whole_warp, 1);
    } else {
        __shfl_sync(whole_warp, 1, 0);
    }
}

void beyond_shared_memory(int* results) { results[0] = shared_memory()[static_cast<int64_t>(blockDim.x) * 4]; }

void rounding(const float* from, float* results) {
    const int i = static_cast<int>(threadIdx.x);
    results[2 * i] = to_float(from_float<BFloat16>(from[i]));
    results[2 * i + 1] = to_float(from_float<Half>(from[i]));
}

}  // namespace

int main(int, char** arguments) {
    const std::string name = arguments[1];
    std::vector<int> results(1024), left(1024);
    int shown = 64;
    const auto plain = [&](void (*kernel)(int*), int64_t blocks, int threads) {
        launch("kernel", kernel, Shape{blocks, threads, 4 * threads}, nullptr, results.data());
    };
    if (name == "collectives") plain(collectives, 1, 64), shown = 512;
    if (name == "neighbours") plain(neighbours, 2, 32);
    if (name == "without_a_barrier") plain(without_a_barrier, 1, 64);
    if (name == "half_a_warp") plain(half_a_warp, 1, 32);
    if (name == "some_of_a_block") plain(some_of_a_block, 1, 64);
    if (name == "other_collectives") plain(other_collectives, 1, 32);
    if (name == "beyond_shared_memory") plain(beyond_shared_memory, 1, 32);
    if (name == "half_a_block") plain(neighbours, 1, 48);
    if (name == "grid") {
        const int64_t blocks = max_cooperative_blocks(grid, 32, 0);
        launch("grid", grid, Shape{blocks, 32, 0, true}, nullptr, left.data(), results.data());
        shown = static_cast<int>(32 * blocks);
    }
    if (name == "too_large_a_grid") {
        launch("grid", grid, Shape{multiprocessors() + 1, 32, 0, true}, nullptr, left.data(), results.data());
    }
    if (name == "grid_alone") launch("grid", grid, Shape{1, 32}, nullptr, left.data(), results.data());
    if (name == "copies") {
        for (size_t i = 0; i < left.size(); ++i) left[i] = static_cast<int>(i);
        const int64_t bytes = 32 * 16;
        launch("copies", copies, Shape{1, 32, bytes}, nullptr, left.data(), results.data());
    }
    if (name == "too_many_blocks") {
        try {
            launch("neighbours", neighbours, Shape{max_blocks + 1, 32}, nullptr, results.data());
        } catch (const std::runtime_error& error) {
            std::puts(error.what());
            return 0;
        }
    }
    if (name == "rounding") {
        std::vector<float> from(32), rounded(64);
        for (size_t i = 0; i < from.size(); ++i) from[i] = std::strtof(arguments[2 + i], nullptr);
        launch("rounding", rounding, Shape{1, 32}, nullptr, from.data(), rounded.data());
        for (float value : rounded) std::printf("%.9g ", value);
        return 0;
    }
    for (int i = 0; i < shown; ++i) std::printf("%d ", results[static_cast<size_t>(i)]);
    return 0;
}
