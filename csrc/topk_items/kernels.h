// The arguments of topk_items's kernels, and the table of kernels of an instruction set level.
#pragma once

#include "cpu/scoring.h"

namespace xsmoe::topk_items {

// A candidate. The upper half contains the bits of its score: the sign bit is set if the score is positive, and all
// bits are inverted if it is negative, so that keys are ordered as scores are. The lower half is the complement of its
// id. So the largest key is the best candidate, and of equal scores the one with the lower id. No zero is negative.
typedef uint64_t Key;

// The candidates of one query in one cell.
struct Candidates {
    Key* keys;
    int64_t count;
};

struct Selection {
    Scoring scoring;
    int64_t places;    // the number of candidates to keep
    int64_t capacity;  // keys that fit in memory, more than `places`
    // Move the best `places` of `count` keys to the front, and return the worst score among them. Compiled once for all
    // instruction set levels, because it uses the standard library's templates.
    float (*keep_best)(Key* keys, int64_t count, int64_t places);
};

struct Kernels {
    int64_t block_queries;  // queries that are scored together
    int64_t (*tile_items)(int64_t dim);

    // Collect the candidates of a cell: a superset of its best ones. `scratch` has the bytes that select_bytes returns;
    // `found` has allocated memory and no keys for each query.
    int64_t (*select_bytes)(const Selection&, int64_t queries);
    void (*select)(const Selection&, const Cell&, void* scratch, Candidates* found);
};

}  // namespace xsmoe::topk_items
