"""`topk_items`: the k best of C items for each of M queries, without those that the query has seen."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bench.graph import replayed_like
from bench.kernels.ranking import BACKENDS, ITEMS, Ranking, chunks, exact_scores, ragged
from bench.workload import Tensors, Variant
from xsmoe_kernels import topk_items, use_backend


class TopkItems(Ranking):
    """Forward gives scores and ids. Rivals order equals as they like, so that the gate looks at the scores alone."""

    operator: ClassVar[str] = "topk_items"
    letters: ClassVar[Mapping[str, Sequence[int]]] = {**Ranking.letters, "k": (10, 100)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {**Ranking.quick_sizes, "k": (10,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {**Ranking.tiny_sizes, "k": (10,)}

    @property
    def title(self) -> str:
        return f"each query's best {self.sizes['k']} of the items that it has not seen"

    def exact(self, rows: Tensors) -> Tensors:
        return {"y": torch.cat([scores.topk(self.sizes["k"]).values for _, scores in exact_scores(rows)])}

    def build(self, name: str) -> Variant:
        k = self.sizes["k"]
        if backend := BACKENDS.get(name):
            return self._ours(name, backend)
        if name == "ours-graph":
            return replayed_like(self.build, name, self.device)
        if name == "published":
            return self._variant(name, lambda rows: _published(rows, k))
        if name == "chunked":
            return self._variant(name, lambda rows: _chunked(rows, k, _best))
        if name == "compiled":
            run = torch.compile(_best, fullgraph=True, dynamic=False)
            return self._variant(name, lambda rows: _chunked(rows, k, run), compiled=True)
        if name == "tiled":
            return self._variant(name, lambda rows: _tiled(rows, k))
        raise ValueError(f"topk_items has no variant {name!r}")

    def _ours(self, name: str, backend: str) -> Variant:
        def forward(rows: Tensors) -> tuple[Tensor, Tensor]:
            with use_backend(backend):
                return topk_items(rows["queries"], rows["items"], self.sizes["k"], ragged(rows["seen"]))

        return self._variant(name, forward)

    def _variant(
        self, name: str, run: Callable[[Tensors], tuple[Tensor, Tensor]], *, compiled: bool = False
    ) -> Variant:
        def forward(rows: Tensors) -> Tensors:
            return dict(zip(("y", "ids"), run(rows), strict=True))

        return Variant(name, forward, lambda _: {}, products=self._products(), compiled=compiled)


def _published(rows: Tensors, k: int) -> tuple[Tensor, Tensor]:
    """User by user: all scores, what was seen struck out, sorted, and the first of them kept."""
    items, found = rows["items"].float(), []
    for query, seen in zip(rows["queries"].float(), rows["seen"], strict=True):
        scores = items @ query
        scores[seen] = -torch.inf
        order = scores.argsort(descending=True)[:k]
        found.append((scores[order], order))
    best, ids = zip(*found, strict=True)
    return torch.stack(best), torch.stack(ids)


def _best(queries: Tensor, columns: Tensor, seen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, ids = (queries @ columns).scatter(1, seen, -torch.inf).topk(k)
    return best, ids


def _chunked(
    rows: Tensors, k: int, best: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    queries, columns = rows["queries"].float(), rows["items"].float().T
    found = [best(queries[users], columns, rows["seen"][users], k) for users in chunks(len(queries))]
    scores, ids = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(ids)


def _tiled(rows: Tensors, k: int) -> tuple[Tensor, Tensor]:
    """All users and some items at a time, merged with the best so far."""
    queries, seen = rows["queries"].float(), rows["seen"]
    best = queries.new_full((len(queries), k), -torch.inf)
    ids = torch.full_like(best, -1, dtype=torch.int64)
    for first in range(0, len(rows["items"]), ITEMS):
        tile = rows["items"][first : first + ITEMS]
        # One column more takes what lies in other tiles.
        scores = queries.new_empty(len(queries), len(tile) + 1)
        torch.mm(queries, tile.float().T, out=scores[:, :-1])
        place = seen - first
        scores.scatter_(1, place.where((place >= 0) & (place < len(tile)), len(tile)), -torch.inf)
        scores[:, -1] = -torch.inf
        mine = scores.topk(min(k, len(tile)))
        best, order = torch.cat((best, mine.values), 1).topk(k)
        ids = torch.cat((ids, first + mine.indices), 1).gather(1, order)
    return best, ids
