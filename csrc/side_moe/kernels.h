// What the kernels of side_moe are given, and the table through which each tier offers them.
#pragma once

#include <cstdint>

namespace xsmoe::side_moe {

enum class Activation { gelu, gelu_tanh, relu };

// Logits of so few gates are dot products, not a product of matrices whose columns are mostly empty.
constexpr int64_t few_gates = 4;

// The four products that an expert takes part in, by its weights as right factor.
enum Part { down_columns, up_rows, up_columns, down_rows, parts };  // x down^T, a up, grad up^T, dhidden down

// An expert's packed weights; null where a call needs none.
struct PackedExpert {
    const void* part[parts];
};

struct Sizes {
    int64_t dim, experts, rank;
};

struct Forward {
    Sizes sizes;
    Activation activation;
    const void* x;
    int64_t x_stride;
    const void* backbone;
    int64_t backbone_stride;
    const float* row_weight;  // null: 1
    const void* router;       // packed, (D, E+1), unless there are few gates
    const void* router_rows;  // (E+1, D), where there are few
    const PackedExpert* experts;
    bool count;
    void* y;         // (rows, D)
    float* mixture;  // not null: takes the experts' part of y, without the backbone's, and y is not written
    float* gates;    // (rows, E+1)
    void* hidden;    // (rows, E*R), null: not kept
};

struct Backward {
    Sizes sizes;
    Activation activation;
    int64_t trained;  // the first expert whose weights take gradients
    const void* grad;
    int64_t grad_stride;
    const void* x;
    int64_t x_stride;
    const void* backbone;
    int64_t backbone_stride;
    const float* backbone_dot;  // grad . backbone where it is known, (rows,); then backbone is not read
    const float* gates;
    const void* hidden;  // null: computed again
    const void* router;  // packed, (E+1, D)
    const PackedExpert* experts;
    bool need_x, need_backbone, need_router, need_down, need_up;
    void* dx;
    void* dbackbone;
};

// The counters' increments by the rows of a chunk.
struct Totals {
    double* norm;  // (E+1,)
    double* gate;  // (E+1,)
};

// The weights' gradients by the rows of a chunk, in float32: for each panel of columns, `rows` rows of it, of which
// those of down (trained experts, R), of the router (E+1) and of up begin at the rows named so; what is not needed has
// none.
struct GradientSums {
    float* at;
    int64_t rows, down, router, up;
};

struct Kernels {
    int64_t panel;       // columns of a panel
    int64_t block_rows;  // rows that a block of a product covers

    int64_t (*packed_bytes)(int64_t inner, int64_t columns);
    // Packs the (inner, columns) matrix whose element (k, n) is at from[k * inner_stride + n * column_stride].
    void (*pack)(
        const void* from, int64_t inner, int64_t columns, int64_t inner_stride, int64_t column_stride, void* to
    );

    // Rows [first, last). `scratch` has as many bytes as the function of that name says. Adds to `totals`.
    int64_t (*forward_bytes)(const Forward&);
    void (*forward)(const Forward&, int64_t first, int64_t last, void* scratch, Totals totals);
    int64_t (*backward_bytes)(const Backward&);
    // Overwrites `sums`, unless there are no rows.
    void (*backward)(const Backward&, int64_t first, int64_t last, void* scratch, GradientSums sums);

    // Adds up what `chunks` chunks left, `chunk_stride` floats apart: rows [first, last) of sums with `sum_rows` rows,
    // to the rows from `to` on.
    void (*gather)(
        const float* from, int64_t chunks, int64_t chunk_stride, int64_t sum_rows, int64_t dim, int64_t first,
        int64_t last, void* to
    );

    // One row of x for all rows of the backbone: y = mixture + gate * backbone, and the sum of the weighted norms.
    void (*broadcast)(
        const float* mixture, float gate, const void* backbone, int64_t stride, const float* row_weight, int64_t dim,
        int64_t first, int64_t last, void* y, double* norm, double* weight
    );
    // What its gradient takes: the sum of the rows of grad (`sums` has room for two rows), that of grad . backbone, and
    // gate * grad where dbackbone is not null.
    void (*collect)(
        const void* grad, int64_t grad_stride, const void* backbone, int64_t backbone_stride, float gate, int64_t dim,
        int64_t first, int64_t last, float* sums, double* dot, void* dbackbone
    );
};

}  // namespace xsmoe::side_moe
