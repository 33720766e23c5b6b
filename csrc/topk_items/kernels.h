// What the kernels of topk_items are given, and the table through which each tier offers them.
#pragma once

#include "cpu/scoring.h"

namespace xsmoe::topk_items {

// A candidate. The upper half is its score's bits, with the sign bit set if the score is positive and all bits turned
// if it is negative, so that they rank as scores do; the lower half is the complement of its id. So the largest
// is the best one, and of equals the one with the lower id. No zero is negative.
typedef uint64_t Key;

// The candidates of one query in one cell.
struct Candidates {
    Key* keys;
    int64_t count;
};

struct Selection {
    Scoring scoring;
    int64_t places;    // candidates that a query is left with
    int64_t capacity;  // keys that there is room for, more than `places`
    // Moves the best `places` of so many keys to the front, and returns the worst score among them. Compiled once,
    // because it takes the standard library's templates.
    float (*keep_best)(Key* keys, int64_t count, int64_t places);
};

struct Kernels {
    int64_t block_queries;  // queries that are scored at once
    int64_t (*tile_items)(int64_t dim);

    // Collects the candidates of a cell, a superset of its best. `scratch` has as many bytes as the function of that
    // name says; `found` holds room and no keys for each query.
    int64_t (*select_bytes)(const Selection&, int64_t queries);
    void (*select)(const Selection&, const Cell&, void* scratch, Candidates* found);
};

}  // namespace xsmoe::topk_items
