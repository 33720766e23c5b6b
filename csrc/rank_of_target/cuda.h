// Ranking of targets on an NVIDIA GPU, in float32.
#pragma once

#include <cstdint>

namespace xsmoe::rank_of_target {

// Rows of contiguous numbers.
struct Rows {
    const float* data;
    int64_t stride;
};

// The seen items of the queries: those of query m are the values from offsets[m] to offsets[m + 1]. Without offsets
// there are none.
struct Lists {
    const int64_t* values;
    int64_t count, stride;
    const void* offsets;
    bool wide;  // offsets are int64, otherwise int32
};

// The division of queries and items among blocks.
struct Plan {
    bool few;  // few queries: small tiles waste less
    int64_t slices, slice_tiles;
};

struct Call {
    int64_t num_queries, num_items, dim;
    Rows queries, items;
    const int64_t* targets;
    Lists seen;
    Plan plan;
    // Scratch: a score for each query, and a number for each slice and query. With one slice, the numbers may share the
    // memory of `ranks`.
    float* own;
    int64_t* points;
    int64_t* ranks;
};

// Return the plan for the current device, for at least one query and one item.
Plan plan(int64_t num_queries, int64_t num_items);

// Compute the ranks. `stream` is a cudaStream_t.
void rank(const Call& call, void* stream);

}  // namespace xsmoe::rank_of_target
