// What the kernels of in_batch_softmax_loss are told, and which each tier offers them.
#pragma once

#include <cstdint>

namespace xsmoe::in_batch_softmax_loss {

// Columns of logits that are computed together; packed items lie strip by strip.
constexpr int64_t strip = 512;

constexpr int64_t strips_of(int64_t items) { return (items + strip - 1) / strip; }

struct Batch {
    int64_t num_items, dim, width;
    const void* queries;
    int64_t query_stride;
    const void* items;
    int64_t item_stride;
    const int64_t* targets;   // (queries,)
    const int64_t* rejected;  // (queries, width), or a row for each user
    const int64_t* users;     // (queries,), or null
    const float* logq;        // (num_items,), or null
    const float* bias;        // (strips * strip,): log(count) - logq, -inf beyond the items
    const uint32_t* drawn;    // (strips * strip,), all bits set where the count is not 0; null if it is nowhere 0
    void* columns;            // packed items as right factor of the logits
    void* rows;               // packed items as right factor of the queries' gradients, null if these are not needed
};

// What the rows of a call become.
struct Results {
    bool lse_known;  // by an earlier call: only gradients are wanted
    float* lse;      // (queries,)
    float* losses;   // (queries,), unless the lse is known
    bool need_queries, need_items;
    float scale;    // of each query's loss in what the gradients are of
    void* queries;  // (queries, dim), their gradients
};

struct Kernels {
    int64_t block_rows;

    // Bytes of all packed items in one of the two layouts, and the packing of one strip in all that are wanted.
    int64_t (*columns_bytes)(const Batch&);
    int64_t (*rows_bytes)(const Batch&);
    void (*pack)(const Batch&, int64_t index);

    // Queries [first, last). `item_sums` takes their part of the items' gradients, (num_items, sum_stride(dim)).
    int64_t (*sum_stride)(int64_t dim);
    int64_t (*bytes)(const Batch&, const Results&);
    void (*run)(const Batch&, const Results&, int64_t first, int64_t last, void* scratch, float* item_sums);

    // The gradients of items [first, last): the parts in their order added up.
    void (*add)(const Batch&, const float* item_sums, int64_t parts, int64_t first, int64_t last, void* to);

    // Numbers [first, last) times a factor.
    void (*scale)(const void* from, float factor, int64_t first, int64_t last, void* to);
};

}  // namespace xsmoe::in_batch_softmax_loss
