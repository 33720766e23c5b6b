// The weights of a call in the layouts of its products. Frozen experts' weights may be prepacked; the others are packed
// in the call.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "side_moe/kernels.h"

namespace xsmoe::side_moe {

// The layout in which a product reads a contiguous matrix: (inner, columns) with these strides.
struct Shape {
    int64_t inner, columns, inner_stride, column_stride;
};

inline bool reads_down(int part) { return part == down_columns || part == down_rows; }

// Return the layout of an expert's weights (R, D) for a part.
inline Shape shape_of(int part, Sizes sizes) {
    if (part == down_columns || part == up_columns) return {sizes.dim, sizes.rank, 1, sizes.dim};
    return {sizes.rank, sizes.dim, sizes.dim, 1};
}

inline int64_t packed_bytes(const Kernels& kernels, Shape shape) {
    return (kernels.packed_bytes(shape.inner, shape.columns) + 63) / 64 * 64;
}

// Return the bytes of one frozen expert: all parts, one after the other.
inline int64_t packed_bytes(const Kernels& kernels, Sizes sizes) {
    int64_t bytes = 0;
    for (int part = 0; part < parts; ++part) bytes += packed_bytes(kernels, shape_of(part, sizes));
    return bytes;
}

// A list of matrices to pack into one block of memory.
class Packing {
public:
    explicit Packing(const Kernels& kernels) : kernels_(kernels) {}

    // After the call of run(), `*to` points to the packed matrix.
    void add(const void* from, Shape shape, const void** to) {
        if (shape.inner == 0 || shape.columns == 0) return;  // no product reads it
        jobs_.push_back({from, shape, to, bytes_});
        bytes_ += packed_bytes(kernels_, shape);
        cost_ += 8.0 * static_cast<double>(shape.inner * shape.columns);
    }

    int64_t bytes() const { return bytes_; }

    void run(char* memory) {
        if (jobs_.empty()) return;
        const auto count = static_cast<int64_t>(jobs_.size());
        const Chunks chunks(count, 1, cost_ / static_cast<double>(count));
        for_each_chunk(chunks.count, [&](int64_t chunk) {
            for (int64_t j = chunks[chunk].first; j < chunks[chunk].last; ++j) {
                const Job& job = jobs_[static_cast<size_t>(j)];
                const Shape s = job.shape;
                kernels_.pack(job.from, s.inner, s.columns, s.inner_stride, s.column_stride, memory + job.offset);
                *job.to = memory + job.offset;
            }
        });
    }

private:
    struct Job {
        const void* from;
        Shape shape;
        const void** to;
        int64_t offset;
    };

    const Kernels& kernels_;
    std::vector<Job> jobs_;
    int64_t bytes_ = 0;
    double cost_ = 0;
};

// All experts of a level, the frozen ones first, and its router.
class Weights {
public:
    Weights(
        const Kernels& kernels, const Tensor& router, const Tensor& down, const Tensor& up,
        const std::optional<Tensor>& frozen_down, const std::optional<Tensor>& frozen_up,
        const std::optional<Tensor>& frozen_pack
    )
        : kernels_(kernels), packing_(kernels), router_(torch::stable::contiguous(router)) {
        const int64_t frozen = frozen_down ? frozen_down->size(0) : 0;
        sizes = {router.size(1), router.size(0) - 1, down.size(1)};
        experts.resize(static_cast<size_t>(sizes.experts));
        sources_.resize(experts.size());
        if (frozen > 0 && frozen_pack) {
            use_prepacked(*frozen_pack, frozen);
        } else if (frozen > 0) {
            set_sources(*frozen_down, *frozen_up, 0);
        }
        set_sources(down, up, frozen);
    }

    // Request this part of all experts, or of the experts from `first` on.
    void request(Part part, int64_t first = 0) {
        for (size_t e = static_cast<size_t>(std::max(first, packed_)); e < experts.size(); ++e) {
            const void* from = reads_down(part) ? sources_[e].down : sources_[e].up;
            packing_.add(from, shape_of(part, sizes), &experts[e].part[part]);
        }
    }

    // Request the router as (D, E+1), to multiply x, or as (E+1, D), to multiply gradients of logits.
    void request_router(bool by_columns) {
        const int64_t gated = sizes.experts + 1;
        const Shape columns{sizes.dim, gated, 1, sizes.dim}, rows{gated, sizes.dim, sizes.dim, 1};
        packing_.add(data(router_), by_columns ? columns : rows, &router);
    }

    // Return the router as it is, (E+1, D).
    const void* router_rows() const { return data(router_); }

    // Pack everything that is requested and not prepacked.
    void pack() {
        memory_.emplace(scratch(router_, packing_.bytes()));
        packing_.run(mutable_data_as<char>(*memory_));
    }

    Sizes sizes{};
    std::vector<PackedExpert> experts;
    const void* router = nullptr;

private:
    struct Source {
        const void* down;
        const void* up;
    };

    void use_prepacked(const Tensor& pack, int64_t frozen) {
        const int64_t bytes = frozen * packed_bytes(kernels_, sizes);
        if (pack.numel() * element_size(pack) != bytes) {
            throw std::invalid_argument(
                "frozen_pack has " + std::to_string(pack.numel()) + " elements, but the " + std::to_string(frozen) +
                " frozen experts need " + std::to_string(bytes) + " bytes; it was packed for others"
            );
        }
        const char* at = static_cast<const char*>(data(pack));
        for (int64_t e = 0; e < frozen; ++e) {
            for (int part = 0; part < parts; ++part) {
                experts[static_cast<size_t>(e)].part[part] = at;
                at += packed_bytes(kernels_, shape_of(part, sizes));
            }
        }
        packed_ = frozen;
    }

    void set_sources(const Tensor& down, const Tensor& up, int64_t first) {
        held_.push_back(torch::stable::contiguous(down));
        const char* from_down = static_cast<const char*>(data(held_.back()));
        held_.push_back(torch::stable::contiguous(up));
        const char* from_up = static_cast<const char*>(data(held_.back()));
        const int64_t bytes = sizes.rank * sizes.dim * element_size(down);
        for (int64_t e = 0; e < down.size(0); ++e) {
            sources_[static_cast<size_t>(first + e)] = {from_down + e * bytes, from_up + e * bytes};
        }
    }

    const Kernels& kernels_;
    Packing packing_;
    Tensor router_;
    std::vector<Tensor> held_;
    std::vector<Source> sources_;
    std::optional<Tensor> memory_;
    int64_t packed_ = 0;
};

}  // namespace xsmoe::side_moe
