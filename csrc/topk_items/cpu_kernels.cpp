// topk_items: compares scores with the worst score that a query still keeps, a vector at a time, and collects the
// higher ones. Compiled once for each instruction set level.

#include "cpu/score_tiles.h"
#include "topk_items/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using topk_items::Candidates;
using topk_items::Kernels;
using topk_items::Key;
using topk_items::Selection;

template <class T>
struct SelectScratch {
    ScoreTiles<T> tiles;
    float* worst;          // of each query: items with this score or less are dropped
    const int64_t** seen;  // the next seen item

    SelectScratch(Arena& arena, const Selection& call, int64_t queries)
        : tiles(arena, call.scoring, queries),
          worst(arena.allocate<float>(queries)),
          seen(arena.allocate<const int64_t*>(queries)) {}
};

// Return a bit for each lane in which a is above b.
XSMOE_INLINE uint32_t above(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_GT_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), _CMP_GT_OQ))
    );
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < lanes; ++lane) bits |= uint32_t{a[lane] > b[lane]} << lane;
    return bits;
#endif
}

XSMOE_INLINE Key key_of(float score, int64_t item) {
    const uint32_t bits = bit_cast<uint32_t>(score + 0.0f);
    return Key{bits >> 31 ? ~bits : bits | 0x80000000} << 32 | static_cast<uint32_t>(~item);
}

template <class T>
void select(const Selection& call, const Cell& cell, void* memory, Candidates* found) {
    Arena arena(memory);
    const int64_t queries = cell.last_query - cell.first_query;
    const SelectScratch<T> scratch(arena, call, queries);
    const SeenItems* seen = call.scoring.seen + cell.first_query;
    const MatrixUnit unit;
    const auto left = scratch.tiles.queries_of(call.scoring, cell);
    for (int64_t query = 0; query < queries; ++query) {
        scratch.worst[query] = -__builtin_inff();
        scratch.seen[query] = seen[query].first;
    }
    scratch.tiles.each(call.scoring, cell, left, [&](int64_t query, int64_t item, int64_t items, const float* scores) {
        Candidates& mine = found[query];
        Vec worst = splat(scratch.worst[query]);
        for (int64_t i = 0; i < items; i += lanes) {
            // NaN is not above any number, and -inf is not above itself.
            uint32_t bits = above(load(scores + i), worst);
            if (items - i < lanes) bits &= (uint32_t{1} << (items - i)) - 1;
            for (; bits != 0; bits &= bits - 1) {
                const int64_t place = i + __builtin_ctz(bits);
                const int64_t*& next = scratch.seen[query];
                while (next != seen[query].last && *next < item + place) ++next;
                if (next != seen[query].last && *next == item + place) continue;
                mine.keys[mine.count++] = key_of(scores[place], item + place);
                if (mine.count < call.capacity) continue;
                scratch.worst[query] = call.keep_best(mine.keys, mine.count, call.places);
                mine.count = call.places;
                worst = splat(scratch.worst[query]);
            }
        }
    });
}

template <class T>
constexpr Kernels table = {
    .block_queries = ScoreTiles<T>::height,
    .tile_items = ScoreTiles<T>::width_of,
    .select_bytes = bytes_of<SelectScratch<T>, const Selection&, int64_t>,
    .select = select<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

namespace xsmoe::topk_items::XSMOE_ISA {

extern const Kernels for_float = xsmoe::XSMOE_ISA::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_ISA::table<BFloat16>;

}  // namespace xsmoe::topk_items::XSMOE_ISA
