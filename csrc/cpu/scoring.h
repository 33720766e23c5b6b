// What kernels that score queries against items are given.
#pragma once

#include <cstdint>

namespace xsmoe {

// The distinct items that a query has seen, ascending.
struct SeenItems {
    const int64_t *first, *last;
};

// A round of queries against all items: queries (rows, dim) with numbers of a row next to each other, items (C, dim)
// with any strides, and the items that each of these queries has seen.
struct Scoring {
    int64_t dim;
    const void* queries;
    int64_t query_stride;
    const void* items;
    int64_t item_stride, dim_stride;
    const SeenItems* seen;
};

// Some of the round's queries against some of the items.
struct Cell {
    int64_t first_query, last_query, first_item, last_item;
};

}  // namespace xsmoe
