// The arguments of side_moe's kernels, and the table of kernels of an instruction set level.
#pragma once

#include <cstdint>

namespace xsmoe::side_moe {

enum class Activation { gelu, gelu_tanh, relu };

// Up to this number of gates, logits are computed as dot products: most columns of a matrix product would be empty.
constexpr int64_t few_gates = 4;

// The four products of an expert, by the layout of its weights as right operand.
enum Part { down_columns, up_rows, up_columns, down_rows, parts };  // x down^T, a up, grad up^T, dhidden down

// An expert's packed weights. A part is null if a call does not need it.
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
    const void* router_rows;  // (E+1, D), if there are few gates
    const PackedExpert* experts;
    bool count;
    void* y;         // (rows, D)
    float* mixture;  // if not null: gets y without the backbone's part, and y is not written
    float* gates;    // (rows, E+1)
    void* hidden;    // (rows, E*R); null: not kept
};

struct Backward {
    Sizes sizes;
    Activation activation;
    int64_t trained;  // the first expert whose weights get gradients
    const void* grad;
    int64_t grad_stride;
    const void* x;
    int64_t x_stride;
    const void* backbone;
    int64_t backbone_stride;
    const float* backbone_dot;  // grad . backbone (rows,) if it is known; then backbone is not read
    const float* gates;
    const void* hidden;  // null: recomputed
    const void* router;  // packed, (E+1, D)
    const PackedExpert* experts;
    bool need_x, need_backbone, need_router, need_down, need_up;
    void* dx;
    void* dbackbone;
};

// A chunk's increments of the counters.
struct Totals {
    double* norm;  // (E+1,)
    double* gate;  // (E+1,)
};

// A chunk's sums of the weights' gradients, in float32. Each panel of columns has `rows` rows. The rows of down
// (trained experts, R), of the router (E+1) and of up start at the members of that name. A gradient that is not needed
// has no rows.
struct GradientSums {
    float* at;
    int64_t rows, down, router, up;
};

struct Kernels {
    int64_t panel;       // columns of a panel
    int64_t block_rows;  // rows of a product's block

    int64_t (*packed_bytes)(int64_t inner, int64_t columns);
    // Pack the (inner, columns) matrix whose element (k, n) is at from[k * inner_stride + n * column_stride].
    void (*pack)(
        const void* from, int64_t inner, int64_t columns, int64_t inner_stride, int64_t column_stride, void* to
    );

    // Process rows [first, last). `scratch` has the bytes that forward_bytes returns. Adds to `totals`.
    int64_t (*forward_bytes)(const Forward&);
    void (*forward)(const Forward&, int64_t first, int64_t last, void* scratch, Totals totals);
    int64_t (*backward_bytes)(const Backward&);
    // Overwrites `sums`, unless there are no rows.
    void (*backward)(const Backward&, int64_t first, int64_t last, void* scratch, GradientSums sums);

    // Add up the sums of `chunks` chunks, `chunk_stride` floats apart: rows [first, last) of sums with `sum_rows` rows,
    // into the rows from `to` on.
    void (*gather)(
        const float* from, int64_t chunks, int64_t chunk_stride, int64_t sum_rows, int64_t dim, int64_t first,
        int64_t last, void* to
    );

    // The forward pass of one row of x for all rows of the backbone: y = mixture + gate * backbone, and the sum of the
    // weighted norms.
    void (*broadcast)(
        const float* mixture, float gate, const void* backbone, int64_t stride, const float* row_weight, int64_t dim,
        int64_t first, int64_t last, void* y, double* norm, double* weight
    );
    // The reductions that its backward pass needs: the sum of the rows of grad (`sums` has memory for two rows), the
    // sum of grad . backbone, and gate * grad if dbackbone is not null.
    void (*collect)(
        const void* grad, int64_t grad_stride, const void* backbone, int64_t backbone_stride, float gate, int64_t dim,
        int64_t first, int64_t last, float* sums, double* dot, void* dbackbone
    );
};

}  // namespace xsmoe::side_moe
