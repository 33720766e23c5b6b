"""Logs in which nothing can be learned: whatever their arrangement, the model must not come out above the baselines."""

from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch

from xsmoe.data import make_windows
from xsmoe.encoders import InMemoryFeatures
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.report.verdict import Verdict, judge
from xsmoe.stream import Stream, StreamingTrainer

USERS, ITEMS, ROWS, WINDOWS = 40, 60, 2400, 3
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


def bursts(rng: np.random.Generator) -> Log:
    """Every item is taken by four random users in a row."""
    users, items = uniform(rng)
    return users, np.repeat(items[::4], 4)


def judged(arrange: Callable[[np.random.Generator], Log], seed: int) -> tuple[Verdict, list[dict]]:
    rng = np.random.default_rng(seed)
    users, items = arrange(rng)
    windows = make_windows(users.astype(np.int64), items.astype(np.int64), np.arange(len(users)) * 60, WINDOWS)
    generator = torch.Generator().manual_seed(seed)
    features = InMemoryFeatures({"text": torch.randn(ITEMS, 3, 8, generator=generator)})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Recommender(XSMoE(("text",), dim=8, rank=4, out_dim=16), UserEncoder(16, num_blocks=1, inner_dim=32))
    config = tiny.config(batch_size=32, epochs=6, warmup_epochs=6, duplicates="keep", ties="file", seed=seed)
    lines = [
        line for line in StreamingTrainer(model, Stream(windows, features), config).fit() if line["kind"] == "test"
    ]
    return judge(lines), lines


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("arrange", [uniform, doubled, cycles, fashions, bursts])
def test_noise_is_not_above(arrange: Callable[[np.random.Generator], Log], seed: int) -> None:
    verdict, lines = judged(arrange, seed)
    assert verdict.verdict == "not_above", str(verdict)
    assert verdict.targets > 100
    assert verdict.users > 20
    if arrange is doubled:
        # What the evaluation of last targets would be fooled by: half of all targets repeat the input before them.
        groups = [line["groups"]["seen"] for line in lines]
        assert all(group["repeats"]["own_inputs"]["HR@10"] > group["new"]["own_inputs"]["HR@10"] for group in groups)
        assert sum(group["repeats"]["model"]["targets"] for group in groups) > verdict.targets
