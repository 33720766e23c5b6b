"""What the rooms of `rank_of_target` and `topk_items` share: queries, items, and what each query has seen."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bench.graph import on_cuda
from bench.workload import Product, Tensors, Variant, Work, Workload

# Users whose scores stand together where users are taken in chunks, and items where items are.
USERS, ITEMS = 100, 4096
BACKENDS = {"reference": "reference", "ours": "auto"}
"""Variants that are our operator, and the backend that serves them."""
# Columns of the product whose speed is the floor's: all scores at once would take too much memory.
PROBED = 8192

# Targets are few, so that none ties with another item: see `draw`.
_TARGETS = 15
_SEEN_VALUES = 20


class Ranking(Workload):
    """M queries of width d against C items; a query has seen 20 of them."""

    letters: ClassVar[Mapping[str, Sequence[int]]] = {"M": (2000,), "C": (100_000,), "d": (128,)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (200,), "C": (20_000,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (107,), "C": (4500,), "d": (24,)}

    def draw(self) -> Tensors:
        """Integers whose scores float32 holds, however they are summed: rivals get the same, or are wrong.

        Scores are multiples of 16 plus the item's last number, which is 0 but for the targets, where all differ: a sort
        puts equals in any order, and the target has none.
        """
        num_queries, num_items, dim = (self.sizes[letter] for letter in "MCd")

        def integers(least: int, most: int, *shape: int) -> Tensor:
            return torch.randint(least, most + 1, shape, generator=self.generator)

        queries, items = 16 * integers(-15, 15, num_queries, dim), integers(-100, 100, num_items, dim)
        pool = torch.randperm(num_items, generator=self.generator)[:_TARGETS]
        queries[:, -1], items[:, -1] = 1, 0
        items[pool, -1] = torch.arange(1, len(pool) + 1)
        others = torch.ones(num_items, dtype=torch.bool).index_fill_(0, pool, False).nonzero().squeeze(1)
        drawn = {
            "queries": queries.to(self.dtype),
            "items": items.to(self.dtype),
            "targets": pool[integers(0, len(pool) - 1, num_queries)],
            "seen": others[integers(0, len(others) - 1, num_queries, _SEEN_VALUES)],
        }
        return {name: tensor.to(self.device) for name, tensor in drawn.items()}

    def variants(self) -> tuple[str, ...]:
        return "published", "chunked", "compiled", "tiled", "ours", *on_cuda(self.device, "ours-graph")

    def optional(self) -> tuple[str, ...]:
        return ("reference",)

    def reference(self) -> Variant:
        return self.build("reference")

    def work(self) -> Mapping[str, Work]:
        num_queries, num_items, dim = (self.sizes[letter] for letter in "MCd")
        read = (num_queries + num_items) * dim * self.dtype.itemsize
        return {"forward": Work(Product(num_queries, dim, num_items).flop, read)}

    def products(self) -> Sequence[Product]:
        num_queries, num_items, dim = (self.sizes[letter] for letter in "MCd")
        # The first writes more than it multiplies; a kernel that writes no scores is held to the second.
        return Product(num_queries, dim, min(num_items, PROBED)), Product(1024, 1024, 1024)

    def memory(self, name: str) -> float:
        num_queries, num_items = self.sizes["M"], self.sizes["C"]
        scores = {"tiled": num_queries * ITEMS, "published": num_items}.get(name, USERS * num_items)
        return 24.0 * scores

    def _products(self) -> Mapping[str, float]:
        return {"forward": self.work()["forward"].flop}


def ragged(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of equal length as values and offsets."""
    return seen.flatten(), torch.arange(0, seen.numel() + 1, seen.shape[1], device=seen.device)


def exact_scores(rows: Tensors) -> Iterator[tuple[slice, Tensor]]:
    """Some queries at a time, their scores in float64, -inf where the item was seen."""
    items = rows["items"].double().T
    for users in chunks(len(rows["queries"])):
        yield users, (rows["queries"][users].double() @ items).scatter_(1, rows["seen"][users], -torch.inf)


def chunks(count: int) -> Iterator[slice]:
    """Users in chunks."""
    return (slice(first, min(first + USERS, count)) for first in range(0, count, USERS))
