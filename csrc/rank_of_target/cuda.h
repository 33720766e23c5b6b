// What ranks targets on an NVIDIA GPU, in float32.
#pragma once

#include <cstdint>

namespace xsmoe::rank_of_target {

// Rows of numbers that follow each other.
struct Rows {
    const float* data;
    int64_t stride;
};

// What queries have seen: that of query m begins at the value offsets[m] and ends before offsets[m + 1]. Nothing at all
// without offsets.
struct Lists {
    const int64_t* values;
    int64_t count, stride;
    const void* offsets;
    bool wide;  // offsets are int64, otherwise int32
};

// How queries and items are shared out among blocks.
struct Plan {
    bool few;  // queries, so that small tiles waste less
    int64_t slices, slice_tiles;
};

struct Call {
    int64_t num_queries, num_items, dim;
    Rows queries, items;
    const int64_t* targets;
    Lists seen;
    Plan plan;
    // Scratch: a score for each query, and a number for each slice and query, which may lie where `ranks` do if there
    // is one slice.
    float* own;
    int64_t* points;
    int64_t* ranks;
};

// For the current device, of at least one query and one item.
Plan plan(int64_t num_queries, int64_t num_items);

// `stream` is a cudaStream_t.
void rank(const Call& call, void* stream);

}  // namespace xsmoe::rank_of_target
