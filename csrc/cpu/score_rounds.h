// The loop structure of scoring: queries are processed in rounds, which bounds the memory. A round is divided into
// cells for torch's threads.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/scoring.h"
#include "cpu/tensors.h"

namespace xsmoe {

// The seen items of all queries: ragged lists in any order. A round gets them in ascending order and without
// duplicates.
class SeenLists {
public:
    SeenLists(const std::optional<Tensor>& values, const std::optional<Tensor>& offsets) {
        if (!values || !offsets) return;
        values_ = torch::stable::contiguous(*values);
        offsets_ = *offsets;
    }

    // Return the end of a round that begins at query `first`: `last`, or less if the seen items of these queries would
    // need too much memory.
    int64_t round_end(int64_t first, int64_t last) const {
        if (!values_) return last;
        while (last - first > 1 && bound(last) - bound(first) > max_values) last = first + (last - first) / 2;
        return last;
    }

    // Return the seen items of the queries [first, last), valid until the next call. Lists in ascending order are not
    // copied.
    const SeenItems* of(int64_t first, int64_t last) {
        rows_.assign(static_cast<size_t>(last - first), SeenItems{nullptr, nullptr});
        if (!values_ || values_->size(0) == 0) return rows_.data();
        const auto* values = static_cast<const int64_t*>(data(*values_));
        std::vector<int64_t> unsorted;
        int64_t copied = 0;
        for (int64_t query = first; query < last; ++query) {
            SeenItems& row = rows_[static_cast<size_t>(query - first)];
            row = {values + bound(query), values + bound(query + 1)};
            const auto falls = [](int64_t a, int64_t b) { return a >= b; };
            if (std::adjacent_find(row.first, row.last, falls) == row.last) continue;
            unsorted.push_back(query - first);
            copied += row.last - row.first;
        }
        if (copied == 0) return rows_.data();
        sorted_ = empty(*values_, {copied}, ScalarType::Long);
        auto* to = mutable_data_as<int64_t>(*sorted_);
        std::vector<int64_t*> places;
        for (int64_t row : unsorted) {
            places.push_back(to);
            to += rows_[static_cast<size_t>(row)].last - rows_[static_cast<size_t>(row)].first;
        }
        const auto lists = static_cast<int64_t>(unsorted.size());
        const Chunks chunks(lists, 1, 100.0 * static_cast<double>(copied / lists + 1));
        for_each_chunk(chunks.count, [&](int64_t chunk) {
            const auto [begin, end] = chunks[chunk];
            for (int64_t i = begin; i < end; ++i) {
                SeenItems& row = rows_[static_cast<size_t>(unsorted[static_cast<size_t>(i)])];
                int64_t* place = places[static_cast<size_t>(i)];
                int64_t* after = std::copy(row.first, row.last, place);
                std::sort(place, after);
                row = {place, std::unique(place, after)};
            }
        });
        return rows_.data();
    }

private:
    static constexpr int64_t max_values = int64_t{1} << 21;  // 16 MiB

    int64_t bound(int64_t i) const {
        const int64_t at = i * offsets_->stride(0);
        if (offsets_->scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(data(*offsets_))[at];
        return static_cast<const int64_t*>(data(*offsets_))[at];
    }

    std::optional<Tensor> values_, offsets_, sorted_;
    std::vector<SeenItems> rows_;
};

// The division of a round's queries and of the items into cells. Items are divided first, because every cell packs its
// items. Queries are divided only if there are more threads than parts of the items.
class Cells {
public:
    Cells(int64_t queries, int64_t query_block, int64_t items, int64_t item_block, int64_t dim)
        : items_(items, item_block, cost(queries, dim)),
          queries_(queries, query_block, cost(items, dim), std::max<int64_t>(1, threads() / items_.count)) {}

    int64_t count() const { return items_.count * queries_.count; }

    // The number of parts of the items. This many consecutive cells have the same queries.
    int64_t item_parts() const { return items_.count; }

    Cell operator[](int64_t cell) const {
        const auto [first_query, last_query] = queries_[cell / items_.count];
        const auto [first_item, last_item] = items_[cell % items_.count];
        return {first_query, last_query, first_item, last_item};
    }

    // Return the largest number of queries in a cell.
    int64_t max_queries() const {
        int64_t most = 0;
        for (int64_t part = 0; part < queries_.count; ++part) {
            const auto [first, last] = queries_[part];
            most = std::max(most, last - first);
        }
        return most;
    }

private:
    static int64_t threads() { return int64_t{torch::stable::get_num_threads()}; }

    // Return the work of a query or an item: its product with all others, and one comparison per score.
    static double cost(int64_t others, int64_t dim) {
        return 2.0 * static_cast<double>(others) * static_cast<double>(dim + 16);
    }

    Chunks items_, queries_;
};

// Return the number of queries in a round: enough to amortize packing the items, few enough to keep a copy of the
// queries small.
inline int64_t queries_of_round(int64_t dim) {
    return std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(dim, 1), 256, 4096);
}

}  // namespace xsmoe
