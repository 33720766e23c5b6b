// The arguments of in_batch_softmax_loss's kernels, and the table of kernels of an instruction set level.
//
// Threads divide the items into parts: a thread computes the logits of all queries with its items, and owns the
// gradients of these items. The parts' contributions to a query, which are sums of exponentials and gradients, are
// combined after all parts are complete.
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
    const int64_t* rejected;  // (queries, width), or one row for each user
    const int64_t* users;     // (queries,), or null
    const float* logq;        // (num_items,), or null
    const float* bias;        // (num_items,): log(count) - logq
    const bool* drawn;        // (num_items,): whether the count is not 0; null if no count is 0
    // Whether items are packed as right operand of the queries' gradients, because they cannot be read in place.
    bool pack_items;
    void* packed;  // all items, packed in advance; or null
};

// The results of a call.
struct Results {
    bool lse_known;  // by an earlier call, so that only gradients are computed
    float* lse;      // (queries,)
    float* losses;   // (queries,), unless the lse is known; until the lse is computed, the targets' logits
    bool need_queries, need_items;
    float scale;                 // of each query's loss in the differentiated value
    void* queries;               // (queries, dim), their gradients
    void* items = nullptr;       // (num_items, dim), their gradients
    float* item_sums = nullptr;  // their float32 sums so far; null if an item's gradient is summed in one step
    int64_t sum_stride = 0;
};

// The order in which queries are processed.
struct Plan {
    // Whether a tile of queries keeps its logits of all items, so that loss and gradients need one product for them. If
    // there are too many items, the gradients recompute the logits.
    bool keeps;
    int64_t tile;    // queries at a time
    int64_t stride;  // row stride of a tile's logits
    int64_t block;   // queries whose partial gradients are stored at a time
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
    float* statistics;  // each part's largest logit and sum of exponentials, for each query
    float* partial;     // each part's contribution to the queries' gradients
};

struct Part {
    int64_t index;
    Span items;
    void* scratch;
};

struct Kernels {
    // Parts start at multiples of this number of items.
    int64_t granularity;

    // Whether items can be right operands in place, and the packing of those that cannot.
    bool (*usable_in_place)(const Batch&, Span items);
    int64_t (*packed_bytes)(const Batch&);
    void (*pack)(const Batch&, Span items);

    // Whether the items' gradients can hold their sums, and the row stride of the sums.
    bool (*sums_in_place)(int64_t dim);
    int64_t (*sum_stride)(int64_t dim);

    int64_t (*statistics_floats)(const Call&);
    int64_t (*partial_floats)(const Call&);
    int64_t (*scratch_bytes)(const Call&);

    // The tiles of a plan that keeps logits. Step t starts tile t, completes tile t - 1, and writes the gradients of
    // the queries of tile t - 2. All parts must complete a step before the next one starts.
    void (*step)(const Call&, const Part&, int64_t index);

    // The other plan: first the statistics of all queries. After all parts: the lse and losses of some queries. Then
    // the gradients of a block. After all parts: those of the block's queries.
    void (*summarize)(const Call&, const Part&);
    void (*combine)(const Call&, Span queries);
    void (*differentiate)(const Call&, const Part&, Span block);
    void (*write_gradients)(const Call&, Span block, Span queries);

    // Store sums that are in other memory as the items' gradients.
    void (*store_sums)(const Call&, Span items);

    // Multiply numbers [first, last) by a factor.
    void (*scale)(const void* from, float factor, int64_t first, int64_t last, void* to);
};

}  // namespace xsmoe::in_batch_softmax_loss
