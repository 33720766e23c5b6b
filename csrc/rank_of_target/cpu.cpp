// rank_of_target on the CPU: unpacks the tensors, divides queries and items among threads, and adds up their counts.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/score_rounds.h"
#include "cpu/isa_kernels.h"
#include "rank_of_target/kernels.h"

namespace xsmoe::rank_of_target {

XSMOE_KERNELS_FOR

namespace {

// Return the rank of a target from the counts of all cells of its round.
int64_t rank(const Found& found, int64_t items, int64_t target, SeenItems seen) {
    if (std::isfinite(found.own)) return 1 + found.higher + found.equal / 2;  // the target is one of the equal items
    const bool among_seen = std::binary_search(seen.first, seen.last, target);
    return items - (seen.last - seen.first) + (among_seen ? 1 : 0);
}

Tensor forward(
    Tensor queries, Tensor items, Tensor targets, std::optional<Tensor> seen, std::optional<Tensor> seen_offsets
) {
    const Kernels& kernels = kernels_for(queries.scalar_type());
    const int64_t num_queries = queries.size(0), num_items = items.size(0), dim = items.size(1);
    queries = with_dense_rows(queries);
    targets = torch::stable::contiguous(targets);
    const Tensor ranks = empty(targets, {num_queries}, ScalarType::Long);
    const char* query = static_cast<const char*>(data(queries));
    const auto* target = static_cast<const int64_t*>(data(targets));
    auto* rank_of = mutable_data_as<int64_t>(ranks);
    SeenLists lists(seen, seen_offsets);
    const int64_t most = queries_of_round(dim);
    for (int64_t first = 0, last; first < num_queries; first = last) {
        last = lists.round_end(first, std::min(num_queries, first + most));
        const int64_t count = last - first;
        const SeenItems* seen_items = lists.of(first, last);
        const Count call{
            {dim, query + first * queries.stride(0) * element_size(queries), queries.stride(0), data(items),
             items.stride(0), items.stride(1), seen_items},
            target + first
        };
        const Cells cells(count, kernels.block_queries, num_items, kernels.tile_items(dim), dim);
        const ChunkScratch work(queries, cells.count(), kernels.count_bytes(call, cells.max_queries()));
        const Tensor counts = scratch(queries, cells.item_parts() * count * int64_t{sizeof(Found)});
        auto* found = mutable_data_as<Found>(counts);
        for_each_chunk(cells.count(), [&](int64_t chunk) {
            const Cell cell = cells[chunk];
            kernels.count(call, cell, work.of(chunk), found + chunk % cells.item_parts() * count + cell.first_query);
        });
        for (int64_t m = 0; m < count; ++m) {
            Found all = found[m];
            for (int64_t part = 1; part < cells.item_parts(); ++part) {
                all.higher += found[part * count + m].higher;
                all.equal += found[part * count + m].equal;
            }
            rank_of[first + m] = rank(all, num_items, call.targets[m], seen_items[m]);
        }
    }
    return ranks;
}

}  // namespace
}  // namespace xsmoe::rank_of_target

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_native, m) {
    m.def("rank_of_target(Tensor queries, Tensor items, Tensor targets, Tensor? seen, Tensor? seen_offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CPU, m) {
    m.impl("rank_of_target", TORCH_BOX(&xsmoe::rank_of_target::forward));
}
