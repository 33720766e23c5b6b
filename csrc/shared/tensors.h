// Tensors in C++, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace xsmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    const std::vector<int64_t> shape(sizes);
    return torch::stable::new_empty(like, shape, dtype);
}

// Allocate `count` bytes with torch's allocator, so that its profilers see them. The tensor owns the memory.
inline Tensor scratch(const Tensor& like, int64_t count) { return empty(like, {count}, ScalarType::Byte); }

inline int64_t element_size(const Tensor& tensor) { return static_cast<int64_t>(tensor.element_size()); }

// Return the matrix, or a copy, such that each row is contiguous. Rows may be any distance apart.
inline Tensor with_dense_rows(const Tensor& matrix) {
    return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }

inline void* mutable_data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

template <class T>
T* mutable_data_as(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace xsmoe
