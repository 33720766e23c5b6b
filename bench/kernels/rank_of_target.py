"""`rank_of_target`: the ranks of M targets among C items, without those that the query has seen."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from bench import graph
from bench.kernels import ranking
from bench.kernels.ranking import ITEMS, Ranking, chunks, exact_scores, ragged
from bench.workload import Tensors, Variant
from xsmoe_kernels import rank_of_target, use_backend

BACKENDS = {**ranking.BACKENDS, "ours-triton": "triton", "ours-cuda": "cuda"}
"""Variants that are our operator, and the backend that serves them."""


class RankOfTarget(Ranking):
    """Forward gives the ranks; there is no backward."""

    operator: ClassVar[str] = "rank_of_target"

    @property
    def title(self) -> str:
        return "the rank of each query's target among the items that the query has not seen"

    def variants(self) -> tuple[str, ...]:
        named = "ours-triton", "ours-triton-graph", "ours-cuda", "ours-cuda-graph"
        return *super().variants(), *graph.on_cuda(self.device, *named)

    def exact(self, rows: Tensors) -> Tensors:
        ranks = torch.empty_like(rows["targets"])
        for users, scores in exact_scores(rows):
            ranks[users] = 1 + (scores > scores.gather(1, rows["targets"][users, None])).sum(1)
        return {"y": ranks}

    def build(self, name: str) -> Variant:
        if name in BACKENDS:
            return self._ours(name)
        if (base := name.removesuffix("-graph")) != name and base in BACKENDS:
            return graph.replayed_like(self.build, name, self.device)
        if name == "published":
            return self._variant(name, _published)
        if name == "chunked":
            return self._variant(name, lambda rows: _chunked(rows, _rank))
        if name == "compiled":
            run = torch.compile(_rank, fullgraph=True, dynamic=False)
            return self._variant(name, lambda rows: _chunked(rows, run), compiled=True)
        if name == "tiled":
            return self._variant(name, _tiled)
        raise ValueError(f"rank_of_target has no variant {name!r}")

    def _ours(self, name: str) -> Variant:
        backend = BACKENDS[name]
        self.need(backend, "rank_of_target")

        def forward(rows: Tensors) -> Tensor:
            with use_backend(backend):
                return rank_of_target(rows["queries"], rows["items"], rows["targets"], ragged(rows["seen"]))

        return self._variant(name, forward)

    def _variant(self, name: str, run: Callable[[Tensors], Tensor], *, compiled: bool = False) -> Variant:
        return Variant(name, lambda rows: {"y": run(rows)}, lambda _: {}, products=self._products(), compiled=compiled)


def _published(rows: Tensors) -> Tensor:
    """User by user: all scores, what was seen struck out, sorted, and the target looked up in the order."""
    items, ranks = rows["items"].float(), []
    for query, target, seen in zip(rows["queries"].float(), rows["targets"], rows["seen"], strict=True):
        scores = items @ query
        scores[seen] = -torch.inf
        order = scores.argsort(descending=True)
        ranks.append(1 + (order == target).nonzero()[0, 0])
    return torch.stack(ranks)


def _rank(queries: Tensor, columns: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
    scores = queries @ columns
    own = scores.gather(1, targets[:, None])
    scores = scores.scatter(1, seen, -torch.inf)
    return 1 + (scores > own).sum(1) + (scores == own).sum(1) // 2


def _chunked(rows: Tensors, rank: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    queries, columns = rows["queries"].float(), rows["items"].float().T
    return torch.cat(
        [rank(queries[users], columns, rows["targets"][users], rows["seen"][users]) for users in chunks(len(queries))]
    )


def _tiled(rows: Tensors) -> Tensor:
    """All users and some items at a time; what was seen is scored once more and taken back out."""
    queries, items = rows["queries"].float(), rows["items"]
    own = (queries * items[rows["targets"]]).sum(1, keepdim=True)
    seen = torch.bmm(items[rows["seen"]].float(), queries[:, :, None]).squeeze(2)
    # Listed twice, left out once.
    values = rows["seen"].sort(dim=1)
    first = torch.cat((torch.ones_like(own, dtype=torch.bool), values.values.diff() > 0), 1)
    seen = seen.gather(1, values.indices).where(first, -torch.inf)
    higher, equal = -(seen > own).sum(1), -(seen == own).sum(1)
    for tile in items.split(ITEMS):
        scores = queries @ tile.float().T
        higher += (scores > own).sum(1)
        equal += (scores == own).sum(1)
    return 1 + higher + equal // 2
