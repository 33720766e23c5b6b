"""Logs in which nothing can be learned: whatever their arrangement, the model must not come out above the baselines."""

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
    """Users and items drawn uniformly."""
    return rng.integers(0, USERS, ROWS), rng.integers(0, ITEMS, ROWS)


def doubled(rng: np.random.Generator) -> Log:
    """The same with every row written twice, so that the item before a target often is the target."""
    users, items = uniform(rng)
    return np.repeat(users[::2], 2), np.repeat(items[::2], 2)


def cycles(rng: np.random.Generator) -> Log:
    """Each user takes five items of its own again and again, in one order, and now and then another."""
    users, items = uniform(rng)
    own = rng.integers(0, ITEMS, (USERS, 5))
    turn = np.zeros(USERS, np.int64)
    for row, user in enumerate(users):
        if rng.random() < 0.7:
            items[row] = own[user, turn[user] % 5]
            turn[user] += 1
    return users, items


def fashions(rng: np.random.Generator) -> Log:
    """Ten items that everybody takes, others in every window, and random users."""
    users, items = uniform(rng)
    size = ROWS // WINDOWS
    for window in range(WINDOWS):
        part = slice(window * size, (window + 1) * size)
        fashionable = rng.permutation(ITEMS)[:10]
        items[part] = np.where(rng.random(size) < 0.6, fashionable[rng.integers(0, 10, size)], items[part])
    return users, items


def sessions(rng: np.random.Generator) -> Log:
    """Users come one after another, each with six interactions in a row."""
    users, items = uniform(rng)
    return np.repeat(users[::6], 6), items


GROUPS, OF_EACH = 6, 50


def tastes(rng: np.random.Generator) -> Log:
    """No noise: every user takes items of one group, which their contents show, and all are equally popular."""
    users, _ = uniform(rng)
    return users, users % GROUPS + GROUPS * rng.integers(0, OF_EACH, ROWS)


def days_sorted_by_item(rng: np.random.Generator) -> list[Window]:
    """Uniform, with days as times, in a file that is sorted by item; cut as `train` does by default."""
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
def test_noise_is_not_above(arrange: Callable[[np.random.Generator], Log | list[Window]]) -> None:
    """Chance alone exceeds two standard errors in a few logs of a hundred, and hardly in two of three."""
    found = [judged(arrange, seed) for seed in range(3)]
    verdicts = [verdict for verdict, _ in found]
    assert sum(verdict.verdict == "not_above" for verdict in verdicts) >= 2, [str(verdict) for verdict in verdicts]
    assert all(verdict.targets > 100 and verdict.users > 20 for verdict in verdicts)
    if arrange is doubled:
        # What fools an evaluation that looks at all targets: half of them repeat the input before them.
        groups = [line["groups"]["seen"] for _, tests in found for line in tests]
        assert all(group["repeats"]["own_inputs"]["HR@10"] > group["new"]["own_inputs"]["HR@10"] for group in groups)
        assert all(group["repeats"]["model"]["targets"] > group["new"]["model"]["targets"] for group in groups)


def test_what_can_be_learned_is_above() -> None:
    generator = torch.Generator().manual_seed(0)
    groups, own = (torch.randn(count, 3, 8, generator=generator) for count in (GROUPS, GROUPS * OF_EACH))
    verdict, _ = judged(tastes, 0, epochs=6, contents=2 * groups.repeat(OF_EACH, 1, 1) + own)
    assert verdict.verdict == "above", str(verdict)
    assert verdict.difference is not None
    assert verdict.standard_error is not None
    assert verdict.difference > 4 * verdict.standard_error
