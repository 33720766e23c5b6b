// rank_of_target: counts items that score higher than the target or equal to it, and subtracts the seen ones. Compiled
// once for each instruction set level.

#include "cpu/score_tiles.h"
#include "rank_of_target/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using rank_of_target::Count;
using rank_of_target::Found;
using rank_of_target::Kernels;

// The counts of a query, one for each lane. They overflow at about ten billion items.
struct LaneCounts {
    IntVec higher, equal;
};

template <class T>
struct CountScratch {
    ScoreTiles<T> tiles;
    LaneCounts* counts;
    float* own;
    const int64_t** seen;  // for each query, the next seen item

    CountScratch(Arena& arena, const Count& call, int64_t queries)
        : tiles(arena, call.scoring, queries),
          counts(arena.allocate<LaneCounts>(queries)),
          own(arena.allocate<float>(queries)),
          seen(arena.allocate<const int64_t*>(queries)) {}
};

// Return the first of ascending items that is not below `item`.
const int64_t* lower_bound(SeenItems seen, int64_t item) {
    const int64_t *first = seen.first, *last = seen.last;
    while (first < last) {
        const int64_t* middle = first + (last - first) / 2;
        if (*middle < item) {
            first = middle + 1;
        } else {
            last = middle;
        }
    }
    return first;
}

template <class T>
void count(const Count& call, const Cell& cell, void* memory, Found* found) {
    Arena arena(memory);
    const int64_t queries = cell.last_query - cell.first_query;
    const CountScratch<T> scratch(arena, call, queries);
    const int64_t* targets = call.targets + cell.first_query;
    const SeenItems* seen = call.scoring.seen + cell.first_query;
    const MatrixUnit unit;
    const auto left = scratch.tiles.queries_of(call.scoring, cell);
    scratch.tiles.own(call.scoring, cell, left, targets, scratch.own);
    for (int64_t query = 0; query < queries; ++query) {
        scratch.counts[query] = LaneCounts{};
        scratch.seen[query] = lower_bound(seen[query], cell.first_item);
        found[query] = Found{0, 0, scratch.own[query]};
    }
    scratch.tiles.each(call.scoring, cell, left, [&](int64_t query, int64_t item, int64_t items, const float* scores) {
        const float own = scratch.own[query];
        LaneCounts counts = scratch.counts[query];
        Found& mine = found[query];
        int64_t i = 0;
        for (; i + lanes <= items; i += lanes) {
            const Vec score = load(scores + i);
            counts.higher -= score > own;
            counts.equal -= score == own;
        }
        scratch.counts[query] = counts;
        for (; i < items; ++i) {
            mine.higher += scores[i] > own;
            mine.equal += scores[i] == own;
        }
        const int64_t* next = scratch.seen[query];
        for (; next != seen[query].last && *next < item + items; ++next) {
            if (*next == targets[query]) continue;
            mine.higher -= scores[*next - item] > own;
            mine.equal -= scores[*next - item] == own;
        }
        scratch.seen[query] = next;
    });
    for (int64_t query = 0; query < queries; ++query) {
        for (int lane = 0; lane < lanes; ++lane) {
            found[query].higher += scratch.counts[query].higher[lane];
            found[query].equal += scratch.counts[query].equal[lane];
        }
    }
}

template <class T>
constexpr Kernels table = {
    .block_queries = ScoreTiles<T>::height,
    .tile_items = ScoreTiles<T>::width_of,
    .count_bytes = bytes_of<CountScratch<T>, const Count&, int64_t>,
    .count = count<T>,
};

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

namespace xsmoe::rank_of_target::XSMOE_ISA {

extern const Kernels for_float = xsmoe::XSMOE_ISA::table<float>;
extern const Kernels for_bfloat16 = xsmoe::XSMOE_ISA::table<BFloat16>;

}  // namespace xsmoe::rank_of_target::XSMOE_ISA
