// The arguments of the kernels that score queries against items.
#pragma once

#include <cstdint>

namespace xsmoe {

// The distinct items that a query has seen, in ascending order.
struct SeenItems {
    const int64_t *first, *last;
};

// A round of queries against all items: queries (rows, dim) with contiguous rows, items (C, dim) with any strides, and
// the seen items of each query.
struct Scoring {
    int64_t dim;
    const void* queries;
    int64_t query_stride;
    const void* items;
    int64_t item_stride, dim_stride;
    const SeenItems* seen;
};

// A range of the round's queries and a range of the items.
struct Cell {
    int64_t first_query, last_query, first_item, last_item;
};

}  // namespace xsmoe
