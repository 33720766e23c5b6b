// side_moe on tiles of rows that stay in the second-level cache. Compiled once for each instruction set level.

#include "side_moe/backward.h"
#include "side_moe/forward.h"
#include "side_moe/single_row.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using side_moe::Kernels;

template <class T>
void gather(
    const float* from, int64_t chunks, int64_t chunk_stride, int64_t sum_rows, int64_t dim, int64_t first, int64_t last,
    void* to
) {
    for (int64_t row = first; row < last; ++row) {
        for (int64_t column = 0; column < dim; column += lanes) {
            const float* at = from + (column / panel * sum_rows + row) * panel + column % panel;
            Vec total = load(at);
            for (int64_t chunk = 1; chunk < chunks; ++chunk) total += load(at + chunk * chunk_stride);
            store(static_cast<T*>(to) + (row - first) * dim + column, total, dim - column);
        }
    }
}

template <class T>
int64_t packed_bytes(int64_t inner, int64_t columns) {
    return packed_words<typename Operand<T>::Value>(inner, columns) * int64_t{sizeof(float)};
}

template <class T>
void pack_matrix(
    const void* from, int64_t inner, int64_t columns, int64_t inner_stride, int64_t column_stride, void* to
) {
    typedef typename Operand<T>::Value Value;
    pack<Value>(
        static_cast<const T*>(from), inner, columns, inner_stride, column_stride, static_cast<Word<Value>*>(to)
    );
}

template <class T>
constexpr Kernels table = {
    .panel = panel,
    .block_rows = Words<typename Operand<T>::Value>::block_rows,
    .packed_bytes = packed_bytes<T>,
    .pack = pack_matrix<T>,
    .forward_bytes = bytes_of<ForwardScratch<T>, const Forward&>,
    .forward = forward<T>,
    .backward_bytes = bytes_of<BackwardScratch<T>, const Backward&>,
    .backward = backward<T>,
    .gather = gather<T>,
    .broadcast = broadcast<T>,
    .collect = collect<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

namespace xsmoe::side_moe::XSMOE_ISA {

extern const Kernels for_float = xsmoe::XSMOE_ISA::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_ISA::table<BFloat16>;

}  // namespace xsmoe::side_moe::XSMOE_ISA
