// What the kernels of in_batch_softmax_loss are told, and which each tier offers them.
//
// Threads share the items: each meets all queries with its own, and owns their gradients. What a query gets from each
// part, sums of exponentials and gradients, is put together after all have come.
#pragma once

#include <cstdint>

namespace xsmoe::in_batch_softmax_loss {

struct Batch {
    int64_t num_queries, num_items, dim, width;
    const void* queries;
    int64_t query_stride;
    const void* items;
    int64_t item_stride;
    const int64_t* targets;   // (queries,)
    const int64_t* rejected;  // (queries, width), or a row for each user
    const int64_t* users;     // (queries,), or null
    const float* logq;        // (num_items,), or null
    const float* bias;        // (num_items,): log(count) - logq
    const bool* drawn;        // (num_items,): whether the count is not 0; null if it is nowhere 0
    bool packs;    // items before they are right factor of the queries' gradients, for they do not serve as they lie
    void* packed;  // all of them, ahead of time; or null
};

// What becomes of a call.
struct Results {
    bool lse_known;  // by an earlier call: only gradients are wanted
    float* lse;      // (queries,)
    float* losses;   // (queries,), unless the lse is known; until it is, the targets' logits
    bool need_queries, need_items;
    float scale;                 // of each query's loss in what the gradients are of
    void* queries;               // (queries, dim), their gradients
    void* items = nullptr;       // (num_items, dim), their gradients
    float* item_sums = nullptr;  // what these are so far, in float32; null where an item's gradient is summed in one go
    int64_t sum_stride = 0;
};

// How the queries are gone through.
struct Plan {
    // Whether a tile of queries keeps its logits of all items, so that loss and gradients come from one product for
    // them. Where the items are too many, the gradients compute them again.
    bool keeps;
    int64_t tile;    // queries at a time
    int64_t stride;  // distance of two items' logits of a tile
    int64_t block;   // queries whose gradients' parts are held at a time
    int64_t parts;   // of the items
    int64_t widest;  // items of the largest part
};

struct Span {
    int64_t first, last;

    int64_t size() const { return last - first; }
};

struct Call {
    Batch batch;
    Results results;
    Plan plan;
    float* statistics;  // each part's largest logit and sum of exponentials, of each query
    float* partial;     // each part's share of the queries' gradients
};

struct Part {
    int64_t index;
    Span items;
    void* scratch;
};

struct Kernels {
    // Parts begin at multiples of so many items.
    int64_t granularity;

    // Whether items serve as right factors where they lie, and the packing of those that do not.
    bool (*serve_in_place)(const Batch&, Span items);
    int64_t (*packed_bytes)(const Batch&);
    void (*pack)(const Batch&, Span items);

    // Whether the items' gradients may hold their sums, and the distance of two items' sums.
    bool (*sums_in_place)(int64_t dim);
    int64_t (*sum_stride)(int64_t dim);

    int64_t (*statistics_floats)(const Call&);
    int64_t (*partial_floats)(const Call&);
    int64_t (*scratch_bytes)(const Call&);

    // The tiles of a plan that keeps logits: step t begins tile t, ends tile t - 1, and hands out the gradients of the
    // queries of tile t - 2. All parts must have done a step before the next.
    void (*step)(const Call&, const Part&, int64_t index);

    // The other plan: all queries' statistics; then, with all parts', the lse and losses of some; then a block's
    // gradients; then, with all parts', those of the block's queries.
    void (*summarize)(const Call&, const Part&);
    void (*put_together)(const Call&, Span queries);
    void (*differentiate)(const Call&, const Part&, Span block);
    void (*hand_out)(const Call&, Span block, Span queries);

    // Sums that lie elsewhere become the items' gradients.
    void (*store_sums)(const Call&, Span items);

    // Numbers [first, last) times a factor.
    void (*scale)(const void* from, float factor, int64_t first, int64_t last, void* to);
};

}  // namespace xsmoe::in_batch_softmax_loss
