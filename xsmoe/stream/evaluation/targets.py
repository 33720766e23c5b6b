"""Targets of a test window, and their ranks with two maskings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

from xsmoe.data import History, ragged, whole_sequences
from xsmoe.data.ragged import Ragged
from xsmoe.data.sequences import Pairs
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.evaluation.full_ranking import (
    USERS_PER_CHUNK,
    RankingTask,
    embed_items,
    encode_users,
    evaluating,
    rank,
)

SCORINGS = ("seen", "masked")
"""Items excluded from the candidates. "seen": the user's items of earlier windows. "masked": these, and the user's
earlier items of this window."""
SEEN_PER_CHUNK = 1 << 24
"""Largest number of excluded items in a chunk of targets. A single target may have more."""

Ranks = dict[str, np.ndarray]
"""Ranks (T,) float64 of targets by scoring; infinite for targets that count as a miss."""


class Chunk(NamedTuple):
    """Some targets with all data for their ranking.

    Attributes:
        task: task of one target for each user, with the items seen in earlier windows.
        masked: these items and the user's earlier items of this window, ragged. An item may occur twice.
    """

    task: RankingTask
    masked: Ragged

    def excluded(self, scoring: str) -> Ragged:
        """Return the items, ragged, that a scoring excludes from the candidates."""
        return self.masked if scoring == "masked" else (self.task.seen, self.task.seen_offsets)


@dataclass(frozen=True)
class RankedTargets:
    """T targets of B users: the users' last targets first, then the others, users ascending.

    The inputs of a target are those that serving would use: up to `max_inputs` items of its user before the target in
    the window.

    Attributes:
        candidates: (C,) int64 item ids, ascending.
        users: (B,) int64 ids, ascending.
        items: (N,) int64 into candidates: all items of these users in the window, in time order, user by user.
        row: (T,) int64 into users: the user of the target.
        first, place: (T,) int64 into items: the first item of the user, and the target.
        seen: the candidates that each user has seen in earlier windows, ragged.
        known: (T,) bool, targets that the user has seen in earlier windows.
        repeated: (T,) bool, targets that the user has seen in earlier windows or earlier in this window.
        missed: (T,) bool, targets that count as a miss whatever their rank.
        max_inputs: largest number of inputs of a target.
    """

    candidates: np.ndarray
    users: np.ndarray
    items: np.ndarray
    row: np.ndarray
    first: np.ndarray
    place: np.ndarray
    seen: Ragged
    known: np.ndarray
    repeated: np.ndarray
    missed: np.ndarray
    max_inputs: int

    @classmethod
    def build(cls, pairs: Pairs, candidates: np.ndarray, history: History, config: StreamConfig) -> Self:
        """Find the targets of a window.

        Args:
            pairs: the window's interactions, in time order. All items must be candidates.
            candidates: ascending item ids.
            history: items that the users have seen in earlier windows.
            config: `targets` selects which of a user's last `max_inputs + 1` items are ranked. `repeats` determines
                whether a target in the history counts as a miss.
        """
        whole = whole_sequences(pairs)
        items = ragged.find(candidates, whole.items)
        if (items < 0).any():
            raise ValueError(f"candidates lack item {whole.items[items < 0][0]}, which the window contains")
        starts, last = whole.offsets[:-1], whole.offsets[1:] - 1
        # All but the first and the last item of each user's sequence.
        more = np.minimum(whole.lengths, config.max_inputs + 1) - 2 if config.targets == "all" else 0 * last
        earlier, _ = ragged.gather(np.arange(len(items)), last - more, more)
        row = np.concatenate([np.arange(len(whole)), np.repeat(np.arange(len(whole)), more)])
        place = np.concatenate([last, earlier])

        values, bounds = history.of(whole.users)
        values, owner = ragged.find(candidates, values), ragged.row_of(bounds)
        owner, values = owner[values >= 0], values[values >= 0]
        keys = ragged.row_of(whole.offsets) * len(candidates) + items
        fresh = np.zeros(len(items), dtype=bool)
        fresh[np.unique(keys, return_index=True)[1]] = True
        known = ragged.find(owner * len(candidates) + values, keys[place]) >= 0
        return cls(
            candidates=candidates,
            users=whole.users,
            items=items,
            row=row,
            first=starts[row],
            place=place,
            seen=(values, ragged.offsets_of(np.bincount(owner, minlength=len(whole)))),
            known=known,
            repeated=known | ~fresh[place],
            missed=known if config.repeats == "miss" else np.zeros(len(place), dtype=bool),
            max_inputs=config.max_inputs,
        )

    def __len__(self) -> int:
        return len(self.place)

    @property
    def items_to_find(self) -> np.ndarray:
        """Item ids of the targets, (T,) int64."""
        return self.candidates[self.items[self.place]]

    def chunks(self) -> Iterator[Chunk]:
        """Yield all targets in order, in chunks of limited size. A chunk has only last targets, or none of them."""
        total = ragged.offsets_of(np.diff(self.seen[1])[self.row] + self.place - self.first)
        last = len(self.users)
        for start, end in ((0, last), (last, len(self))):
            while start < end:
                bound = int(np.searchsorted(total, total[start] + SEEN_PER_CHUNK, side="right")) - 1
                stop = min(start + USERS_PER_CHUNK, end, max(start + 1, bound))
                yield self._chunk(slice(start, stop))
                start = stop

    def _chunk(self, part: slice) -> Chunk:
        first, place, row = self.first[part], self.place[part], self.row[part]
        lengths = np.minimum(place - first, self.max_inputs)
        inputs, offsets = ragged.gather(self.items, place - lengths, lengths)
        values, bounds = self.seen
        starts, counts = bounds[row], np.diff(bounds)[row]
        seen, seen_offsets = ragged.gather(values, starts, counts)
        # Each target has two slices of the concatenated arrays: the user's items of earlier windows and of this one.
        masked, halves = ragged.gather(
            np.concatenate([values, self.items]),
            np.stack([starts, len(values) + first], axis=1).reshape(-1),
            np.stack([counts, place - first], axis=1).reshape(-1),
        )
        task = RankingTask(
            candidates=self.candidates,
            inputs=inputs,
            offsets=offsets,
            targets=self.items[place],
            seen=seen,
            seen_offsets=seen_offsets,
            missed=self.missed[part],
        )
        return Chunk(task, (masked, halves[::2].copy()))


def rank_targets(model: Recommender, features: ItemFeatures, targets: RankedTargets, device: torch.device) -> Ranks:
    """Rank every target with a model under both scorings.

    Items are embedded once, and every target's inputs are encoded once. The ranks of the last targets are bitwise equal
    to those of a task without other targets. The host synchronizes with the device once, at the end.

    Args:
        model: in evaluation mode during the call.
        features: the items' hidden states.
        targets: the targets.
        device: device of the model.
    """
    ranks: dict[str, list[torch.Tensor]] = {scoring: [] for scoring in SCORINGS}
    with evaluating(model, device):
        embeddings = embed_items(model, features, targets.candidates, device)
        for chunk in targets.chunks():
            queries = encode_users(model, embeddings, chunk.task, device)
            for scoring, found in ranks.items():
                found.append(rank(queries, embeddings, chunk.task.targets, chunk.excluded(scoring), device))
    return {
        scoring: with_misses(torch.cat(found).cpu().numpy() if found else np.empty(0), targets)
        for scoring, found in ranks.items()
    }


def with_misses(ranks: np.ndarray, targets: RankedTargets) -> np.ndarray:
    """Return ranks (T,) as float64, infinite for targets that count as a miss."""
    values = ranks.astype(np.float64)
    values[targets.missed] = np.inf
    return values
