// What the kernels of rank_of_target are given, and the table through which each tier offers them.
#pragma once

#include "cpu/scoring.h"

namespace xsmoe::rank_of_target {

struct Count {
    Scoring scoring;
    const int64_t* targets;  // of the round's queries
};

// What a cell finds for one of its queries: the target's own score, and how many items that are not in seen score
// higher or equal. The target is one of the equals if its score is finite.
struct Found {
    int64_t higher, equal;
    float own;
};

struct Kernels {
    int64_t block_queries;  // queries that are scored at once
    int64_t (*tile_items)(int64_t dim);

    // Counts in a cell. `scratch` has as many bytes as the function of that name says; `found` takes one for each
    // query.
    int64_t (*count_bytes)(const Count&, int64_t queries);
    void (*count)(const Count&, const Cell&, void* scratch, Found* found);
};

}  // namespace xsmoe::rank_of_target
