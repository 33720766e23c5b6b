// grouped_mm on the CPU: unpacks the tensors, and divides rows and gradients among threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "cpu/isa_kernels.h"
#include "grouped_mm/kernels.h"

namespace xsmoe::grouped_mm {

XSMOE_KERNELS_FOR

namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Group {
    int64_t expert, first, last;

    int64_t rows() const { return last - first; }
};

// The groups that have rows, and the rows outside of all groups: [0, first) and [last, all).
struct Groups {
    explicit Groups(const Tensor& offsets) {
        const int64_t experts = offsets.size(0) - 1;
        first = bound(offsets, 0);
        last = bound(offsets, experts);
        for (int64_t e = 0; e < experts; ++e) {
            const Group group{e, bound(offsets, e), bound(offsets, e + 1)};
            if (group.rows() > 0) filled.push_back(group);
        }
    }

    std::vector<Group> filled;
    int64_t first, last;

private:
    static int64_t bound(const Tensor& offsets, int64_t i) {
        const int64_t at = i * offsets.stride(0);
        if (offsets.scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(data(offsets))[at];
        return static_cast<const int64_t*>(data(offsets))[at];
    }
};

void clear(char* at, int64_t bytes) {
    if (bytes == 0) return;
    const Chunks chunks(bytes, 4096, 10.0);
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto [first, last] = chunks[chunk];
        std::memset(at + first, 0, static_cast<size_t>(last - first));
    });
}

// Multiply the rows of x by the weights of their groups; the other rows become zeros. Threads divide blocks of rows,
// independently of the groups.
Tensor multiply(
    const Kernels& kernels, const Tensor& x, const Tensor& weight, int inner_dim, int column_dim, const Groups& groups
) {
    const int64_t inner = weight.size(inner_dim), columns = weight.size(column_dim), size = element_size(x);
    const Tensor y = empty(x, {x.size(0), columns}, x.scalar_type());
    char* out = mutable_data_as<char>(y);
    if (inner == 0 || groups.filled.empty()) {
        clear(out, x.size(0) * columns * size);
        return y;
    }
    clear(out, groups.first * columns * size);
    clear(out + groups.last * columns * size, (x.size(0) - groups.last) * columns * size);

    std::vector<int64_t> ends;  // cumulative number of blocks
    int64_t blocks = 0, max_rows = 0;
    for (const Group& group : groups.filled) {
        ends.push_back(blocks += ceil_divide(group.rows(), kernels.block_rows));
        max_rows = std::max(max_rows, group.rows());
    }
    const Product call{inner, columns, data(x), x.stride(0), weight.stride(inner_dim), weight.stride(column_dim), out};
    const Chunks chunks(blocks, 1, 2.0 * static_cast<double>(kernels.block_rows * inner * columns));
    const ChunkScratch work(x, chunks.count, kernels.product_bytes(call, max_rows));
    const char* weights = static_cast<const char*>(data(weight));
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto [first, last] = chunks[chunk];
        auto g = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), first) - ends.begin());
        for (int64_t block = first; block < last; block = ends[g], ++g) {
            const Group& group = groups.filled[g];
            const int64_t begin = ends[g] - ceil_divide(group.rows(), kernels.block_rows);
            const int64_t end = std::min(last, ends[g]);
            kernels.product(
                call, weights + group.expert * weight.stride(0) * size,
                group.first + (block - begin) * kernels.block_rows,
                std::min(group.last, group.first + (end - begin) * kernels.block_rows),
                group.rows() <= kernels.few_rows, work.of(chunk)
            );
        }
    });
    return y;
}

// A cell of the gradient of a group's weight.
struct Job {
    Group group;
    Cell cell;

    double cost() const { return 2.0 * static_cast<double>(group.rows() * cell.height * cell.width); }
};

// Divide the gradients of (inner, columns) weights into enough cells for all threads.
std::vector<Job> cut(const Kernels& kernels, const std::vector<Group>& groups, int64_t inner, int64_t columns) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t enough = threads > 1 ? ceil_divide(4 * threads, static_cast<int64_t>(groups.size())) : 1;
    constexpr int64_t most = 256, least = 64;
    int64_t across = ceil_divide(columns, most), down = ceil_divide(inner, most);
    while (across * down < enough) {
        const int64_t width = columns / across, height = inner / down;
        if (std::max(width, height) < 2 * least) break;
        ++(width > height ? across : down);
    }
    const int64_t height = ceil_divide(ceil_divide(inner, down), kernels.block_rows) * kernels.block_rows;
    const int64_t width = ceil_divide(ceil_divide(columns, across), kernels.panel) * kernels.panel;
    std::vector<Job> jobs;
    for (const Group& group : groups) {
        for (int64_t row = 0; row < inner; row += height) {
            for (int64_t column = 0; column < columns; column += width) {
                const Cell cell{row, std::min(height, inner - row), column, std::min(width, columns - column)};
                jobs.push_back({group, cell});
            }
        }
    }
    return jobs;
}

