// The arguments of rank_of_target's kernels, and the table of kernels of an instruction set level.
#pragma once

#include "cpu/scoring.h"

namespace xsmoe::rank_of_target {

struct Count {
    Scoring scoring;
    const int64_t* targets;  // of the round's queries
};

// The result of a cell for one query: the target's own score, and how many unseen items score higher or equal. The
// target is among the equal ones if its score is finite.
struct Found {
    int64_t higher, equal;
    float own;
};

struct Kernels {
    int64_t block_queries;  // queries that are scored together
    int64_t (*tile_items)(int64_t dim);

    // Count in a cell. `scratch` has the bytes that count_bytes returns; `found` has an entry for each query.
    int64_t (*count_bytes)(const Count&, int64_t queries);
    void (*count)(const Count&, const Cell&, void* scratch, Found* found);
};

}  // namespace xsmoe::rank_of_target
