"""Full ranking of next items: one task and one operator for models and popularity baselines."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xsmoe.data import History, Sequences
from xsmoe.data.ragged import Ragged, find
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.nn.item_ids import NO_ID
from xsmoe.stream.batches.prefetch import HiddenStates, prefetch
from xsmoe.stream.config import Repeats
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures
from xsmoe_kernels import rank_of_target

ITEMS_PER_CHUNK = 4096
USERS_PER_CHUNK = 4096


@dataclass(frozen=True)
class RankingTask:
    """Ranking of one target for each of B users, among the candidates that the user has not seen.

    Attributes:
        candidates: (C,) int64 item ids, ascending.
        inputs: (M,) int64 into candidates, the users' input items, concatenated.
        offsets: (B + 1,) int64, start of each user's inputs.
        targets: (B,) int64 into candidates.
        seen, seen_offsets: the candidates that each user has seen, ragged.
        missed: (B,) bool, targets that count as a miss whatever their rank.
    """

    candidates: np.ndarray
    inputs: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray
    seen: np.ndarray
    seen_offsets: np.ndarray
    missed: np.ndarray

    @classmethod
    def build(cls, sequences: Sequences, candidates: np.ndarray, history: History, repeats: Repeats) -> Self:
        """Build the task of predicting each sequence's last item from the items before it.

        Args:
            sequences: sequences of at least two items each, all of them among the candidates.
            candidates: ascending item ids.
            history: items that the users have seen before.
            repeats: "miss" counts a target in the history as a miss, "rank" ranks it.
        """
        codes = find(candidates, sequences.items)
        if (codes < 0).any():
            raise ValueError(f"candidates lack item {sequences.items[codes < 0][0]}, which a sequence contains")
        last = np.zeros(len(codes), dtype=bool)
        last[sequences.offsets[1:] - 1] = True
        values, bounds = history.of(sequences.users)
        seen = find(candidates, values)
        row = np.repeat(np.arange(len(sequences)), np.diff(bounds))[seen >= 0]
        seen = seen[seen >= 0]
        targets = codes[last]
        pairs, goals = row * len(candidates) + seen, np.arange(len(sequences)) * len(candidates) + targets
        return cls(
            candidates=candidates,
            inputs=codes[~last],
            offsets=sequences.offsets - np.arange(len(sequences) + 1),
            targets=targets,
            seen=seen,
            seen_offsets=np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(sequences)))]).astype(np.int64),
            missed=np.isin(goals, pairs) if repeats == "miss" else np.zeros(len(sequences), dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.targets)

    def chunk(self, start: int, stop: int) -> "RankingTask":
        """Return the task of the users start:stop."""
        inputs, seen = slice(*self.offsets[[start, stop]]), slice(*self.seen_offsets[[start, stop]])
        return RankingTask(
            candidates=self.candidates,
            inputs=self.inputs[inputs],
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            targets=self.targets[start:stop],
            seen=self.seen[seen],
            seen_offsets=self.seen_offsets[start : stop + 1] - self.seen_offsets[start],
            missed=self.missed[start:stop],
        )


@torch.no_grad()
def embed_items(model: Recommender, features: ItemFeatures, items: np.ndarray, device: torch.device) -> Tensor:
    """Return the embeddings (C, dim) of items (C,), encoded in chunks, in the model's current mode.

    An item without a row in the ID table is encoded by its content alone. Hidden states that are not cached on a GPU
    are copied there while earlier chunks are encoded.
    """
    chunks = [items[start : start + ITEMS_PER_CHUNK] for start in range(0, len(items), ITEMS_PER_CHUNK)]
    table = model.items.ids
    # Items that are newer than the last growth of the table have no row.
    known = None if table is None else _tensor(np.where(items < table.num_items, items, NO_ID), device)
    ids = [None] * len(chunks) if known is None else known.split(ITEMS_PER_CHUNK)

    def hidden(chunk: np.ndarray) -> HiddenStates:
        return HiddenStates(features.hidden(chunk, model.items.modalities))

    cached = isinstance(features, DeviceCachedFeatures)
    given = map(hidden, chunks) if cached else prefetch(hidden, chunks, device)
    parts = [model.items(found, ids=rows) for found, rows in zip(given, ids, strict=False)]
    return torch.cat(parts) if parts else torch.empty(0, model.users.dim, device=device)


def rank_with_model(model: Recommender, features: ItemFeatures, task: RankingTask, device: torch.device) -> np.ndarray:
    """Return each target's rank, (B,) float64, infinite for targets that count as a miss.

    The model is in evaluation mode during the call. The host synchronizes once, at the end. Scores are computed in the
    model's own dtype, because half precision would create ties between close scores.
    """
    ranks = []
    with evaluating(model, device):
        embeddings = embed_items(model, features, task.candidates, device)
        for start in range(0, len(task), USERS_PER_CHUNK):
            part = task.chunk(start, min(start + USERS_PER_CHUNK, len(task)))
            queries = encode_users(model, embeddings, part, device)
            ranks.append(rank(queries, embeddings, part.targets, (part.seen, part.seen_offsets), device))
    return _with_misses(torch.cat(ranks), task) if ranks else np.empty(0)


@contextmanager
def evaluating(model: Recommender, device: torch.device) -> Iterator[None]:
    """Set evaluation mode, without gradients and autocast, and restore the model's mode after the block."""
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            yield
        finally:
            model.train(training)


def encode_users(model: Recommender, embeddings: Tensor, task: RankingTask, device: torch.device) -> Tensor:
    """Return the queries (B, dim) of a task's users from the candidates' embeddings (C, dim)."""
    inputs = functional.embedding(_tensor(task.inputs, device), embeddings)
    lengths = np.diff(task.offsets).tolist()
    return model.queries(inputs, _tensor(task.offsets, device), lengths=lengths)


def rank_with_popularity(popularity: np.ndarray, task: RankingTask) -> np.ndarray:
    """Return each target's rank, (B,) float64, for scores (C,) that are the same for all users."""
    queries, items = torch.ones(len(task), 1), torch.from_numpy(popularity).float()[:, None]
    ranks = rank(queries, items, task.targets, (task.seen, task.seen_offsets), torch.device("cpu"))
    return _with_misses(ranks, task)


def rank(queries: Tensor, items: Tensor, targets: np.ndarray, seen: Ragged, device: torch.device) -> Tensor:
    """Return each target's rank, (B,) int64 on the device: see `xsmoe_kernels.rank_of_target`."""
    values, offsets = seen
    return rank_of_target(queries, items, _tensor(targets, device), (_tensor(values, device), _tensor(offsets, device)))


def _with_misses(ranks: Tensor, task: RankingTask) -> np.ndarray:
    """Copy ranks to the host, and make them infinite for targets that count as a miss."""
    values = ranks.cpu().numpy().astype(np.float64)
    values[task.missed] = np.inf
    return values


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
