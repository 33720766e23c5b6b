// topk_items on the CPU: unpacks the tensors, divides queries and items among threads, and merges their candidates.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/score_rounds.h"
#include "cpu/isa_kernels.h"
#include "topk_items/kernels.h"

namespace xsmoe::topk_items {

XSMOE_KERNELS_FOR

namespace {

// The largest number of keys of a round in one part of the items, unless a single block of queries has more: 8 MiB.
constexpr int64_t max_keys = int64_t{1} << 20;

float score_of(Key key) {
    const auto upper = static_cast<uint32_t>(key >> 32);
    const uint32_t bits = upper >> 31 ? upper & 0x7fffffff : ~upper;
    float score;
    std::memcpy(&score, &bits, sizeof(score));
    return score;
}

int64_t item_of(Key key) { return ~static_cast<uint32_t>(key); }

float keep_best(Key* keys, int64_t count, int64_t places) {
    std::nth_element(keys, keys + places - 1, keys + count, std::greater<>());
    return score_of(keys[places - 1]);
}

// Return the number of keys to allocate per query. More keys mean fewer selections, but more memory.
int64_t capacity_for(int64_t places, int64_t items) {
    return std::min(places + std::max<int64_t>(places, 128), items + 1);
}

// Add the candidates of another part of the items for the same query.
void merge(Candidates& into, const Candidates& from, int64_t places, int64_t capacity) {
    for (int64_t i = 0; i < from.count; ++i) {
        into.keys[into.count++] = from.keys[i];
        if (into.count < capacity) continue;
        keep_best(into.keys, into.count, places);
        into.count = places;
    }
}

// Write the best candidates in order, and pad to k places.
void write(const Candidates& found, int64_t places, int64_t k, float* scores, int64_t* ids) {
    const int64_t kept = std::min(found.count, places);
    if (found.count > places) keep_best(found.keys, found.count, places);
    std::sort(found.keys, found.keys + kept, std::greater<>());
    for (int64_t i = 0; i < kept; ++i) {
        scores[i] = score_of(found.keys[i]);
        ids[i] = item_of(found.keys[i]);
    }
    std::fill(scores + kept, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + kept, ids + k, -1);
}

std::tuple<Tensor, Tensor> forward(
    Tensor queries, Tensor items, int64_t k, std::optional<Tensor> seen, std::optional<Tensor> seen_offsets
) {
    const Kernels& kernels = kernels_for(queries.scalar_type());
    const int64_t num_queries = queries.size(0), num_items = items.size(0), dim = items.size(1);
    if (num_items > std::numeric_limits<uint32_t>::max()) {
        throw std::invalid_argument("topk_items supports at most 4,294,967,295 items on a CPU");
    }
    queries = with_dense_rows(queries);
    const Tensor scores = empty(queries, {num_queries, k}, ScalarType::Float);
    const Tensor ids = empty(queries, {num_queries, k}, ScalarType::Long);
    auto* best = mutable_data_as<float>(scores);
    auto* best_ids = mutable_data_as<int64_t>(ids);
    const char* query = static_cast<const char*>(data(queries));
    const int64_t places = std::max<int64_t>(1, std::min(k, num_items)), capacity = capacity_for(places, num_items);
    const int64_t most = std::clamp(max_keys / capacity, kernels.block_queries, queries_of_round(dim));
    SeenLists lists(seen, seen_offsets);
    for (int64_t first = 0, last; first < num_queries; first = last) {
        last = lists.round_end(first, std::min(num_queries, first + most));
        const int64_t count = last - first;
        const Selection call{
            {dim, query + first * queries.stride(0) * element_size(queries), queries.stride(0), data(items),
             items.stride(0), items.stride(1), lists.of(first, last)},
            places,
            capacity,
            keep_best
        };
        const Cells cells(count, kernels.block_queries, num_items, kernels.tile_items(dim), dim);
        const ChunkScratch work(queries, cells.count(), kernels.select_bytes(call, cells.max_queries()));
        const Tensor memory = scratch(queries, cells.item_parts() * count * capacity * int64_t{sizeof(Key)});
        auto* keys = mutable_data_as<Key>(memory);
        std::vector<Candidates> found(static_cast<size_t>(cells.item_parts() * count));
        for (Candidates& mine : found) {
            mine = {keys, 0};
            keys += capacity;
        }
        for_each_chunk(cells.count(), [&](int64_t chunk) {
            const Cell cell = cells[chunk];
            const int64_t part = chunk % cells.item_parts();
            kernels.select(call, cell, work.of(chunk), found.data() + part * count + cell.first_query);
        });
        const Chunks chunks(count, 1, 1000.0 * static_cast<double>(places));
        for_each_chunk(chunks.count, [&](int64_t chunk) {
            const auto [begin, end] = chunks[chunk];
            for (int64_t m = begin; m < end; ++m) {
                Candidates& all = found[static_cast<size_t>(m)];
                for (int64_t part = 1; part < cells.item_parts(); ++part) {
                    merge(all, found[static_cast<size_t>(part * count + m)], places, capacity);
                }
                write(all, places, k, best + (first + m) * k, best_ids + (first + m) * k);
            }
        });
    }
    return {scores, ids};
}

}  // namespace
}  // namespace xsmoe::topk_items

STABLE_TORCH_LIBRARY_FRAGMENT(xsmoe_native, m) {
    m.def(
        "topk_items(Tensor queries, Tensor items, SymInt k, Tensor? seen, Tensor? seen_offsets) -> "
        "(Tensor scores, Tensor ids)"
    );
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CPU, m) { m.impl("topk_items", TORCH_BOX(&xsmoe::topk_items::forward)); }
