"""Command `xsmoe recommend`: recommendations for a user."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from xsmoe.cli.display import Display
from xsmoe.cli.trained_run import TrainedRun
from xsmoe.data import Dataset
from xsmoe.report import tables
from xsmoe.stream.evaluation.full_ranking import embed_items
from xsmoe_kernels import topk_items

SHOWN_USERS = 5
NO_TITLE = "(no text)"
LONGEST_TITLE = 100


def recommend(folder: Path, user: str, count: int, device: str | None, display: Display) -> None:
    """Show a user's last items, and the items with the highest scores that the user has not seen.

    Args:
        folder: folder of the run.
        user: the user's id, as in the dataset.
        count: number of items to recommend.
        device: device of the model; None uses the device of the training.
        display: display of the command.

    Raises:
        ValueError: there is no trained run, the count is below 1, or the user is in no window of the run.
    """
    if count < 1:
        raise ValueError(f"the number of items (-k) must be at least 1, not {count}")
    run = TrainedRun.load(folder, device)
    users, items, times = (
        np.concatenate([getattr(window, name) for window in run.windows]) for name in ("users", "items", "timestamps")
    )
    found = np.flatnonzero(run.users == user)
    own = np.flatnonzero(users == found[0]) if len(found) else found
    if not len(own):
        raise ValueError(f"user {user!r} is in no window of {folder}; {_examples(run, users)}")
    last = own[np.argsort(times[own], kind="stable")][-run.stream.max_inputs :]
    candidates = np.unique(items)
    scores, chosen = _best(run, candidates, items[last], np.unique(items[own]), count)

    titles = _Titles(run)
    display.heading(f"User {user}: last {len(last)} of {len(own)} interactions:")
    rows = [[_day(times[place]), *titles.of(items[place])] for place in last]
    display.lines(_table(["when", "item", "title"], rows))
    display.say()
    display.heading(f"Recommended, from {len(candidates)} items:")
    places = zip(scores, chosen, strict=True)
    rows = [
        [f"{rank}", f"{score:.3f}", *titles.of(candidates[place])]
        for rank, (score, place) in enumerate(places, start=1)
        if place >= 0
    ]
    display.lines(_table(["rank", "score", "item", "title"], rows) if rows else ["none: the user has seen all items"])


@torch.no_grad()
def _best(
    run: TrainedRun, candidates: np.ndarray, inputs: np.ndarray, seen: np.ndarray, count: int
) -> tuple[list[float], list[int]]:
    """Return scores and candidate indices of the items with the highest scores; index -1 if there are too few."""
    device = torch.device(run.stream.device)
    embeddings = embed_items(run.model, run.features(), candidates, device)
    places = torch.from_numpy(np.searchsorted(candidates, inputs)).to(device)
    excluded = torch.from_numpy(np.searchsorted(candidates, seen)).to(device)
    bounds = [torch.tensor([0, len(values)], device=device) for values in (places, excluded)]
    query = run.model.queries(functional.embedding(places, embeddings), bounds[0])
    scores, ids = topk_items(query, embeddings, count, (excluded, bounds[1]))
    return scores[0].tolist(), ids[0].tolist()


class _Titles:
    def __init__(self, run: TrainedRun) -> None:
        items = Dataset.load(run.config.dataset).items
        self._texts = dict(zip(items.ids, items.texts, strict=True))
        self._ids = run.store.item_ids

    def of(self, item: int) -> list[str]:
        """Return an item's id and its title."""
        name = self._ids[item]
        title = " ".join((self._texts.get(name) or NO_TITLE).split())
        return [name, title if len(title) <= LONGEST_TITLE else f"{title[: LONGEST_TITLE - 3]}..."]


def _table(heading: list[str], rows: list[list[str]]) -> list[str]:
    lines = tables.aligned([row[:-1] for row in [heading, *rows]])
    return [f"  {line}  {row[-1]}" for line, row in zip(lines, [heading, *rows], strict=True)]


def _day(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(int(seconds), UTC).date().isoformat()
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def _examples(run: TrainedRun, users: np.ndarray) -> str:
    known = run.users[np.unique(users)]
    return f"use one of its {len(known)} users, such as {', '.join(known[:SHOWN_USERS])}"
