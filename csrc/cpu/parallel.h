// Work divided into chunks for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace xsmoe {

// Run body(chunk) for every chunk, with at most one of torch's threads per chunk. Inside another parallel region the
// chunks run one after the other. The body must not throw.
template <class Body>
void for_each_chunk(int64_t chunks, const Body& body) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) body(chunk);
    });
}

struct Range {
    int64_t first, last;
};

// Rows divided into one chunk for each thread, or fewer where a chunk would be too little work for a thread. The
// results of a kernel depend on this division, and therefore on the number of threads, but otherwise only on its
// inputs.
class Chunks {
public:
    // `row_cost` is the work of a row in floating-point operations. Every chunk but the last consists of whole blocks.
    Chunks(int64_t rows, int64_t block, double row_cost)
        : Chunks(rows, block, row_cost, int64_t{torch::stable::get_num_threads()}) {}

    Chunks(int64_t rows, int64_t block, double row_cost, int64_t most)
        : rows_(rows), block_(block), blocks_((rows + block - 1) / block) {
        const double paying = std::min(static_cast<double>(rows) * row_cost / min_cost, 1e6);
        count = std::max<int64_t>(1, std::min({most, blocks_, static_cast<int64_t>(paying)}));
    }

    Range operator[](int64_t chunk) const {
        return {
            std::min(rows_, blocks_ * chunk / count * block_), std::min(rows_, blocks_ * (chunk + 1) / count * block_)
        };
    }

    int64_t count;

private:
    static constexpr double min_cost = 1e6;  // about ten microseconds

    int64_t rows_, block_, blocks_;
};

}  // namespace xsmoe
