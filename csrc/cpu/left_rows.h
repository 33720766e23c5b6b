// Rows of a tensor as left factor of a product.
#pragma once

#include "cpu/arena.h"
#include "cpu/product.h"

namespace xsmoe::XSMOE_TIER {
namespace {

// Read in place where products can do so, else from a copy whose rows zeros fill up to a multiple of columns.
template <class T, class Value = typename Held<T>::Value>
struct LeftRows {
    int64_t columns, padded;
    bool in_place;
    Value* copy = nullptr;

    LeftRows(int64_t columns, int64_t multiple)
        : columns(columns),
          padded(round_up(columns, multiple)),
          in_place(sizeof(T) == sizeof(Value) && columns == padded) {}

    // Takes what the copy of so many rows needs.
    void take(Arena& arena, int64_t rows) {
        if (!in_place) copy = arena.take<Value>(rows * padded);
    }

    Left<Value> of(const T* from, int64_t stride, int64_t rows) const {
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
}  // namespace xsmoe::XSMOE_TIER
