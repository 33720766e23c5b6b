"""Full ranking of next items: model and popularity baselines answer the same task through the same operator."""

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
from xsmoe.stream.batches.prefetch import feed
from xsmoe.stream.config import Repeats
from xsmoe.stream.hidden_states.device_cache import ResidentFeatures
from xsmoe.stream.hidden_states.transfer import HiddenStates
from xsmoe_kernels import rank_of_target

ITEMS_A_CHUNK = 4096
USERS_A_CHUNK = 4096


@dataclass(frozen=True)
class RankingTask:
    """For each of B users: up to ten input items, and the target to find among the candidates that they have not met.

    Attributes:
        candidates: (C,) int64 item ids, ascending.
        inputs: (M,) int64 into candidates, the users' inputs laid end to end.
        offsets: (B + 1,) int64, where each user's inputs begin.
        targets: (B,) int64 into candidates.
        seen, seen_offsets: the candidates that each user has met, ragged.
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
        """The task of finding each sequence's last item from those before it.

        Args:
            sequences: of at least two items each, all of them among the candidates.
            candidates: ascending item ids.
            history: what the users met before.
            repeats: "miss" makes a target that stands in the history a sure miss, "rank" ranks it.
        """
        codes = find(candidates, sequences.items)
        if (codes < 0).any():
            raise ValueError(f"candidates lack item {sequences.items[codes < 0][0]}, which a sequence holds")
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
        """The task of the users start:stop."""
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
    """The embeddings (C, dim) of items (C,), encoded in chunks; the model is used in the mode it is in.

    An item that the ID table has no row for yet is encoded by its content alone. Hidden states that do not lie on a GPU
    are copied there while it encodes earlier chunks.
    """
    chunks = [items[start : start + ITEMS_A_CHUNK] for start in range(0, len(items), ITEMS_A_CHUNK)]
    table = model.items.ids
    # Items that have arrived since the table last grew have no row yet.
    known = None if table is None else _tensor(np.where(items < table.num_items, items, NO_ID), device)
    ids = [None] * len(chunks) if known is None else known.split(ITEMS_A_CHUNK)

    def hidden(chunk: np.ndarray) -> HiddenStates:
        return HiddenStates(features.hidden(chunk, model.items.modalities))

    resident = isinstance(features, ResidentFeatures)
    given = map(hidden, chunks) if resident else feed(hidden, chunks, device)
    parts = [model.items(found, ids=rows) for found, rows in zip(given, ids, strict=False)]
    return torch.cat(parts) if parts else torch.empty(0, model.users.dim, device=device)


def rank_with_model(model: Recommender, features: ItemFeatures, task: RankingTask, device: torch.device) -> np.ndarray:
    """Each target's rank, (B,) float64; a sure miss is infinite. The model is put into evaluation mode and back.

    The host waits for the device once, at the end. Scores are computed in the model's own dtype, because half precision
    makes ties of close ones.
    """
    ranks = []
    with evaluating(model, device):
        embeddings = embed_items(model, features, task.candidates, device)
        for start in range(0, len(task), USERS_A_CHUNK):
            part = task.chunk(start, min(start + USERS_A_CHUNK, len(task)))
            queries = encode_users(model, embeddings, part, device)
            ranks.append(rank(queries, embeddings, part.targets, (part.seen, part.seen_offsets), device))
    return _missing_some(torch.cat(ranks), task) if ranks else np.empty(0)


@contextmanager
def evaluating(model: Recommender, device: torch.device) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients and autocast, and back into its mode afterwards."""
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            yield
        finally:
            model.train(training)


def encode_users(model: Recommender, embeddings: Tensor, task: RankingTask, device: torch.device) -> Tensor:
    """Return the queries (B, dim) of a task's users, from the candidates' embeddings (C, dim)."""
    inputs = functional.embedding(_tensor(task.inputs, device), embeddings)
    lengths = np.diff(task.offsets).tolist()
    return model.queries(inputs, _tensor(task.offsets, device), lengths=lengths)


def rank_with_popularity(popularity: np.ndarray, task: RankingTask) -> np.ndarray:
    """Each target's rank, (B,) float64, when the same scores (C,) serve every user."""
    queries, items = torch.ones(len(task), 1), torch.from_numpy(popularity).float()[:, None]
    ranks = rank(queries, items, task.targets, (task.seen, task.seen_offsets), torch.device("cpu"))
    return _missing_some(ranks, task)


def rank(queries: Tensor, items: Tensor, targets: np.ndarray, seen: Ragged, device: torch.device) -> Tensor:
    """Return each target's rank, (B,) int64 on the device: see `xsmoe_kernels.rank_of_target`."""
    values, offsets = seen
    return rank_of_target(queries, items, _tensor(targets, device), (_tensor(values, device), _tensor(offsets, device)))


def _missing_some(ranks: Tensor, task: RankingTask) -> np.ndarray:
    """Ranks on the host, infinite for targets that count as a miss."""
    values = ranks.cpu().numpy().astype(np.float64)
    values[task.missed] = np.inf
    return values


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
