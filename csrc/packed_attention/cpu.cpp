// packed_attention on the CPU: unpacks the tensors, and divides the heads of all sequences among threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "cpu/isa_kernels.h"
#include "packed_attention/kernels.h"

namespace xsmoe::packed_attention {

XSMOE_KERNELS_FOR

namespace {

Heads heads(const Tensor& tensor) { return {data(tensor), tensor.stride(0), tensor.stride(1)}; }

Tensor with_dense_heads(const Tensor& tensor) {
    return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

std::vector<int64_t> bounds_of(const Tensor& offsets) {
    std::vector<int64_t> bounds(static_cast<size_t>(offsets.size(0)));
    const int64_t stride = offsets.stride(0);
    for (size_t i = 0; i < bounds.size(); ++i) {
        const int64_t at = static_cast<int64_t>(i) * stride;
        bounds[i] = offsets.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(data(offsets))[at]
                                                             : static_cast<const int64_t*>(data(offsets))[at];
    }
    return bounds;
}

// The arguments in the form that the kernels need, and the objects that own their memory.
struct Arguments {
    Tensor q, k, v;
    std::optional<Tensor> keep;
    std::vector<int64_t> bounds;
    int64_t longest = 0;

    Arguments(
        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets, const std::optional<Tensor>& keep
    )
        : q(with_dense_heads(q)), k(with_dense_heads(k)), v(with_dense_heads(v)), bounds(bounds_of(offsets)) {
        if (keep) this->keep = torch::stable::contiguous(*keep);
        for (int64_t b = 0; b < sequences(); ++b) longest = std::max(longest, length(b));
    }

    int64_t sequences() const { return static_cast<int64_t>(bounds.size()) - 1; }
    int64_t length(int64_t b) const { return bounds[static_cast<size_t>(b) + 1] - bounds[static_cast<size_t>(b)]; }

    Attention attention(int64_t places, double dropout_p) const {
        const auto* kept = keep ? static_cast<const uint8_t*>(data(*keep)) : nullptr;
        const auto keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
        return {q.size(1), q.size(2), heads(q), heads(k), heads(v), bounds.data(), longest, kept, places, keep_scale};
    }

    // Divide units into ranges of about the same work: one for each thread, or fewer if a range would be too little
    // work.
    std::vector<Range> ranges(int64_t products) const {
        const int64_t num_heads = q.size(1);
        std::vector<double> work{0.0};
        for (int64_t b = 0; b < sequences(); ++b) {
            const auto rows = static_cast<double>(length(b)), width = static_cast<double>(q.size(2));
            const double unit = 100.0 + rows * (rows + 16.0) * width * static_cast<double>(products);
            for (int64_t h = 0; h < num_heads; ++h) work.push_back(work.back() + unit);
        }
        const auto units = static_cast<int64_t>(work.size()) - 1;
        const int64_t count = Chunks(units, 1, units == 0 ? 0.0 : work.back() / static_cast<double>(units)).count;
        std::vector<Range> found;
        int64_t first = 0;
        for (int64_t chunk = 1; chunk <= count; ++chunk) {
            const double end = work.back() * static_cast<double>(chunk) / static_cast<double>(count);
            const auto last = std::lower_bound(work.begin(), work.end(), end) - work.begin();
            found.push_back({first, chunk == count ? units : last});
            first = found.back().last;
        }
        return found;
    }

    // Allocate an (M, H, d) result, with zeros in the rows outside of all sequences.
    Tensor result() const {
        const int64_t rows = q.size(0), row_bytes = q.size(1) * q.size(2) * element_size(q);
        const Tensor tensor = empty(q, {rows, q.size(1), q.size(2)}, q.scalar_type());
        if (rows > 0 && row_bytes > 0) {
            char* at = mutable_data_as<char>(tensor);
            std::memset(at, 0, static_cast<size_t>(bounds.front() * row_bytes));
            std::memset(at + bounds.back() * row_bytes, 0, static_cast<size_t>((rows - bounds.back()) * row_bytes));
        }
        return tensor;
    }
};

template <class Call>
void run(
    const Arguments& arguments, const Call& call, int64_t products, int64_t bytes,
    void (*kernel)(const Call&, int64_t, int64_t, void*)
) {
    const std::vector<Range> ranges = arguments.ranges(products);
    const auto count = static_cast<int64_t>(ranges.size());
    const ChunkScratch work(arguments.q, count, bytes);
    for_each_chunk(count, [&](int64_t chunk) {
        const auto [first, last] = ranges[static_cast<size_t>(chunk)];
        kernel(call, first, last, work.of(chunk));
    });
}

Tensor
forward(Tensor q, Tensor k, Tensor v, Tensor offsets, int64_t max_length, std::optional<Tensor> keep, double dropout_p, std::optional<std::vector<int64_t>>) {
    const Kernels& kernels = kernels_for(q.scalar_type());
    const Arguments arguments(q, k, v, offsets, keep);
    const Tensor y = arguments.result();
    const Forward call{arguments.attention(max_length, dropout_p), mutable_data(y)};
    run(arguments, call, 2, kernels.forward_bytes(call), kernels.forward);
    return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor offsets, int64_t max_length, std::optional<Tensor> keep,
    double dropout_p, std::optional<std::vector<int64_t>>, bool need_q, bool need_k, bool need_v
) {
    const Kernels& kernels = kernels_for(q.scalar_type());
    const Arguments arguments(q, k, v, offsets, keep);
    grad = with_dense_heads(grad);
    const auto result = [&](bool need) { return need ? arguments.result() : empty(q, {0}, q.scalar_type()); };
    const Tensor dq = result(need_q), dk = result(need_k), dv = result(need_v);
    const auto wanted = [](bool need, const Tensor& tensor) { return need ? mutable_data(tensor) : nullptr; };
    const Backward call{
        arguments.attention(max_length, dropout_p), heads(grad), wanted(need_q, dq), wanted(need_k, dk),
        wanted(need_v, dv)
    };
    run(arguments, call, 5, kernels.backward_bytes(call), kernels.backward);
    return {dq, dk, dv};
}

}  // namespace
}  // namespace xsmoe::packed_attention

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_native, m) {
    m.def(
        "packed_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, SymInt max_length, Tensor? keep, "
        "float dropout_p, SymInt[]? lengths) -> Tensor"
    );
    m.def(
        "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor offsets, SymInt max_length, "
        "Tensor? keep, float dropout_p, SymInt[]? lengths, bool need_q, bool need_k, bool need_v) -> "
        "(Tensor, Tensor, Tensor)"
    );
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CPU, m) {
    m.impl("packed_attention", TORCH_BOX(&xsmoe::packed_attention::forward));
    m.impl("packed_attention_backward", TORCH_BOX(&xsmoe::packed_attention::backward));
}
