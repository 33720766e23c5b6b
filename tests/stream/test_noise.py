"""Verdicts on logs without signal: whatever their order, the model must not be above the baselines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.stream import tiny
from xsmoe.data import Window, make_windows
from xsmoe.data.ties import tie_keys
from xsmoe.encoders import InMemoryFeatures
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.report.verdict import Verdict, judge
from xsmoe.stream import Stream, StreamingTrainer

USERS, ITEMS, ROWS, WINDOWS = 32, 60, 1800, 3
Log = tuple[np.ndarray, np.ndarray]


def uniform(rng: np.random.Generator) -> Log:
    """Draw users and items uniformly."""
    return rng.integers(0, USERS, ROWS), rng.integers(0, ITEMS, ROWS)


def doubled(rng: np.random.Generator) -> Log:
    """Write every row twice, so that the item before a target often is the target."""
    users, items = uniform(rng)
    return np.repeat(users[::2], 2), np.repeat(items[::2], 2)


def cycles(rng: np.random.Generator) -> Log:
    """Each user repeats five own items in one order, and sometimes uses another item."""
    users, items = uniform(rng)
    own = rng.integers(0, ITEMS, (USERS, 5))
    turn = np.zeros(USERS, np.int64)
    for row, user in enumerate(users):
        if rng.random() < 0.7:
            items[row] = own[user, turn[user] % 5]
            turn[user] += 1
    return users, items


def fashions(rng: np.random.Generator) -> Log:
    """Ten items are popular in each window, others in the next one. Users are random."""
    users, items = uniform(rng)
    size = ROWS // WINDOWS
    for window in range(WINDOWS):
        part = slice(window * size, (window + 1) * size)
        fashionable = rng.permutation(ITEMS)[:10]
        items[part] = np.where(rng.random(size) < 0.6, fashionable[rng.integers(0, 10, size)], items[part])
    return users, items


def sessions(rng: np.random.Generator) -> Log:
    """Each user has six consecutive interactions."""
    users, items = uniform(rng)
    return np.repeat(users[::6], 6), items


GROUPS, OF_EACH = 6, 50


def tastes(rng: np.random.Generator) -> Log:
    """A log with signal: every user prefers one group of items, which is visible in their contents."""
    users, _ = uniform(rng)
    return users, users % GROUPS + GROUPS * rng.integers(0, OF_EACH, ROWS)


def days_sorted_by_item(rng: np.random.Generator) -> list[Window]:
    """Uniform, with days as times, in a file sorted by item, with the default settings of `train`."""
    users, items = (ids.astype(np.int64) for ids in uniform(rng))
    order = np.argsort(items, kind="stable")
    users, items, days = users[order], items[order], rng.integers(0, 3 * WINDOWS, ROWS)[order] * 86_400
    names = (
        np.array([f"{kind}{number}" for number in ids], dtype=object) for kind, ids in (("u", users), ("i", items))
    )
    return make_windows(users, items, days, WINDOWS, ties=tie_keys(*names, seed=0))


def judged(
    arrange: Callable[[np.random.Generator], Log | list[Window]],
    seed: int,
    epochs: int = 3,
    contents: torch.Tensor | None = None,
) -> tuple[Verdict, list[dict[str, Any]]]:
    windows = arrange(np.random.default_rng(seed))
    if isinstance(windows, tuple):
        users, items = (ids.astype(np.int64) for ids in windows)
        windows = make_windows(users, items, np.arange(len(users)) * 60, WINDOWS)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(ITEMS, 3, 8, generator=generator)
    features = InMemoryFeatures({"text": drawn if contents is None else contents})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Recommender(XSMoE(("text",), dim=8, rank=4, out_dim=16), UserEncoder(16, num_blocks=1, inner_dim=32))
    config = tiny.config(
        batch_size=32, epochs=epochs, patience=0, keep="last", history="all", duplicates="keep", ties="file", seed=seed
    )
    lines = [
        line for line in StreamingTrainer(model, Stream(windows, features), config).fit() if line["kind"] == "test"
    ]
    return judge(lines), lines


@pytest.mark.parametrize("arrange", [uniform, doubled, cycles, fashions, sessions, days_sorted_by_item])
def test_noise_is_not_above_baselines(arrange: Callable[[np.random.Generator], Log | list[Window]]) -> None:
    """By chance a few of a hundred logs exceed two standard errors, but hardly ever two of three."""
    found = [judged(arrange, seed) for seed in range(3)]
    verdicts = [verdict for verdict, _ in found]
    assert sum(verdict.verdict == "not_above" for verdict in verdicts) >= 2, [str(verdict) for verdict in verdicts]
    assert all(verdict.targets > 100 and verdict.users > 20 for verdict in verdicts)
    if arrange is doubled:
        # Half of all targets repeat the input before them. An evaluation on all targets would be misleading.
        groups = [line["groups"]["seen"] for _, tests in found for line in tests]
        assert all(group["repeats"]["own_inputs"]["HR@10"] > group["new"]["own_inputs"]["HR@10"] for group in groups)
        assert all(group["repeats"]["model"]["targets"] > group["new"]["model"]["targets"] for group in groups)


def test_signal_is_above_baselines() -> None:
    generator = torch.Generator().manual_seed(0)
    groups, own = (torch.randn(count, 3, 8, generator=generator) for count in (GROUPS, GROUPS * OF_EACH))
    verdict, _ = judged(tastes, 0, epochs=6, contents=2 * groups.repeat(OF_EACH, 1, 1) + own)
    assert verdict.verdict == "above", str(verdict)
    assert verdict.difference is not None
    assert verdict.standard_error is not None
    assert verdict.difference > 4 * verdict.standard_error
