// Rows of a tensor as the left operand (lhs) of a product.
#pragma once

#include "cpu/arena.h"
#include "cpu/product.h"

namespace xsmoe::XSMOE_ISA {
namespace {

// Products read the rows in place where they can. Otherwise the rows are copied, and padded with zeros to a multiple of
// columns.
template <class T, class Value = typename Operand<T>::Value>
struct LhsRows {
    int64_t columns, padded;
    bool in_place;
    Value* copy = nullptr;

    LhsRows(int64_t columns, int64_t multiple)
        : columns(columns),
          padded(round_up(columns, multiple)),
          in_place(sizeof(T) == sizeof(Value) && columns == padded) {}

    // Allocate the copy of so many rows, if there is a copy.
    void allocate(Arena& arena, int64_t rows) {
        if (!in_place) copy = arena.allocate<Value>(rows * padded);
    }

    Lhs<Value> of(const T* from, int64_t stride, int64_t rows) const {
        if (in_place) return {reinterpret_cast<const Value*>(from), stride};
        for (int64_t row = 0; row < rows; ++row) {
            const T* source = from + row * stride;
            Value* to = copy + row * padded;
            for (int64_t column = 0; column < padded; column += lanes) {
                const Vec value = column < columns ? load(source + column, columns - column) : Vec{};
                store(to + column, value, padded - column);
            }
        }
        return {copy, padded};
    }
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
