"""`rank_of_target` and `topk_items`: scores of M queries of width d against C items.

Both operators ignore the items that a query has seen, and their baselines compute scores in the same ways.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bench.core.benchmark import Benchmark, Implementation, Product, Tensors, Variant, Work
from bench.core.cuda_graphs import our_variants
from bench.core.results import Role
from xsmoe_kernels import rank_of_target, topk_items, use_backend

# Users per chunk of the chunked variants, and items per tile of the tiled ones.
USERS, ITEMS = 100, 4096
# Columns of the product that is measured for the bound. All scores at once would need too much memory.
PROBED_COLUMNS = 8192
# Few targets, so that none ties with another item: see `make_inputs`.
_TARGETS = 15
_SEEN_ITEMS = 20


class Ranking(Benchmark):
    """The inputs, variants and bound of both operators."""

    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (2000,), "C": (100_000,), "d": (128,)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (200,), "C": (20_000,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"M": (107,), "C": (4500,), "d": (24,)}
    # Backends with a variant of their own on a GPU.
    named_backends: ClassVar[Sequence[str]] = ()

    def make_inputs(self) -> Tensors:
        """Return integers whose scores float32 represents exactly in every order of summation.

        Scores are multiples of 16 plus the item's last number. That number is 0 except for the targets, where all
        differ. A sort returns ties in any order, and a target has no ties.
        """
        num_queries, num_items, dim = (self.sizes[letter] for letter in "MCd")

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=self.generator)

        queries, items = 16 * integers(-15, 15, num_queries, dim), integers(-100, 100, num_items, dim)
        pool = torch.randperm(num_items, generator=self.generator)[:_TARGETS]
        queries[:, -1], items[:, -1] = 1, 0
        items[pool, -1] = torch.arange(1, len(pool) + 1)
        others = torch.ones(num_items, dtype=torch.bool).index_fill_(0, pool, False).nonzero().squeeze(1)
        drawn = {
            "queries": queries.to(self.dtype),
            "items": items.to(self.dtype),
            "targets": pool[integers(0, len(pool) - 1, num_queries)],
            "seen": others[integers(0, len(others) - 1, num_queries, _SEEN_ITEMS)],
        }
        return {name: tensor.to(self.device) for name, tensor in drawn.items()}

    def variants(self) -> list[Variant]:
        num_queries, num_items = self.sizes["M"], self.sizes["C"]
        chunk = 24.0 * USERS * num_items

        return [
            Variant("published", Role.PAPER, lambda: self._implementation(self._published), baseline=True,
                    peak_estimate=24.0 * num_items),
            Variant("chunked", Role.EAGER, lambda: self._implementation(self._chunked(self._chunk)),
                    peak_estimate=chunk),
            Variant("compiled", Role.COMPILED, self._compiled, compiled=True, peak_estimate=chunk),
            Variant("tiled", Role.EAGER, lambda: self._implementation(self._tiled),
                    peak_estimate=24.0 * num_queries * ITEMS),
            *our_variants(self, self._ours, self.named_backends, peak_estimate=chunk),
            Variant("reference", Role.REFERENCE, self.reference, default=False, peak_estimate=chunk),
        ]  # fmt: skip

    def reference(self) -> Implementation:
        return self._ours("reference")

    def work(self) -> Mapping[str, Work]:
        num_queries, num_items, dim = (self.sizes[letter] for letter in "MCd")
        read = (num_queries + num_items) * dim * self.dtype.itemsize
        return {"forward": Work(Product(num_queries, dim, num_items).flop, read)}

    def products(self) -> Sequence[Product]:
        num_queries, num_items, dim = (self.sizes[letter] for letter in "MCd")
        # The first one is limited by its writes. A kernel that writes no scores is compared with the second one.
        return Product(num_queries, dim, min(num_items, PROBED_COLUMNS)), Product(1024, 1024, 1024)

    def _compiled(self) -> Implementation:
        return self._implementation(self._chunked(torch.compile(self._chunk, fullgraph=True, dynamic=False)))

    def _implementation(self, run: Callable[[Tensors], Tensors]) -> Implementation:
        return Implementation(run, flop={"forward": self.work()["forward"].flop})

    def _ours(self, backend: str) -> Implementation:
        self.require(backend, self.operator)

        def forward(inputs: Tensors) -> Tensors:
            with use_backend(backend):
                return self._operator(inputs)

        return self._implementation(forward)

    def _chunked(self, chunk: Callable[..., Tensors]) -> Callable[[Tensors], Tensors]:
        """Return a function that calls `chunk` with some users at a time."""

        def run(inputs: Tensors) -> Tensors:
            queries, columns = inputs["queries"].float(), inputs["items"].float().T
            targets, seen = inputs["targets"], inputs["seen"]
            found = [chunk(queries[users], columns, targets[users], seen[users]) for users in _chunks(len(queries))]
            return {name: torch.cat([one[name] for one in found]) for name in found[0]}

        return run

    def _operator(self, inputs: Tensors) -> Tensors:
        """Call our operator."""
        raise NotImplementedError

    def _chunk(self, queries: Tensor, columns: Tensor, targets: Tensor, seen: Tensor) -> Tensors:
        """Return the results of some users from all their scores."""
        raise NotImplementedError

    def _published(self, inputs: Tensors) -> Tensors:
        """User by user: compute all scores, mask the seen items, and sort."""
        raise NotImplementedError

    def _tiled(self, inputs: Tensors) -> Tensors:
        """Process all users and some items at a time."""
        raise NotImplementedError


class RankOfTarget(Ranking):
    """Forward returns the ranks; there is no backward."""

    operator: ClassVar[str] = "rank_of_target"
    named_backends: ClassVar[Sequence[str]] = ("triton", "cuda")

    @property
    def title(self) -> str:
        return "the rank of each query's target among the items that the query has not seen"

    def exact(self, inputs: Tensors) -> Tensors:
        ranks = torch.empty_like(inputs["targets"])
        for users, scores in _exact_scores(inputs):
            ranks[users] = 1 + (scores > scores.gather(1, inputs["targets"][users, None])).sum(1)
        return {"y": ranks}

    def _operator(self, inputs: Tensors) -> Tensors:
        return {"y": rank_of_target(inputs["queries"], inputs["items"], inputs["targets"], _ragged(inputs["seen"]))}

    def _chunk(self, queries: Tensor, columns: Tensor, targets: Tensor, seen: Tensor) -> Tensors:
        scores = queries @ columns
        own = scores.gather(1, targets[:, None])
        scores = scores.scatter(1, seen, -torch.inf)
        return {"y": 1 + (scores > own).sum(1) + (scores == own).sum(1) // 2}

    def _published(self, inputs: Tensors) -> Tensors:
        items, ranks = inputs["items"].float(), []
        for query, target, seen in zip(inputs["queries"].float(), inputs["targets"], inputs["seen"], strict=True):
            scores = items @ query
            scores[seen] = -torch.inf
            order = scores.argsort(descending=True)
            ranks.append(1 + (order == target).nonzero()[0, 0])
        return {"y": torch.stack(ranks)}

    def _tiled(self, inputs: Tensors) -> Tensors:
        queries, items = inputs["queries"].float(), inputs["items"]
        own = (queries * items[inputs["targets"]]).sum(1, keepdim=True)
        # Seen items are scored again, and subtracted.
        seen = torch.bmm(items[inputs["seen"]].float(), queries[:, :, None]).squeeze(2)
        # An item that is listed twice is subtracted once.
        values = inputs["seen"].sort(dim=1)
        first = torch.cat((torch.ones_like(own, dtype=torch.bool), values.values.diff() > 0), 1)
        seen = seen.gather(1, values.indices).where(first, -torch.inf)
        higher, equal = -(seen > own).sum(1), -(seen == own).sum(1)
        for tile in items.split(ITEMS):
            scores = queries @ tile.float().T
            higher += (scores > own).sum(1)
            equal += (scores == own).sum(1)
        return {"y": 1 + higher + equal // 2}


class TopkItems(Ranking):
    """Forward returns the k best scores and their ids.

    Baselines order ties differently, so the correctness check compares the scores only.
    """

    operator: ClassVar[str] = "topk_items"
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {**Ranking.default_sizes, "k": (10, 100)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {**Ranking.quick_sizes, "k": (10,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {**Ranking.tiny_sizes, "k": (10,)}

    @property
    def title(self) -> str:
        return f"each query's best {self.sizes['k']} of the items that it has not seen"

    def exact(self, inputs: Tensors) -> Tensors:
        return {"y": torch.cat([scores.topk(self.sizes["k"]).values for _, scores in _exact_scores(inputs)])}

    def _operator(self, inputs: Tensors) -> Tensors:
        y, ids = topk_items(inputs["queries"], inputs["items"], self.sizes["k"], _ragged(inputs["seen"]))
        return {"y": y, "ids": ids}

    def _chunk(self, queries: Tensor, columns: Tensor, targets: Tensor, seen: Tensor) -> Tensors:
        best, ids = (queries @ columns).scatter(1, seen, -torch.inf).topk(self.sizes["k"])
        return {"y": best, "ids": ids}

    def _published(self, inputs: Tensors) -> Tensors:
        items, found = inputs["items"].float(), []
        for query, seen in zip(inputs["queries"].float(), inputs["seen"], strict=True):
            scores = items @ query
            scores[seen] = -torch.inf
            order = scores.argsort(descending=True)[: self.sizes["k"]]
            found.append((scores[order], order))
        best, ids = zip(*found, strict=True)
        return {"y": torch.stack(best), "ids": torch.stack(ids)}

    def _tiled(self, inputs: Tensors) -> Tensors:
        queries, seen, k = inputs["queries"].float(), inputs["seen"], self.sizes["k"]
        best = queries.new_full((len(queries), k), -torch.inf)
        ids = torch.full_like(best, -1, dtype=torch.int64)
        for first in range(0, len(inputs["items"]), ITEMS):
            tile = inputs["items"][first : first + ITEMS]
            # The additional column receives the writes for seen items of other tiles.
            scores = queries.new_empty(len(queries), len(tile) + 1)
            torch.mm(queries, tile.float().T, out=scores[:, :-1])
            place = seen - first
            scores.scatter_(1, place.where((place >= 0) & (place < len(tile)), len(tile)), -torch.inf)
            scores[:, -1] = -torch.inf
            mine = scores.topk(min(k, len(tile)))
            best, order = torch.cat((best, mine.values), 1).topk(k)
            ids = torch.cat((ids, first + mine.indices), 1).gather(1, order)
        return {"y": best, "ids": ids}


def _ragged(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of equal length as values and offsets."""
    return seen.flatten(), torch.arange(0, seen.numel() + 1, seen.shape[1], device=seen.device)


def _exact_scores(inputs: Tensors) -> Iterator[tuple[slice, Tensor]]:
    """Yield float64 scores of some queries at a time, with -inf for seen items."""
    items = inputs["items"].double().T
    for users in _chunks(len(inputs["queries"])):
        yield users, (inputs["queries"][users].double() @ items).scatter_(1, inputs["seen"][users], -torch.inf)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + USERS, count)) for first in range(0, count, USERS))