// Return the gradient of the weight, with zeros for frozen experts and for experts without rows.
Tensor gradient(
    const Kernels& kernels, const Tensor& grad, const Tensor& x, const Tensor& weight, const Groups& groups,
    int64_t num_frozen
) {
    const int64_t inner = weight.size(1), columns = weight.size(2);
    const Tensor result = empty(weight, {weight.size(0), inner, columns}, weight.scalar_type());
    char* out = mutable_data_as<char>(result);
    const int64_t expert_bytes = inner * columns * element_size(weight);
    std::vector<Group> trained;
    int64_t next = 0;
    for (const Group& group : groups.filled) {
        if (group.expert < num_frozen) continue;
        clear(out + next * expert_bytes, (group.expert - next) * expert_bytes);
        next = group.expert + 1;
        trained.push_back(group);
    }
    clear(out + next * expert_bytes, (weight.size(0) - next) * expert_bytes);

    if (trained.empty() || expert_bytes == 0) return result;
    const std::vector<Job> jobs = cut(kernels, trained, inner, columns);
    double cost = 0;
    for (const Job& job : jobs) cost += job.cost();
    const auto count = static_cast<int64_t>(jobs.size());
    const Chunks chunks(count, 1, cost / static_cast<double>(count));
    // A thread computes the cells whose middle is in its part of the work.
    std::vector<size_t> begins(static_cast<size_t>(chunks.count + 1), jobs.size());
    double passed = 0;
    for (size_t i = jobs.size(); i-- > 0;) {
        const double middle = cost - passed - jobs[i].cost() / 2;
        passed += jobs[i].cost();
        const auto chunk = std::clamp<int64_t>(
            static_cast<int64_t>(middle / cost * static_cast<double>(chunks.count)), 0, chunks.count - 1
        );
        for (int64_t c = 0; c <= chunk; ++c) begins[static_cast<size_t>(c)] = i;
    }

    const Gradient call{columns, data(x), x.stride(0), data(grad), grad.stride(0)};
    const Cell& largest = jobs.front().cell;
    const ChunkScratch work(x, chunks.count, kernels.gradient_bytes(largest.height, largest.width));
    for_each_chunk(chunks.count, [&](int64_t chunk) {
        const auto at = static_cast<size_t>(chunk);
        for (size_t i = begins[at]; i < begins[at + 1]; ++i) {
            const auto& [group, cell] = jobs[i];
            kernels.gradient(call, cell, group.first, group.last, work.of(chunk), out + group.expert * expert_bytes);
        }
    });
    return result;
}

Tensor forward(Tensor x, Tensor weight, Tensor offsets, int64_t) {
    return multiply(kernels_for(x.scalar_type()), with_dense_rows(x), weight, 1, 2, Groups(offsets));
}

std::tuple<Tensor, Tensor> backward(
    Tensor grad, Tensor x, Tensor weight, Tensor offsets, int64_t num_frozen, bool need_x, bool need_weight
) {
    const Kernels& kernels = kernels_for(x.scalar_type());
    const Groups groups(offsets);
    grad = with_dense_rows(grad);
    const Tensor grad_x = need_x ? multiply(kernels, grad, weight, 2, 1, groups) : empty(x, {0}, x.scalar_type());
    if (!need_weight) return {grad_x, empty(weight, {0}, weight.scalar_type())};
    return {grad_x, gradient(kernels, grad, with_dense_rows(x), weight, groups, num_frozen)};
}

}  // namespace
}  // namespace xsmoe::grouped_mm

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_native, m) {
    m.def("grouped_mm(Tensor x, Tensor weight, Tensor offsets, SymInt num_frozen) -> Tensor");
    m.def(
        "grouped_mm_backward(Tensor grad, Tensor x, Tensor weight, Tensor offsets, SymInt num_frozen, bool need_x, "
        "bool need_weight) -> (Tensor, Tensor)"
    );
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CPU, m) {
    m.impl("grouped_mm", TORCH_BOX(&xsmoe::grouped_mm::forward));
    m.impl("grouped_mm_backward", TORCH_BOX(&xsmoe::grouped_mm::backward));
}
